"""What the orchestrator asks of SLURM and tells it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_FIRST_PORT = 20000
_PORTS_PER_JOB = 8
_NUM_JOBS = 1500


@dataclass(frozen=True, slots=True)
class Job:
    """The SLURM job that this process belongs to."""

    id: str
    """Number of the job; every task of an array has one."""
    cluster: str
    name: str
    """What scontrol calls the job: ``ID``; ``ARRAYJOB_TASK`` in an array, all of which ``ID`` could mean."""
    array_task: str
    """Number of the array task; empty outside arrays."""
    restarts: int
    """How often SLURM has requeued it."""
    node_list: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Job | None:
        """Return the job that SLURM's variables describe, None outside a job."""
        number = environment.get("SLURM_JOB_ID")
        if not number:
            return None
        task = environment.get("SLURM_ARRAY_TASK_ID", "")
        return cls(
            id=number,
            cluster=environment.get("SLURM_CLUSTER_NAME", ""),
            name=f"{environment['SLURM_ARRAY_JOB_ID']}_{task}" if task else number,
            array_task=task,
            restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
            node_list=environment.get("SLURM_JOB_NODELIST", ""),
        )

    @property
    def lock_name(self) -> str:
        """How a lock record names the job."""
        return f"{self.cluster}:{self.id}"

    def port(self, launch: int) -> int:
        """Rendezvous port on the first node: jobs and successive launches on a node do not meet."""
        return _FIRST_PORT + int(self.id) % _NUM_JOBS * _PORTS_PER_JOB + launch % _PORTS_PER_JOB

    def hosts(self) -> tuple[str, ...]:
        """Names of the job's nodes, in SLURM's order; ``a[1-2],b7`` and other mixtures are expanded."""
        result = _run(["scontrol", "show", "hostnames", self.node_list], timeout_s=10)
        if result.returncode or not result.stdout.split():
            raise ValueError(f"SLURM_JOB_NODELIST={self.node_list!r}: {_line(result)}")
        return tuple(result.stdout.split())

    def info(self) -> dict[str, str]:
        """Fields of ``scontrol show job``; empty while the controller does not answer."""
        result = _run(["scontrol", "-o", "show", "job", self.name], timeout_s=10)
        return dict(re.findall(r"(\S+?)=(\S*)", result.stdout)) if result.returncode == 0 else {}

    def end_time(self) -> float | None:
        """When the time limit ends the job, seconds since the epoch; None when there is none."""
        text = self.info().get("EndTime", "")
        try:
            return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
        except ValueError:
            return None

    def may_requeue(self, *, wait_s: float) -> bool:
        """Whether a requeue would be right: a batch job that still runs, not one that was cancelled.

        Waits for a controller that does not answer.
        """
        deadline = time.monotonic() + wait_s
        while not (info := self.info()) and time.monotonic() < deadline:
            time.sleep(1.0)
        # SLURM would requeue a cancelled job too, against the will of who cancelled it.
        return (
            info.get("JobState") == "RUNNING" and info.get("BatchFlag") == "1" and info.get("Requeue") != "0"
        )

    def requeue(self, *, without: Sequence[str] = (), wait_s: float) -> str | None:
        """Put the job back into the queue; SLURM then ends this process within seconds.

        Args:
            without: Nodes that the job is not to get again.
            wait_s: How long to try, for example while the controller is being restarted.

        Returns:
            The error when SLURM refused until the end.
        """
        error = _retry(["scontrol", "requeue", self.name], wait_s)
        if error is None and without:
            # Nodes can be excluded once the job counts as pending, which is before this process is ended.
            listed = ",".join(dict.fromkeys([*self._excluded(), *without]))
            error = _retry(["scontrol", "update", f"JobId={self.name}", f"ExcNodeList={listed}"], 10.0)
        return error

    def _excluded(self) -> list[str]:
        listed = self.info().get("ExcNodeList", "(null)")
        return [] if listed == "(null)" else listed.split(",")


def job_is_gone(number: str) -> bool:
    """Whether SLURM knows that a job does not run; False when SLURM does not answer."""
    result = _run(["squeue", "--noheader", f"--jobs={number}", "--format=%T"], timeout_s=3)
    if result.returncode:
        return "Invalid job id" in result.stderr
    return not set(result.stdout.split()) - {"PENDING"}


def have_srun() -> bool:
    """Whether steps can be started from here (not inside most containers)."""
    return shutil.which("srun") is not None


def _retry(command: list[str], wait_s: float) -> str | None:
    deadline = time.monotonic() + wait_s
    while True:
        result = _run(command, timeout_s=20)
        if result.returncode == 0:
            return None
        if time.monotonic() > deadline:
            return _line(result)
        time.sleep(0.3)


def _run(command: list[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a SLURM command; one that hangs or is missing counts as failed."""
    try:
        # A session of its own: a signal to the job's process group must not end it halfway.
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: no answer in {timeout_s:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: {error.strerror}")


def _line(result: subprocess.CompletedProcess[str]) -> str:
    return " ".join((result.stderr or result.stdout).split()) or f"exit code {result.returncode}"
