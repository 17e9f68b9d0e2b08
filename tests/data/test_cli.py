"""The frame of the command lines: exit codes and one-line errors."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys

import pytest

from data.cli import run_cli
from data.manifest import DataError
from data.progress import Progress, format_duration


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\n  b"), 2, "error: a b\n"),
        (DataError("bad shard", "url"), 2, "error: bad shard\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.txt"),
            2,
            "error: x.txt: No such file or directory\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_expected_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    """Catches tracebacks for bad input, and messages that break over lines."""

    def fail(_: argparse.Namespace) -> None:
        raise error

    assert run_cli(fail, argparse.ArgumentParser(), []) == code
    assert capsys.readouterr().err == line
    with pytest.raises(type(error)):
        run_cli(fail, argparse.ArgumentParser(), ["--debug"])


def test_other_errors_keep_their_traceback() -> None:
    """Catches a bug of the program dressed up as bad input."""

    def fail(_: argparse.Namespace) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(fail, argparse.ArgumentParser(), [])
    assert run_cli(fail, argparse.ArgumentParser(), [], errors=(ZeroDivisionError,)) == 2
    assert run_cli(lambda _: None, argparse.ArgumentParser(), []) == 0
    assert run_cli(lambda _: 3, argparse.ArgumentParser(), []) == 3


def test_prepare_and_verify_do_not_import_torch() -> None:
    """Catches a slow start of the commands and of each tokenizing process."""
    code = "import sys, data.prepare, data.verify; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress() -> None:
    """Catches carriage returns in log files, and finished work that inflates the rate after a restart."""
    plain, terminal = io.StringIO(), Terminal()
    progress = Progress("reading", 100, stream=plain, plain_every_s=0.0)
    progress.skip(50)
    progress.update(50)
    progress.close("1 file")
    first, last = plain.getvalue().splitlines()
    assert first == "reading:  50.0%, 0.00 MB/s, ? left"
    assert last.startswith("reading: done in 0.0 s, 1 file")
    progress = Progress("reading", 100, stream=terminal)
    progress._last -= 1
    progress.update(25)
    assert terminal.getvalue().startswith("\rreading: [######..................]  25.0%")
    assert [format_duration(s) for s in (0, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
