"""Run a function on several real gloo processes of this machine, for tests."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.world import start_world, stop_world


class RankError(RuntimeError):
    """A rank raised, died or ran into the time limit; the text holds its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Call ``fn(world, *args)`` on every rank of a fresh gloo group and return the results by rank.

    The ranks are forked (about five times cheaper than spawned ones), meet in a ``file://`` store
    (no port) and compute with one thread each. They never outlive this process.

    Args:
        fn: Any callable, also a closure; its result must pickle (tensors come back as copies).
        world_size: Number of processes.
        args: Further arguments of ``fn``; inherited by the fork, so they need not pickle.
        timeout_s: Seconds for everything; the stacks of all ranks are part of the error after that.

    Raises:
        RankError: One rank failed or all took too long. The other ranks are killed.
    """
    assert not dist.is_initialized(), "a forked rank would inherit this process' group"
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        context = multiprocessing.get_context("fork")
        ranks: list[BaseProcess] = [
            context.Process(target=_run_rank, args=(fn, rank, world_size, folder, timeout_s, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _await(ranks, folder, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [pickle.loads((folder / f"result.{rank}").read_bytes()) for rank in range(world_size)]


def _run_rank(
    fn: Callable[..., Any], rank: int, world_size: int, folder: Path, timeout_s: float, args: tuple[Any, ...]
) -> None:
    _die_with_parent()
    torch.set_num_threads(1)
    with (folder / f"stack.{rank}").open("w") as stack:
        # Fires before the parent's own limit, so that the parent can show where each rank hung.
        faulthandler.dump_traceback_later(0.9 * timeout_s, file=stack)
        try:
            _join_group(rank, world_size, folder / "store", timeout_s)
            result = fn(start_world("cpu", timeout_s), *args)
            (folder / f"result.{rank}").write_bytes(pickle.dumps(result))
        except BaseException:
            (folder / f"error.{rank}").write_text(traceback.format_exc())
            os._exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()
    stop_world()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the inherited exit handlers: they belong to the parent (pytest, coverage, loggers).
    os._exit(0)


def _join_group(rank: int, world_size: int, store: Path, timeout_s: float) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that happens (prctl(2))."""
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _await(ranks: list[BaseProcess], folder: Path, timeout_s: float) -> None:
    """Return when every rank has ended well; raise as soon as one has not."""
    deadline = time.monotonic() + timeout_s
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            stacks = "\n".join(
                f"rank {rank}:\n{(folder / f'stack.{rank}').read_text()}" for rank in sorted(running.values())
            )
            raise RankError(f"ranks {sorted(running.values())} still ran after {timeout_s:g} s\n{stacks}")
        for sentinel in ended:
            assert isinstance(sentinel, int)
            rank = running.pop(sentinel)
            ranks[rank].join()
            _check(rank, ranks[rank].exitcode, folder)


def _check(rank: int, exitcode: int | None, folder: Path) -> None:
    if exitcode == 0:
        return
    if not (folder / f"error.{rank}").exists():
        raise RankError(f"rank {rank} ended with exit code {exitcode} and no traceback")
    # When several ranks fail together, the one whose error came first is the cause.
    first = min(folder.glob("error.*"), key=lambda path: path.stat().st_mtime_ns)
    raise RankError(f"rank {first.suffix[1:]} raised:\n{first.read_text()}")
