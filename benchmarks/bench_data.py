"""``python -m benchmarks.bench_data [--suites prepare stream] [--record]``: what data cost, in one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks import bench_prepare, bench_stream
from benchmarks.data_suite import Suite, add_arguments, run_suites
from benchmarks.record import command_line
from data.cli import run_cli

SUITES: dict[str, Callable[[], Suite]] = {
    "prepare": bench_prepare.suite,
    "stream": bench_stream.suite,
}


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run the chosen suites; returns 0."""
    for name in args.suites:
        if name not in SUITES:
            raise ValueError(f"--suites {name} is unknown; there is {', '.join(SUITES)}")
    suites = [SUITES[name]() for name in args.suites]
    return run_suites("data", suites, args, command_line("benchmarks.bench_data", argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_data", description="Measure what data cost, from text to batches"
    )
    parser.add_argument("--suites", nargs="+", default=list(SUITES), help="default: all")
    add_arguments(parser)
    return run_cli(partial(run, argv=argv), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
