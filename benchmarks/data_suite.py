"""What every measurement of data/ has in common: rows of one table, printed and recorded in one way."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import Transcript, write_record


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was measured."""

    suite: str
    case: str
    tokens_per_s: float
    """Per core, in CPU time."""
    ratio: float
    """To the suite's baseline, which is its first row."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Suite:
    """A measurement."""

    name: str
    config: Mapping[str, Any]
    """JSON-able; what the rows depend on beside the code."""
    measure: Callable[[Path], list[Row]]
    """Measures below an existing, empty folder."""


def make_rows(suite: str, rates: Sequence[tuple[str, float, str]]) -> list[Row]:
    """Return rows of (case, tokens per second, note), the first of which is the baseline."""
    baseline = rates[0][1]
    return [Row(suite, case, rate, rate / baseline, note) for case, rate, note in rates]


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows as a Markdown table."""
    lines = ["| suite | case | Mtokens/s per core | to the baseline | |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.suite} | {row.case} | {row.tokens_per_s / 1e6:.2f} | {row.ratio:.2f} | {row.note} |"
        for row in rows
    ]
    return lines


def run_suites(theme: str, suites: Sequence[Suite], args: argparse.Namespace, command: str) -> int:
    """Measure one suite after the other, print one table and write a record if that is wanted; returns 0."""
    rows: list[Row] = []
    for suite in suites:
        with tempfile.TemporaryDirectory(prefix=f"bench-{suite.name}-", dir=args.dir) as name:
            rows += suite.measure(Path(name))
    transcript = Transcript()
    transcript.say("\n".join(table(rows)))
    if args.record:
        path = write_record(
            theme,
            command=command,
            config={suite.name: suite.config for suite in suites},
            results=[asdict(row) for row in rows],
            log=transcript.text,
        )
        print(f"record: {path}")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run_suites` reads."""
    parser.add_argument("--dir", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--record", action="store_true", help="write a record below benchmarks/records")
