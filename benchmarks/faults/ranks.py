"""Real gloo processes that are forked from one process that has imported everything once.

Starting a rank this way takes a fraction of a second instead of several: a hundred kills become cheap.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from launch.processes import signal_at_parent_death
from parallel.world import World, start_world, stop_world
from trainer.config import RunConfig
from trainer.main import EXIT_STOPPED, train
from trainer.stop import StopRequest

RankFunction = Callable[[World], Any]


class RankFailure(RuntimeError):
    """A rank raised, died or took too long; the text is one line."""


class Launch:
    """The ranks of one launch, each a process; a context manager that leaves none behind.

    They meet in a ``file://`` store (no port), compute with one thread each, and die with this process.

    Args:
        function: what every rank runs; an int that it returns is the exit code.
        world_size: number of processes.
        folder: gets the ranks' output, results and the store; made if it is missing.
        timeout_s: seconds that a collective may take.
    """

    def __init__(
        self, function: RankFunction, world_size: int, folder: Path, *, timeout_s: float = 60.0
    ) -> None:
        assert not dist.is_initialized(), "a forked rank would inherit this process' group"
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._store = folder / f"store_{time.monotonic_ns()}"
        self.started = time.monotonic()
        self.exit_codes: dict[int, int] = {}
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids: list[int] = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                self._run_rank(function, rank, world_size, timeout_s)
            self.pids.append(pid)

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.signal(signal.SIGKILL)
        self.wait(30.0)
        self._store.unlink(missing_ok=True)

    def alive(self) -> list[int]:
        """Ranks that still run."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.exit_codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.exit_codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self.exit_codes]

    def signal(self, number: signal.Signals, *ranks: int) -> list[int]:
        """Send a signal to some ranks, to all without any named; returns those that were still there."""
        reached = [rank for rank in self.alive() if not ranks or rank in ranks]
        for rank in reached:
            os.kill(self.pids[rank], number)
        return reached

    def limit_file_size(self, max_bytes: int) -> None:
        """Let no rank write a file beyond this size (RLIMIT_FSIZE); -1 lifts the limit."""
        for rank in self.alive():
            resource.prlimit(self.pids[rank], resource.RLIMIT_FSIZE, (max_bytes, resource.RLIM_INFINITY))

    def wait(self, timeout_s: float) -> bool:
        """Wait until no rank runs any more; False when the time is over."""
        deadline = time.monotonic() + timeout_s
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def end(self, grace_s: float = 3.0) -> None:
        """End what is left as torchrun does when a rank has failed: SIGTERM, and later SIGKILL."""
        self.signal(signal.SIGTERM)
        if not self.wait(grace_s):
            self.signal(signal.SIGKILL)
            self.wait(30.0)

    def results(self) -> list[Any]:
        """What each rank returned.

        Raises:
            RankFailure: a rank did not get to its end.
        """
        for rank in sorted(self.exit_codes):
            error = self._folder / f"error_{rank}"
            if self.exit_codes[rank] not in (0, EXIT_STOPPED):
                last = error.read_text().rstrip().splitlines()[-1] if error.exists() else "no word"
                raise RankFailure(f"rank {rank} ended with exit code {self.exit_codes[rank]}: {last}")
        return [
            pickle.loads((self._folder / f"result_{rank}").read_bytes()) for rank in range(len(self.pids))
        ]

    def _run_rank(self, function: RankFunction, rank: int, world_size: int, timeout_s: float) -> None:
        """Be a rank; never returns."""
        code = 1
        try:
            signal_at_parent_death(signal.SIGKILL)
            torch.set_num_threads(1)
            self._redirect(rank)
            (self._folder / f"error_{rank}").unlink(missing_ok=True)
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
            dist.init_process_group(
                "gloo",
                init_method=f"file://{self._store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )
            result = function(start_world("cpu", timeout_s))
            (self._folder / f"result_{rank}").write_bytes(pickle.dumps(result))
            stop_world()
            code = 0
        except BaseException:
            (self._folder / f"error_{rank}").write_text(traceback.format_exc())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # Without exit handlers: they belong to the process that was forked.
            os._exit(code)

    def _redirect(self, rank: int) -> None:
        output = os.open(self._folder / f"output_{rank}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)


def run_ranks(
    function: RankFunction, world_size: int, folder: Path, *, timeout_s: float = 180.0
) -> list[Any]:
    """Run a function on all ranks and return the results by rank.

    Raises:
        RankFailure: one rank failed, or all took too long.
    """
    with Launch(function, world_size, folder) as launch:
        if not launch.wait(timeout_s):
            raise RankFailure(f"ranks {launch.alive()} still ran after {timeout_s:g} s")
        return launch.results()


def train_rank(config: RunConfig) -> RankFunction:
    """What ``python -m trainer.main`` does after it has read ``config``, as a function of a rank."""

    def one_rank(world: World) -> str:
        with StopRequest() as stop:
            return train(config, world, stop)

    return one_rank


def rank_folder(run_dir: Path) -> Path:
    """Where the ranks of a run write their output: beside the run directory, which stays the run's own."""
    return run_dir.with_name(f"{run_dir.name}_ranks")


def train_to_end(config: RunConfig, world_size: int) -> None:
    """Run all ranks until the run has finished.

    Raises:
        RankFailure: it did not.
    """
    run_dir = Path(config.run.dir)
    outcomes = run_ranks(train_rank(config), world_size, rank_folder(run_dir))
    if set(outcomes) != {"finished"}:
        raise RankFailure(f"the ranks ended with {sorted(set(outcomes))}, not finished")
