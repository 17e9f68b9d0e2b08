"""Forked ranks end with their parent, and say why they failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.faults.ranks import Launch, RankFailure, run_ranks
from launch.processes import is_alive
from parallel.world import World

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.dist


def test_results_errors_and_kills(tmp_path: Path) -> None:
    """Catches a rank whose failure is lost, and a killed one that counts as well ended."""
    assert run_ranks(lambda world: world.rank * 10, 2, tmp_path) == [0, 10]

    def fail(world: World) -> None:
        raise ValueError(f"no luck on {world.rank}")

    with pytest.raises(RankFailure, match="rank 0 ended with exit code 1: ValueError: no luck on 0"):
        run_ranks(fail, 1, tmp_path)
    with Launch(lambda _: time.sleep(60), 2, tmp_path) as launch:
        assert launch.signal(signal.SIGKILL, 1) == [1]
        launch.end(grace_s=0.5)
        assert launch.exit_codes[1] == -signal.SIGKILL
        with pytest.raises(RankFailure):
            launch.results()
    assert not any(is_alive(pid) for pid in launch.pids)


def test_ranks_die_with_their_parent(tmp_path: Path) -> None:
    """Catches processes that a killed program leaves behind."""
    program = (
        "import sys, time; from pathlib import Path; from benchmarks.faults.ranks import Launch\n"
        "launch = Launch(lambda _: time.sleep(60), 2, Path(sys.argv[1]))\n"
        "print(*launch.pids, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(text) for text in parent.stdout.readline().split()]
        time.sleep(0.2)
        parent.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_alive(pid) for pid in pids)
    assert os.getpid() not in pids
