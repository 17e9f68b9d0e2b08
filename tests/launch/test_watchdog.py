"""A rank that falls silent is found, and the right one is suspected."""

from __future__ import annotations

import json
from pathlib import Path

from launch.records import RunFiles, write_json
from launch.watchdog import Watchdog


def test_watchdog_suspects_the_rank_behind(tmp_path: Path) -> None:
    """Catches a watchdog that trusts other machines' clocks, or accuses the ranks that wait."""
    files = RunFiles(tmp_path)
    files.heartbeats.mkdir()

    def beat(rank: int, step: int, phase: str) -> None:
        value = {"pid": 1, "host": f"n{rank}", "step": step, "time": 5.0 * step, "phase": phase}
        write_json(files.heartbeats / f"rank_{rank}.json", value)

    beat(0, 99, "step")
    dog = Watchdog(files, 2, timeout_s=0.0, startup_timeout_s=3600.0)
    assert dog.check() is None, "a beat of the launch before"
    beat(0, 0, "start")
    assert dog.check() is None, "loading may take long"
    beat(0, 8, "step")
    beat(1, 7, "step")
    assert dog.check() is None, "both have just given a sign of life"
    silence = dog.check()
    assert silence is not None
    assert silence.ranks == (0, 1)
    assert silence.suspects == (1,)
    assert silence.host() == "n1"
    assert json.loads((files.heartbeats / "rank_1.json").read_text())["step"] == dog.last_step - 1
