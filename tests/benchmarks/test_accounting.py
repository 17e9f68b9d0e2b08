"""The tables of docs/performance.md are what the code counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accounting import Case, bytes_line, cases, cost, flops_table, plan_of

DOCS = Path(__file__).parents[2] / "docs" / "performance.md"


def test_flops_in_the_docs_are_those_of_the_formulas() -> None:
    """Catches a formula that changed without its table, and a size without a row."""
    text = DOCS.read_text(encoding="utf-8")
    lines = flops_table(["69m", "386m", "1b"])
    assert len(lines) == 2 + 9
    assert "\n".join(lines) in text
    for case in cases(["69m", "386m", "1b"]):
        assert text.count(f"| {case.name} |") == 2, "a row of FLOPs and one of bytes"


@pytest.mark.slow
def test_bytes_in_the_docs_are_counted() -> None:
    """Catches other costs than the docs tell, and those of a step counted as a token's: weights move once."""
    case = Case("69m", "ntp")
    found = cost(case)
    assert bytes_line(case, found) in DOCS.read_text(encoding="utf-8")
    weights = 4 * plan_of(case, 1).layout.num_elements
    assert found.moved_per_step > 7 * weights, "the optimizer alone moves seven times the weights"
    assert 3 * weights < found.kept_per_step < 6 * weights
    assert found.kept_per_token < found.moved_per_token
