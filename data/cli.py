"""Frame shared by all command lines: one-line errors, exit codes, ``--debug``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from data.manifest import DataError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run_cli(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    errors: tuple[type[Exception], ...] = (),
    *,
    overrides: bool = False,
) -> int:
    """Parse ``argv``, run ``main`` and turn expected failures into one line on stderr.

    Args:
        main: receives the parsed arguments; ``None`` counts as exit code 0.
        parser: gets the flag ``--debug``, which shows the traceback of an expected failure.
        argv: arguments without the program name; ``None`` reads the process's own.
        errors: further exception types that are expected (beside ValueError, DataError, OSError).
        overrides: keep arguments that the parser does not know in ``args.overrides``.

    Returns:
        The exit code: that of ``main``, 2 for bad input, 130 when interrupted.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if overrides:
        args, unknown = parser.parse_known_args(argv)
        args.overrides = unknown
    else:
        args = parser.parse_args(argv)
    expected: tuple[type[Exception], ...] = (ValueError, DataError, OSError, *errors)
    try:
        return main(args) or 0
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except expected as error:
        if args.debug:
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT


def describe(error: Exception) -> str:
    """Return the message of ``error`` on one line, with the file name of an OSError in front."""
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
