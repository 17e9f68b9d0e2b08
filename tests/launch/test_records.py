"""The orchestrator's memory of a run."""

from __future__ import annotations

from pathlib import Path

from launch.records import History


def test_failures_without_progress(tmp_path: Path) -> None:
    """Catches a count that forgets failures at a requeue, or keeps those from before a new checkpoint."""
    history = History(tmp_path / "orchestrator.jsonl")
    for checkpoint in (0, 20, 20):
        history.add("failure", checkpoint=checkpoint, host="n1")
        history.add("restart")
    assert history.failures_without_progress(20) == 2
    assert history.failures_without_progress(40) == 0
    assert history.failures_of("n1", within_s=60.0) == 3
    assert history.failures_of("n2", within_s=60.0) == 0
    with (tmp_path / "orchestrator.jsonl").open("a") as file:
        file.write('{"time": 1.0, "ki')
    assert history.failures_without_progress(20) == 2
