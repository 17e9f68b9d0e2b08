"""What every measurement of data/ hands over: rows of a table, all of them tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
