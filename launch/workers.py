"""Where the ranks of a run are started, and the handle on those that run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.processes import kill_descendants
from launch.records import agent_record, read_json
from launch.slurm import Job, have_srun


@dataclass(frozen=True, slots=True)
class Place:
    """The machines of a run: the nodes of a SLURM job, or this one."""

    job: Job | None
    hosts: tuple[str, ...]
    nproc_per_node: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.hosts) * self.nproc_per_node

    @property
    def uses_srun(self) -> bool:
        """Whether agents are started as a step of the job."""
        return self.job is not None and have_srun()

    def port(self, launch: int) -> int:
        """Rendezvous port of a launch; outside SLURM one that is free now."""
        if self.job is not None:
            return self.job.port(launch)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])


def find_place(nproc_per_node: int | None) -> Place:
    """Return the machines that this process was given.

    Args:
        nproc_per_node: Ranks per node; None takes one per GPU, or one where there is none.

    Raises:
        ValueError: Several nodes but no srun, or a number of ranks below 1.
    """
    count = num_gpus() or 1 if nproc_per_node is None else nproc_per_node
    if count < 1:
        raise ValueError(f"--nproc_per_node {count} must be at least 1")
    job = Job.from_environment()
    if job is None:
        return Place(None, (socket.gethostname(),), count)
    hosts = job.hosts() if have_srun() else (socket.gethostname(),)
    if not have_srun() and int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1:
        raise ValueError(f"SLURM_JOB_NODELIST={job.node_list} names several nodes, but there is no srun here")
    return Place(job, hosts, count)


def num_gpus() -> int:
    """Number of GPUs that this process may use, without loading torch."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if given.isdecimal():
        return int(given)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name and name != "-1"])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


class Group:
    """The ranks of one launch, all nodes together.

    Args:
        place: Where they run.
        command: Module and arguments that every rank runs.
        run_dir: Run directory, on a file system that all nodes share.
        launch_dir: Where raw output and agents' records go.
        port: Rendezvous port on the first node.
        owner: Name of the lock's owner, without which agents do not watch the lock.
        environment: Variables beside this process's own.
    """

    def __init__(
        self,
        place: Place,
        command: Sequence[str],
        *,
        run_dir: Path,
        launch_dir: Path,
        port: int,
        owner: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.place, self._launch_dir = place, launch_dir
        launch_dir.mkdir(parents=True, exist_ok=True)
        agent = [
            *(sys.executable, "-m", "launch.agent"),
            f"--run_dir={run_dir}",
            f"--launch_dir={launch_dir}",
            *([] if owner is None else [f"--owner={owner}"]),
            *([] if place.uses_srun else ["--node_rank=0"]),
            f"--nnodes={len(place.hosts)}",
            f"--nproc_per_node={place.nproc_per_node}",
            f"--master_addr={place.hosts[0] if place.uses_srun else '127.0.0.1'}",
            f"--master_port={port}",
            "--",
            *command,
        ]
        # A session of its own: Ctrl-C at a terminal goes to the orchestrator alone, which passes it on once.
        self._process = subprocess.Popen(
            [*self._srun(), *agent],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _srun(self) -> list[str]:
        if not self.place.uses_srun:
            return []
        cpus = os.environ.get("SLURM_CPUS_PER_TASK")
        return [
            "srun",
            f"--nodes={len(self.place.hosts)}",
            f"--ntasks={len(self.place.hosts)}",
            "--ntasks-per-node=1",
            # Steps do not inherit it from sbatch (SLURM 22.05 and later).
            *([f"--cpus-per-task={cpus}"] if cpus else []),
            "--kill-on-bad-exit=0",  # nodes that are still saving must not be killed; see Launch.is_torn
            "--cpu-bind=none",  # one task per node holds several ranks
        ]

    def exit_code(self) -> int | None:
        """Exit code once all nodes have ended, None before."""
        return self._process.poll()

    def request_stop(self) -> None:
        """Ask all ranks to save and stop (srun passes SIGUSR1 on; SIGTERM would make it kill the step)."""
        self._signal(signal.SIGUSR1)

    def request_stacks(self) -> None:
        """Have all ranks write their stacks."""
        self._signal(signal.SIGUSR2)

    def kill(self) -> None:
        """End all ranks on all nodes now."""
        if self.place.uses_srun:
            self._signal(signal.SIGTERM)  # srun's word for SIGKILL to the whole step
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self.remove_leftovers()

    def remove_leftovers(self) -> list[int]:
        """Kill what is left of the launch on this machine; returns pids that would not die."""
        left = kill_descendants(os.getpid())
        self._process.wait()
        return left

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def agent_records(self) -> list[dict[str, object] | None]:
        """What each node's agent says, in the order of node ranks; None for one that never reported."""
        return [read_json(agent_record(self._launch_dir, node)) for node in range(len(self.place.hosts))]

    def first_failure(self) -> tuple[int | None, str | None]:
        """Return (rank, host) that failed first, None where that cannot be told.

        A node whose agent never reported its start could not be reached, one whose agent never reported
        its end was lost; where others did, it is the cause.
        """
        records = self.agent_records()
        unreached = [host for host, record in zip(self.place.hosts, records, strict=True) if record is None]
        if 0 < len(unreached) < len(records):
            return None, unreached[0]
        lost = [
            host
            for host, record in zip(self.place.hosts, records, strict=True)
            if record is None or "exit_code" not in record
        ]
        if lost:
            return None, lost[0] if len(lost) < len(records) or len(records) == 1 else None
        exits = [
            (record["first_exit"]["time"], record["first_exit"]["rank"], host)  # type: ignore[index]
            for host, record in zip(self.place.hosts, records, strict=True)
            if record is not None and record["first_exit"] is not None
        ]
        if not exits:
            return None, None
        _, rank, host = min(exits)
        return int(rank), host

    def is_torn(self, *, grace_s: float) -> bool:
        """Whether a node ended badly long ago and others still run: they wait for it in vain."""
        ended = [
            path.stat().st_mtime
            for node, record in enumerate(self.agent_records())
            if record is not None
            and record.get("exit_code")
            and (path := agent_record(self._launch_dir, node)).exists()
        ]
        return bool(ended) and self.exit_code() is None and time.time() - min(ended) > grace_s
