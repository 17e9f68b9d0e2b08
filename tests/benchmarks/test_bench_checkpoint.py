"""The stall benchmark measures what it says."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks.bench_checkpoint import Block, main, slowest, summarise
from benchmarks.record import write_record


def test_medians_and_paired_ratios() -> None:
    """Catches ratios of medians, which drift of the machine distorts, and means, which an outlier does."""
    blocks = [
        *(Block("none", 0.0, 1.0, 0.0), Block("sync", 0.5, 2.0, 0.5), Block("async", 0.1, 1.5, 0.4)),
        *(Block("sync", 0.7, 4.0, 0.7), Block("async", 0.1, 3.0, 0.6), Block("none", 0.0, 2.0, 0.0)),
        *(Block("async", 9.0, 90.0, 9.0), Block("none", 0.0, 8.0, 0.0), Block("sync", 0.6, 16.0, 0.6)),
    ]
    summary = summarise(blocks)
    assert summary["none"]["ratio"] == 1.0
    assert summary["sync"] == {"stall_s": 0.6, "loop_s": 4.0, "commit_s": 0.6, "ratio": 2.0}
    assert summary["async"] == {"stall_s": 0.1, "loop_s": 3.0, "commit_s": 0.6, "ratio": 1.5}


def test_the_slowest_rank_counts() -> None:
    """Catches a stall that only the fast rank's clock shows."""
    first, second = [Block("sync", 0.1, 1.0, 0.3)], [Block("sync", 0.2, 0.9, 0.2)]
    assert slowest([first, second]) == [Block("sync", 0.2, 1.0, 0.3)]


@pytest.mark.dist
def test_a_small_measurement_is_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a benchmark that does not run, or saves that never happen."""
    monkeypatch.setattr("benchmarks.bench_checkpoint.write_record", partial(write_record, root=tmp_path))
    arguments = "--ranks 1 --repeats 2 --steps 2 --width 16 --record"
    assert main(arguments.split()) == 0
    assert "| 1 |" in capsys.readouterr().out
    (record,) = tmp_path.iterdir()
    (measured,) = json.loads((record / "record.json").read_text())["results"]
    assert [block["mode"] for block in measured["blocks"]] == [
        "none",
        "sync",
        "async",
        "sync",
        "async",
        "none",
    ]
    for block in measured["blocks"]:
        assert (block["commit_s"] > 0) == (block["mode"] != "none")


def test_bad_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback for a mistyped option."""
    assert main(["--repeats", "0"]) == 2
    assert "--repeats 0 must be at least 1" in capsys.readouterr().err
