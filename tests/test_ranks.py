"""The multi-process helper itself: a helper that hides failures would make every other test lie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.world import World
from tests.ranks import RankError, run_ranks

ROOT = Path(__file__).parents[1]


def _sum_of_ranks(world: World, offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([float(world.rank + offset)])
    dist.all_reduce(total)
    return world.rank, total


@pytest.mark.dist
def test_ranks_talk_to_each_other_and_return_by_rank() -> None:
    """Catches results in the wrong order and groups of one that never communicate."""
    results = run_ranks(_sum_of_ranks, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(total.item() == 33.0 for _, total in results)


def _fail_on_one(world: World) -> None:
    if world.rank == 1:
        raise KeyError("the planted fault")
    dist.barrier()


@pytest.mark.dist
def test_a_failing_rank_fails_the_test_with_its_own_traceback() -> None:
    """Catches a helper that waits for the other ranks, or reports their broken connection instead."""
    with pytest.raises(RankError, match="rank 1 raised:(?s:.*)_fail_on_one(?s:.*)the planted fault"):
        run_ranks(_fail_on_one, 2)


def _die_on_one(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.dist
def test_a_killed_rank_is_reported() -> None:
    """Catches a helper that hangs, or passes, when a rank dies without a Python error."""
    with pytest.raises(RankError, match="rank 1 ended with exit code -9"):
        run_ranks(_die_on_one, 2)


def _hang_here(world: World) -> None:
    if world.rank == 1:
        time.sleep(60)


@pytest.mark.dist
def test_a_hang_ends_at_the_time_limit_and_says_where() -> None:
    """Catches a suite that hangs for ever, and time limits that do not tell the place."""
    start = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[1\] still ran after 2 s(?s:.*)_hang_here"):
        run_ranks(_hang_here, 2, timeout_s=2)
    assert time.monotonic() - start < 10


PARENT = """
import os, sys, time
from tests.ranks import run_ranks

def stay(world, folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(60)

run_ranks(stay, 2, sys.argv[1])
"""


@pytest.mark.dist
def test_ranks_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Catches processes that stay behind when the test run itself is killed."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(path.name) for path in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    assert len(children) == 2
    while any(_alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in children)


def _alive(pid: int) -> bool:
    try:
        # A zombie that nobody has reaped yet has ended, too.
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
