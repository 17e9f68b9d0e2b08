"""One per node and launch: runs torchrun, passes requests on to the ranks, leaves nothing behind.

The orchestrator starts it directly or through srun. It answers

``SIGUSR1``, ``SIGTERM``, ``SIGINT``   ask every rank to save and stop
``SIGUSR2``                            have every rank write its stacks

Signals go to the ranks themselves, not to torchrun: that would die of SIGUSR1 and orphan them, and
kill them 30 seconds after a SIGTERM, saved or not. SLURM may TERM every process of a step, so torchrun
is started with SIGTERM ignored.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from launch.lock import read_holder
from launch.processes import (
    adopt_orphans,
    children,
    environment,
    kill_descendants,
    read_stat,
    send,
    signal_at_parent_death,
)
from launch.records import agent_record, write_json

_POLL_S = 0.05
_FENCE_S = 2.0
_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
EXIT_FENCED = 3


class Agent:
    """Runs the ranks of one node.

    Args:
        args: Parsed command line of :func:`main`.
        node_rank: Number of this node in the launch.
    """

    def __init__(self, args: argparse.Namespace, node_rank: int) -> None:
        self._args, self._node_rank = args, node_rank
        self._stop_requested = self._dump_requested = False
        self._ranks: dict[int, int] = {}
        self._facts: dict[str, object] = {"host": socket.gethostname(), "first_exit": None}
        self._next_fence = self._next_search = self._next_stop = 0.0
        self._torchrun: subprocess.Popen[bytes]

    def run(self) -> int:
        """Start torchrun and stay until it and everything below it has ended; returns its exit code."""
        adopt_orphans()
        for number in (*_STOP_SIGNALS, signal.SIGUSR2):
            signal.signal(number, self._on_signal)
        self._record()
        self._torchrun = subprocess.Popen(
            self._command(), start_new_session=True, stdin=subprocess.DEVNULL, preexec_fn=_ignore_sigterm
        )
        fenced = False
        while self._torchrun.poll() is None and not fenced:
            self._find_ranks()
            self._watch_exits()
            self._serve_requests()
            fenced = self._fence()
            time.sleep(_POLL_S)
        kill_descendants(os.getpid())
        code = EXIT_FENCED if fenced else self._torchrun.wait()
        self._record(exit_code=code)
        return code

    def _command(self) -> list[str]:
        args = self._args
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            f"--nnodes={args.nnodes}",
            f"--nproc-per-node={args.nproc_per_node}",
            f"--node-rank={self._node_rank}",
            f"--master-addr={args.master_addr}",
            f"--master-port={args.master_port}",
            "--signals-to-handle=SIGINT",
            "--max-restarts=0",  # the orchestrator restarts, because only it can see hangs and other nodes
            f"--log-dir={args.launch_dir}/node_{self._node_rank}",
            "--redirects=3",
            f"--tee={'0:3' if self._node_rank == 0 else '0:0'}",
            *("-m", *args.command),
        ]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self._dump_requested = True
        else:
            self._stop_requested = True

    def _find_ranks(self) -> None:
        """Look for the processes of ranks among torchrun's children, until all are known."""
        now = time.monotonic()
        if len(self._ranks) == self._args.nproc_per_node or now < self._next_search:
            return
        self._next_search = now + 0.2
        for pid in children(self._torchrun.pid):
            rank = environment(pid).get("RANK", "")
            if rank.isdecimal():
                self._ranks[int(rank)] = pid

    def _watch_exits(self) -> None:
        """Note which rank ended first: it is the cause, the others are its victims."""
        if self._facts["first_exit"] is not None:
            return
        ended = self._ranks.keys() - self._living().keys()
        if ended:
            self._record(first_exit={"rank": min(ended), "time": time.time()})

    def _living(self) -> dict[int, int]:
        """Processes of the ranks that still run; a pid that was given to somebody else is not one."""
        stats = {rank: (pid, read_stat(pid)) for rank, pid in self._ranks.items()}
        parent = self._torchrun.pid
        return {
            rank: pid
            for rank, (pid, stat) in stats.items()
            if stat is not None and stat[1] == parent and stat[0] not in "ZX"
        }

    def _serve_requests(self) -> None:
        now = time.monotonic()
        if self._stop_requested and now >= self._next_stop:
            # Again and again: a rank that is still loading ignores it, as the torchrun that started it does.
            self._next_stop = now + 1.0
            for pid in self._living().values():
                send(pid, signal.SIGTERM)
            if not self._ranks:  # and so nothing to save
                send(self._torchrun.pid, signal.SIGINT)
        if self._dump_requested:
            self._dump_requested = False
            for pid in self._living().values():
                send(pid, signal.SIGUSR2)
                send(pid, signal.SIGCONT)  # a stopped process could not write anything

    def _fence(self) -> bool:
        """Whether another job owns the run directory now; a lease that ended asks the ranks to stop.

        An owner that was cut off (its node hangs, its network is down) must not go on writing beside
        its successor.
        """
        now = time.monotonic()
        if self._args.owner is None or now < self._next_fence:
            return False
        self._next_fence = now + _FENCE_S
        _, holder = read_holder(Path(self._args.run_dir) / "lock")
        if holder is None:
            return False
        if holder.owner != self._args.owner:
            print(f"[agent] the run directory now belongs to {holder}: ranks are killed", flush=True)
            return True
        if holder.released or holder.expires < time.time():
            self._stop_requested = True
        return False

    def _record(self, **facts: object) -> None:
        """Say how this node is doing; a node without ``exit_code`` at the end of a launch was lost."""
        self._facts |= facts
        write_json(agent_record(Path(self._args.launch_dir), self._node_rank), self._facts)


def _ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns torchrun's exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.agent", allow_abbrev=False)
    parser.add_argument("--run_dir", required=True)
    parser.add_argument("--launch_dir", required=True)
    parser.add_argument("--owner", help="name of the lock's owner; without it nothing is fenced")
    parser.add_argument("--nnodes", type=int, required=True)
    parser.add_argument("--node_rank", type=int, help="absent in a SLURM step, which knows it")
    parser.add_argument("--nproc_per_node", type=int, required=True)
    parser.add_argument("--master_addr", required=True)
    parser.add_argument("--master_port", type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="module and its arguments")
    args = parser.parse_args(argv)
    args.command = [part for part in args.command if part != "--"]
    if args.node_rank is None:
        return Agent(args, int(os.environ["SLURM_NODEID"])).run()
    signal_at_parent_death(signal.SIGTERM)
    return Agent(args, args.node_rank).run()


if __name__ == "__main__":
    sys.exit(main())
