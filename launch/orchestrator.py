"""``python -m launch.orchestrator --config configs/X.yaml [--nproc_per_node N] [--section.key=value ...]``.

Carries one run to its end: checks everything first, starts the ranks on every node of a SLURM job or on
this machine, restarts them after crashes and hangs, saves and requeues the job when its time is over.
``python -m launch.orchestrator status RUN`` says how a run is doing.

Exit codes: 0 finished; 1 given up after failures without progress; 2 refused (one line says why);
75 stopped after saving: the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from data.cli import EXIT_BAD_INPUT, run_cli
from launch.lock import LockedError, LockLostError, RunLock
from launch.processes import adopt_orphans, kill_descendants
from launch.records import History, RunFiles, Status, read_status
from launch.slurm import Job
from launch.status import print_status
from launch.watchdog import Silence, StackCollection, Watchdog
from launch.workers import Group, Place, find_place
from trainer.checkpoint.store import CheckpointStore
from trainer.config import RunConfig
from trainer.config_io import load_config

EXIT_GAVE_UP = 1
EXIT_STOPPED = 75
_POLL_S = 0.2
_STACKS_S = 3.0
_TORN_GRACE_S = 30.0
_SLURM_WAIT_S = 300.0
_NODE_MEMORY_S = 24 * 3600.0
_FAILURES_PER_NODE = 2
_TAIL_LINES = 25

Preflight = Literal["full", "quick", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a run is carried; nothing of it changes what is trained."""

    max_restarts_without_progress: int
    """Restarts in a row without a new checkpoint, after which the run is given up."""
    heartbeat_timeout_s: float
    """Silence after which a rank counts as hung."""
    startup_timeout_s: float
    """The same before its first step."""
    restart_delay_s: float
    """Wait before a restart; doubled with each one in a row."""
    preflight: Preflight
    """``quick`` leaves out the all-reduce between the ranks."""

    def __post_init__(self) -> None:
        if self.max_restarts_without_progress < 0:
            raise ValueError(
                f"--max_restarts_without_progress {self.max_restarts_without_progress} must be at least 0"
            )
        for name in ("heartbeat_timeout_s", "startup_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be above 0")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a launch ended."""

    kind: Literal["finished", "stopped", "crash", "hang", "refused"]
    step: int
    """Last step that is known to have been done."""
    rank: int | None = None
    host: str | None = None
    """Node that failed first, where that can be told."""
    error: str = ""
    """One line about a failure."""
    details: str = ""
    """What the failing rank said last."""


class Orchestrator:
    """Carries one run.

    Args:
        command: Module and arguments that every rank runs.
        config: The run.
        place: Where it runs.
        options: How it is carried.
    """

    def __init__(self, command: Sequence[str], config: RunConfig, place: Place, options: Options) -> None:
        self._command, self._config, self._place, self._options = list(command), config, place, options
        self._files = RunFiles(Path(config.run.dir))
        self._history = History(self._files.history)
        self._store = CheckpointStore(self._files.checkpoints, keep_last=config.checkpoint.keep_last)
        self._lock = RunLock(self._files.lock)
        self._stop_signal: str | None = None
        self._checked = False

    def run(self) -> int:
        """Own the run directory until the run has finished, stopped or failed; returns the exit code.

        Raises:
            LockedError: Another job owns it.
            LockLostError: Another job took it over; the ranks are dead.
        """
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        before = self._lock.acquire()
        try:
            self._history.add("lock", before=before, host=self._place.hosts[0], job=self._job_name())
            return self._carry()
        finally:
            self._lock.release()

    def _carry(self) -> int:
        status = read_status(self._files)
        if status is not None and status.state == "finished" and status.step >= self._config.train.steps:
            print(f"{self._files.root} has finished already, at step {status.step}")
            return 0
        while not self._stop_signal:
            ending = self._attempt()
            if ending.kind == "refused":
                return EXIT_BAD_INPUT
            if ending.kind == "finished":
                self._history.add("finish", step=ending.step)
                return 0
            if ending.kind == "stopped":
                return self._leave(ending)
            self._note_failure(ending)
            if self._must_give_up():
                return self._give_up(ending)
            if self._exclude(ending.host):
                return EXIT_STOPPED
            self._wait_before_restart()
        return self._leave(None)

    # One launch

    def _attempt(self) -> Ending:
        """Launch; before the first launch of this process, check everything."""
        if self._checked or self._options.preflight == "off":
            return self._launch()
        if self._run_preflight():
            if self._stop_signal:
                return Ending("stopped", self._checkpoint())
            # A run that worked before meets a bad node here, not bad input: that may pass.
            kind: Literal["crash", "refused"] = "crash" if self._history.num_launches() else "refused"
            return Ending(kind, self._checkpoint(), error="the checks before the launch failed, see above")
        self._checked = True
        return self._launch()

    def _launch(self) -> Ending:
        """Start the ranks and stay with them; none is left when this returns or raises."""
        number = self._history.num_launches() + 1
        before = read_status(self._files)
        watchdog = Watchdog(
            self._files,
            self._place.world_size,
            timeout_s=self._options.heartbeat_timeout_s,
            startup_timeout_s=self._options.startup_timeout_s,
        )
        self._history.add(
            "launch",
            number=number,
            checkpoint=self._checkpoint(),
            hosts=list(self._place.hosts),
            world_size=self._place.world_size,
        )
        group = Group(
            self._place,
            self._command,
            run_dir=self._files.root,
            launch_dir=self._files.launch(number),
            port=self._place.port(number),
            owner=self._lock.owner,
            environment=self._worker_environment(),
        )
        try:
            silence = self._supervise(group, watchdog)
            self._lock.renew()  # agents kill the ranks of a run that was taken over: no failure of its own
            if silence is not None:
                return self._end_hang(group, watchdog, silence, number)
            group.kill()
            return self._judge(group, watchdog, before, number)
        finally:
            group.kill()

    def _supervise(self, group: Group, watchdog: Watchdog) -> Silence | None:
        """Return when all ranks have ended, or have to be ended: with the silence when they hang."""
        asked_to_stop = False
        while group.exit_code() is None:
            self._lock.renew_if_due()
            if self._stop_signal and not asked_to_stop:
                asked_to_stop = True
                group.request_stop()
                self._history.add("signal", name=self._stop_signal, step=watchdog.last_step)
            silence = watchdog.check()
            if silence is not None or group.is_torn(grace_s=_TORN_GRACE_S):
                return silence
            time.sleep(_POLL_S)
        watchdog.check()
        return None

    def _end_hang(self, group: Group, watchdog: Watchdog, silence: Silence, number: int) -> Ending:
        """Collect the stacks of a hung launch and kill it."""
        stacks = StackCollection(self._files, self._place.world_size)
        group.request_stacks()
        written = stacks.wait(_STACKS_S)
        kept = self._files.launch(number) / "stacks"
        stacks.keep(kept)
        group.kill()
        error = (
            f"ranks {', '.join(map(str, silence.suspects))} hang at step {watchdog.last_step}: "
            f"no sign of life for {silence.seconds:.0f} s; stacks are in {kept}"
        )
        self._history.add(
            "hang",
            launch=number,
            ranks=list(silence.ranks),
            suspects=list(silence.suspects),
            silent_s=round(silence.seconds, 1),
            stacks=str(kept),
            stacks_of=written,
        )
        return Ending("hang", watchdog.last_step, silence.suspects[0], silence.host(), error)

    def _judge(self, group: Group, watchdog: Watchdog, before: Status | None, number: int) -> Ending:
        """Say how a launch ended whose ranks are gone."""
        status = read_status(self._files)
        if status is not None and (before is None or status.time != before.time):
            if status.state == "finished":
                return Ending("finished", status.step)
            if status.state == "stopped":
                return Ending("stopped", status.step)
        if self._stop_signal:  # before there was anything to save
            return Ending("stopped", max(watchdog.last_step, 0))
        rank, host = group.first_failure()
        error, details = self._last_words(group, rank, host, number)
        return Ending("crash", watchdog.last_step, rank, host, error, details)

    def _last_words(self, group: Group, rank: int | None, host: str | None, number: int) -> tuple[str, str]:
        """Return one line about a crash and the end of the failing rank's output."""
        who = f"rank {rank} on {host}" if rank is not None else f"node {host}" if host else "the launch"
        log = find_log(self._files.launch(number), rank, self._place.nproc_per_node)
        lines = [] if log is None else log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        if not lines:
            return f"{who} ended without a word (exit code {group.exit_code()})", ""
        details = "\n".join([f"--- the end of {log}", *lines[-_TAIL_LINES:]])
        return f"{who} failed: {lines[-1].strip()}", details

    # Between launches

    def _note_failure(self, ending: Ending) -> None:
        checkpoint = self._checkpoint()
        self._history.add(
            "failure",
            what=ending.kind,
            rank=ending.rank,
            host=ending.host,
            step=ending.step,
            checkpoint=checkpoint,
            lost_steps=max(0, ending.step - checkpoint),
            error=ending.error,
        )

    def _must_give_up(self) -> bool:
        count = self._history.failures_without_progress(self._checkpoint())
        return count > self._options.max_restarts_without_progress

    def _give_up(self, ending: Ending) -> int:
        """Put the last error where it is seen first: alone on stderr, and last in the output."""
        self._history.add("give_up", error=ending.error)
        print(
            f"error: {ending.error}\n"
            f"gave up after {self._options.max_restarts_without_progress} restarts without a new checkpoint "
            f"(the last one is of step {self._checkpoint()}) in {self._files.root}\n{ending.details}",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_GAVE_UP

    def _wait_before_restart(self) -> None:
        count = self._history.failures_without_progress(self._checkpoint())
        delay_s = min(self._options.restart_delay_s * 2 ** (count - 1), 300.0)
        self._history.add("restart", count=count, delay_s=delay_s, checkpoint=self._checkpoint())
        until = time.monotonic() + delay_s
        while time.monotonic() < until and not self._stop_signal:
            self._lock.renew_if_due()
            time.sleep(_POLL_S)

    def _exclude(self, host: str | None) -> bool:
        """Requeue the job without a node that failed twice; True when SLURM is about to end this process."""
        job = self._place.job
        if job is None or host is None:
            return False
        if self._history.failures_of(host, within_s=_NODE_MEMORY_S) < _FAILURES_PER_NODE:
            return False
        self._history.add("exclude", host=host)
        return self._requeue(job, without=[host])

    def _leave(self, ending: Ending | None) -> int:
        """End before the last step; inside SLURM the job is queued again to go on."""
        step = self._checkpoint() if ending is None else ending.step
        self._history.add("stop", step=step, signal=self._stop_signal)
        if self._place.job is not None and self._stop_signal != "SIGINT":
            self._requeue(self._place.job)
        return EXIT_STOPPED

    def _requeue(self, job: Job, without: Sequence[str] = ()) -> bool:
        if not job.may_requeue(wait_s=_SLURM_WAIT_S):
            return False
        self._history.add("requeue", job=job.name, without=list(without))
        self._stop_signal = None
        error = job.requeue(without=without, wait_s=_SLURM_WAIT_S)
        if error is not None:
            self._history.add("requeue_refused", job=job.name, error=error)
            return False
        self._lock.release()
        until = time.monotonic() + _SLURM_WAIT_S
        while not self._stop_signal and time.monotonic() < until:
            time.sleep(_POLL_S)  # SLURM's SIGTERM is on its way; the batch script must not end before it
        return True

    def _run_preflight(self) -> int:
        """Check everything in a process of its own, which may load torch; returns its exit code."""
        command = [
            *(sys.executable, "-m", "launch.preflight"),
            *([] if self._options.preflight == "full" else ["--quick"]),
            f"--nproc_per_node={self._place.nproc_per_node}",
            *self._command[1:],
        ]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and not self._stop_signal:
            self._lock.renew_if_due()
            time.sleep(_POLL_S)
        kill_descendants(os.getpid())
        code = process.wait()
        if code:
            self._history.add("preflight_failed", exit_code=code)
        return code

    # Small things

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._stop_signal == "SIGINT":
            raise KeyboardInterrupt  # somebody at a terminal does not want to wait for the save
        self._stop_signal = signal.Signals(number).name

    def _checkpoint(self) -> int:
        """Step of the newest committed checkpoint, 0 without one."""
        return max(self._store.steps(), default=0)

    def _job_name(self) -> str | None:
        return None if self._place.job is None else self._place.job.name

    def _worker_environment(self) -> dict[str, str]:
        """Tell the trainer when the job ends, which SLURM itself does from version 23.11 on only."""
        if self._place.job is None or "SLURM_JOB_END_TIME" in os.environ:
            return {}
        end = self._place.job.end_time()
        return {} if end is None else {"SLURM_JOB_END_TIME": str(int(end))}


def find_log(launch_dir: Path, rank: int | None, nproc_per_node: int) -> Path | None:
    """Return the error output of a rank; where it is mute or unknown, of the rank that complained first."""
    if rank is not None:
        node, local_rank = divmod(rank, nproc_per_node)
        for path in launch_dir.glob(f"node_{node}/*/attempt_0/{local_rank}/stderr.log"):
            if path.stat().st_size:
                return path
    found = [path for path in launch_dir.glob("node_*/*/attempt_0/*/stderr.log") if path.stat().st_size]
    return min(found, key=lambda path: path.stat().st_mtime, default=None)


def expand_task(overrides: Sequence[str], task: str, config: Path) -> list[str]:
    """Give a task of a job array its own arguments and its own run directory.

    ``{task}`` in an override becomes the task's number. Where no override of ``run.dir`` has it,
    ``_task_N`` is put behind the directory.

    Args:
        overrides: ``--section.key=value`` arguments.
        task: Number of the task; empty outside arrays.
        config: YAML file.
    """
    if not task:
        return list(overrides)
    expanded = [text.replace("{task}", task) for text in overrides]
    if re.search(r"--run\.dir[= ]\S*\{task\}", " ".join(overrides)):
        return expanded
    run_dir = load_config(RunConfig, config, expanded).run.dir
    return [*expanded, f"--run.dir={run_dir}_task_{task}"]


def carry(args: argparse.Namespace) -> int:
    """Carry the run that the command line describes; returns the exit code."""
    job = Job.from_environment()
    overrides = expand_task(args.overrides, "" if job is None else job.array_task, args.config)
    config = load_config(RunConfig, args.config, overrides)
    options = Options(
        max_restarts_without_progress=args.max_restarts_without_progress,
        heartbeat_timeout_s=args.heartbeat_timeout_s,
        startup_timeout_s=args.startup_timeout_s,
        restart_delay_s=args.restart_delay_s,
        preflight=args.preflight,
    )
    command = ["trainer.main", f"--config={args.config}", *overrides]
    return Orchestrator(command, config, find_place(args.nproc_per_node), options).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["status"]:
        parser = argparse.ArgumentParser(prog="python -m launch.orchestrator status", allow_abbrev=False)
        parser.add_argument("run", type=Path, help="run directory")
        return run_cli(lambda args: print_status(args.run), parser, arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m launch.orchestrator",
        description="Carry a run to its end; any key can be overridden: --train.steps=100",
        epilog="python -m launch.orchestrator status RUN says how a run is doing",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
    parser.add_argument("--nproc_per_node", type=int, help="ranks per node; one per GPU by default")
    parser.add_argument("--max_restarts_without_progress", type=int, default=3)
    parser.add_argument("--heartbeat_timeout_s", type=float, default=600.0)
    parser.add_argument("--startup_timeout_s", type=float, default=1800.0)
    parser.add_argument("--restart_delay_s", type=float, default=5.0)
    parser.add_argument("--preflight", choices=("full", "quick", "off"), default="full")
    return run_cli(carry, parser, arguments, errors=(LockedError, LockLostError), overrides=True)


if __name__ == "__main__":
    sys.exit(main())
