"""One owner per run directory: a lease that is renewed, on any file system that its nodes share.

``RUN/lock/`` holds numbered records; the highest number is the owner. To take over, a contender
creates the next number with O_EXCL, which exactly one can do (NFSv3 and later, Lustre and GPFS
included), so no record is ever removed to make room. Locks of flock(2) and fcntl(2) are not used:
on shared file systems they are often local to a node, and they do not outlive a hang.

Leases compare the clocks of nodes: they must agree to within a fraction of ``lease_s``.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.files import replace_text
from launch.processes import is_alive, read_stat
from launch.records import read_json
from launch.slurm import Job, job_is_gone


class LockedError(RuntimeError):
    """The run directory belongs to another job; the text is one line that names it."""


class LockLostError(RuntimeError):
    """Another job took the run directory over, because this one did not renew its lease in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who owns a run directory, and until when."""

    owner: str
    """Unique name of this ownership."""
    host: str
    pid: int
    started: int
    """Start of the process in clock ticks since boot: tells it from a later one with the same pid."""
    pid_space: str
    """Boot and pid namespace in which ``pid`` means something."""
    job: str
    """SLURM job as ``CLUSTER:ID``; empty outside SLURM."""
    job_restarts: int
    """How often SLURM had requeued the job."""
    acquired: float
    """Seconds since the epoch."""
    expires: float
    """End of the lease, seconds since the epoch."""
    released: bool = False

    def __str__(self) -> str:
        job = f"SLURM job {self.job.partition(':')[2]}, " if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.acquired))
        return f"{job}process {self.pid} on {self.host}, since {since}"


def read_holder(directory: Path) -> tuple[int, Holder | None]:
    """Return the highest number in a lock directory and its record.

    Returns:
        ``(0, None)`` where there never was one; None beside a number whose record is being created.
    """
    number = max(_numbers(directory), default=0)
    value = read_json(_record(directory, number)) if number else None
    try:
        return number, None if value is None else Holder(**value)
    except TypeError:
        return number, None


def why_dead(holder: Holder) -> str | None:
    """Return the proof that a holder does not run any more, None while it may."""
    if holder.released:
        return "released"
    if holder.expires < time.time():
        return "its lease expired"
    if holder.pid_space == _pid_space():
        stat = read_stat(holder.pid)
        if stat is None or stat[2] != holder.started or not is_alive(holder.pid):
            return "its process is gone"
    job = Job.from_environment()
    if holder.job and job is not None:
        if holder.job == job.lock_name:
            return "it is this job before a requeue" if holder.job_restarts < job.restarts else None
        if holder.job.partition(":")[0] == job.cluster and job_is_gone(holder.job.partition(":")[2]):
            return "its job is gone"
    return None


class RunLock:
    """The lease on a run directory.

    Args:
        directory: ``RUN/lock``; created by :meth:`acquire`, and by nothing else.
        lease_s: Seconds that the ownership lasts without renewal.
    """

    def __init__(self, directory: Path, *, lease_s: float = 60.0) -> None:
        self._directory, self._lease_s = directory, lease_s
        self._number = 0
        self._holder: Holder | None = None

    @property
    def owner(self) -> str:
        """Unique name of this ownership."""
        assert self._holder is not None, "acquire comes first"
        return self._holder.owner

    def acquire(self) -> str:
        """Become the owner; writes nothing when there is a live one.

        Returns:
            Why the owner before is not one any more; empty where there was none.

        Raises:
            LockedError: Names the live owner.
        """
        number, before = read_holder(self._directory)
        proof = ""
        if number:
            proof = self._check_takeover(number, before)
        self._directory.mkdir(parents=True, exist_ok=True)
        holder = self._new_holder()
        if not _create(_record(self._directory, number + 1), holder):
            raise LockedError(f"{self._directory.parent}: another job is just starting in it")
        self._number, self._holder = number + 1, holder
        if max(_numbers(self._directory)) > self._number:
            # The number was free only because a slow look had missed later ones.
            raise LockedError(f"{self._directory.parent}: another job is just starting in it")
        self._remove_old()
        return proof

    def renew_if_due(self) -> None:
        """Extend the lease when a sixth of it is over. Call it several times per second.

        Raises:
            LockLostError: Another job is the owner now.
        """
        assert self._holder is not None, "acquire comes first"
        if self._holder.expires - time.time() < 5 / 6 * self._lease_s:
            self.renew()

    def renew(self) -> None:
        """Extend the lease now.

        Raises:
            LockLostError: Another job is the owner now.
        """
        assert self._holder is not None, "acquire comes first"
        number, holder = read_holder(self._directory)
        if number > self._number:
            raise LockLostError(f"{self._directory.parent}: taken over by {holder or 'another job'}")
        self._holder = replace(self._holder, expires=time.time() + self._lease_s)
        self._write(self._holder)

    def release(self) -> None:
        """Give the run directory up; the next job needs no proof."""
        if self._holder is not None and read_holder(self._directory)[0] == self._number:
            self._write(replace(self._holder, released=True))
        self._holder = None

    def _check_takeover(self, number: int, before: Holder | None) -> str:
        run_dir = self._directory.parent
        if before is None:
            age_s = time.time() - _record(self._directory, number).stat().st_mtime
            if age_s < self._lease_s:
                raise LockedError(f"{run_dir}: another job is just starting in it")
            return "its record is damaged and old"
        proof = why_dead(before)
        if proof is None:
            raise LockedError(
                f"{run_dir} is in use by {before}; wait for it, or set another run.dir "
                f"(a dead job's lease ends by itself, this one in {before.expires - time.time():.0f} s)"
            )
        return proof

    def _new_holder(self) -> Holder:
        job, stat = Job.from_environment(), read_stat(os.getpid())
        assert stat is not None
        now = time.time()
        return Holder(
            owner=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=stat[2],
            pid_space=_pid_space(),
            job="" if job is None else job.lock_name,
            job_restarts=0 if job is None else job.restarts,
            acquired=now,
            expires=now + self._lease_s,
        )

    def _write(self, holder: Holder) -> None:
        replace_text(_record(self._directory, self._number), json.dumps(asdict(holder)) + "\n")

    def _remove_old(self) -> None:
        # One record is kept: a contender that saw it as the newest must find the next number taken.
        for number in _numbers(self._directory):
            if number < self._number - 1:
                _record(self._directory, number).unlink(missing_ok=True)


def _numbers(directory: Path) -> list[int]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return [int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdecimal()]


def _record(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.json"


def _create(path: Path, holder: Holder) -> bool:
    """Create a record that must not exist yet; False when another was faster."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(holder)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def _pid_space() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
