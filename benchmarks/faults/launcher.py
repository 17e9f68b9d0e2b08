"""Faults that the launcher answers: signals to it, a rank that hangs, a second job in the run directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.faults.lab import Lab
from benchmarks.faults.ranks import train_to_end
from benchmarks.faults.report import Trials
from benchmarks.faults.world import logged_values, read_events
from data.cli import EXIT_BAD_INPUT
from launch.processes import environment, signal_at_parent_death
from launch.records import History, RunFiles
from trainer.checkpoint.store import CheckpointStore
from trainer.config import RunConfig
from trainer.config_io import dump_config
from trainer.main import EXIT_STOPPED

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2
STEPS = 200
INTERVAL = 20
START_TIMEOUT_S = 120.0
REFUSAL_S = 5.0
SILENCE_S = 10.0
FOUND_WITHIN_S = 5.0
"""After the heartbeat's timeout."""


class Job:
    """One ``python -m launch.orchestrator``, as a user starts it; a context manager, leaves nothing behind.

    Args:
        config: the run; a file beside the run directory is what the launcher reads, each job one of its own.
        arguments: further ones.
    """

    def __init__(self, config: RunConfig, *arguments: str) -> None:
        self.config, self.run_dir = config, Path(config.run.dir)
        self.source = self.run_dir.with_suffix(f".{time.monotonic_ns()}.yaml")
        self.source.write_text(dump_config(config))
        command = [
            *(sys.executable, "-m", "launch.orchestrator", "--config", str(self.source)),
            *("--nproc_per_node", str(NUM_RANKS), "--restart_delay_s", "0", "--preflight", "off"),
            *arguments,
        ]
        self.started = time.monotonic()
        self._output = self.source.with_suffix(".txt")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=partial(signal_at_parent_death, signal.SIGTERM),
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def output(self) -> str:
        """Everything it printed."""
        return self._output.read_text(errors="replace")

    def processes(self) -> list[int]:
        """All processes that name this job's configuration, whoever is their parent now."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if str(self.source).encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def rank(self, number: int) -> int:
        """The process of a rank.

        Raises:
            LookupError: there is none.
        """
        for pid in self.processes():
            if environment(pid).get("RANK") == str(number):
                return pid
        raise LookupError(f"rank {number} of {self.run_dir.name} is not there")

    def step(self) -> int:
        """Newest step that is logged."""
        records = logged_values(self.run_dir)
        return int(records[-1]["step"]) if records else 0

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> bool:
        """Wait while the launcher runs; False when it has ended or the time is over."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return condition()
            time.sleep(0.01)
        return True

    def end(self, timeout_s: float) -> int | None:
        """Its exit code; None when it does not end in time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None


def _config(lab: Lab, run_dir: Path, *, every_steps: int = INTERVAL) -> RunConfig:
    return lab.world.config(
        run_dir, "ntp", train__steps=STEPS, validation__every_steps=0, checkpoint__every_steps=every_steps
    )


# A signal to the launcher


def launcher_signals(lab: Lab, trials: Trials) -> str:
    """SIGTERM and SIGUSR1: everything is saved, nobody is left, and the run goes on from that very step."""
    rng, folder = lab.generator("signals"), lab.room("signals")
    seconds: list[float] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        # Without a regular save, so that what is not lost was saved because of the signal.
        config = _config(lab, folder / number.name.lower(), every_steps=0)
        with Job(config) as job:
            problems = _signal(job, number, rng.randint(5, STEPS // 2), seconds)
        step = job.step()
        if not problems:
            train_to_end(config, NUM_RANKS)
            resumed = [event["step"] for event in read_events(job.run_dir, "resume")]
            if resumed != [step]:
                problems.append(f"the next start resumed from {resumed}, not from step {step}")
            problems += lab.compare(config, NUM_RANKS)
        trials.add(number.name, problems, f"stopped at step {step}, went on from it, all logged values equal")
    return f"0 steps; 0 orphans; at most {max(seconds, default=0):.1f} s from the signal to the end"


def _signal(job: Job, number: signal.Signals, step: int, seconds: list[float]) -> list[str]:
    if not job.wait_for(lambda: job.step() >= step):
        return [f"the run did not reach step {step}: {_last_line(job.output)}"]
    job.process.send_signal(number)
    sent = time.monotonic()
    code = job.end(60.0)
    seconds.append(time.monotonic() - sent)
    problems = [] if code == EXIT_STOPPED else [f"exit code {code}, not {EXIT_STOPPED}"]
    if orphans := job.processes():
        problems.append(f"{len(orphans)} orphans")
    last = job.step()
    status = json.loads((job.run_dir / "status.json").read_text())
    if (status["state"], status["step"]) != ("stopped", last):
        problems.append(
            f"status.json says {status['state']} at step {status['step']}, the log ends at {last}"
        )
    saved = CheckpointStore(job.run_dir / "checkpoints").steps()
    if saved != [last]:
        problems.append(f"checkpoints {saved}, but the log ends at step {last}")
    return problems


# A rank that hangs


def hung_rank(lab: Lab, trials: Trials) -> str:
    """SIGSTOP to one rank: found in time, stacks written, restarted, and the losses are the same."""
    rng, folder = lab.generator("hang"), lab.room("hang")
    rank = rng.randrange(NUM_RANKS)
    config = _config(lab, folder / "run")
    with Job(config, "--heartbeat_timeout_s", str(SILENCE_S)) as job:
        problems, seconds = _stop_rank(job, rank)
        if not problems:
            code = job.end(180.0)
            problems += [] if code == 0 else [f"exit code {code}: {_last_line(job.output)}"]
        if orphans := job.processes():
            problems.append(f"{len(orphans)} orphans")
    failures = [event for event in _history(job).events() if event["kind"] == "failure"]
    lost = [int(event["lost_steps"]) for event in failures]
    if max(lost, default=0) > 2 * INTERVAL:
        problems.append(f"lost {lost} steps")
    if not problems:
        problems = lab.compare(config, NUM_RANKS)
    trials.add(f"SIGSTOP of rank {rank}", problems, "found, stacks of all ranks, all logged values equal")
    return (
        f"{sum(lost)} steps (interval {INTERVAL}); found, stacks included, {seconds:.1f} s after the stop "
        f"(timeout {SILENCE_S:g} s + at most {FOUND_WITHIN_S:g} s); 0 orphans; {len(lost) - 1} false alarms"
    )


def _stop_rank(job: Job, rank: int) -> tuple[list[str], float]:
    if not job.wait_for(lambda: job.step() >= INTERVAL + INTERVAL // 2):
        return [f"the run did not get under way: {_last_line(job.output)}"], 0.0
    pid = job.rank(rank)
    os.kill(pid, signal.SIGSTOP)
    stopped = time.time()

    def hangs() -> list[dict[str, object]]:
        return [e for e in _history(job).events() if e["kind"] == "hang" and e["time"] > stopped]

    if not job.wait_for(lambda: bool(hangs()), SILENCE_S + 60.0):
        return ["the hang was not found"], 0.0
    (hang,) = hangs()
    seconds = float(str(hang["time"])) - stopped
    problems = []
    # Stacks are collected between finding and noting it.
    if seconds > SILENCE_S + FOUND_WITHIN_S:
        problems.append(f"found after {seconds:.1f} s")
    for number in range(NUM_RANKS):
        path = Path(str(hang["stacks"])) / f"stacks_rank_{number}.txt"
        if not path.exists() or "File " not in path.read_text():
            problems.append(f"no stack of rank {number}")
    return problems, seconds


# Two jobs


def second_job(lab: Lab, trials: Trials) -> str:
    """Two jobs start at once in one run directory, and a third one later: one of them runs."""
    folder = lab.room("two_jobs")
    config = _config(lab, folder / "run")
    with Job(config) as first, Job(config) as second:
        while first.process.poll() is None and second.process.poll() is None:
            if max(time.monotonic() - job.started for job in (first, second)) > START_TIMEOUT_S:
                break
            time.sleep(0.005)
        winner, loser = (first, second) if first.process.poll() is None else (second, first)
        race_s = time.monotonic() - loser.started
        trials.add("two started at once", _refusal(loser, race_s), f"one refused after {race_s:.1f} s")
        reached = winner.wait_for(lambda: winner.step() >= INTERVAL)
        problems = [] if reached else [f"the owner did not get under way: {_last_line(winner.output)}"]
        third_problems, seconds = _start_beside(winner)
        trials.add("one beside a running one", problems + third_problems, f"refused after {seconds:.1f} s")
        code = winner.end(120.0)
        problems = [] if code == 0 else [f"the owner's exit code is {code}"]
        if orphans := winner.processes():
            problems.append(f"{len(orphans)} orphans")
    if not problems:
        problems = lab.compare(config, NUM_RANKS)
    trials.check("the owner", problems, "finished, all logged values equal")
    return f"0 files changed; refused after {max(race_s, seconds):.1f} s at most"


def _start_beside(owner: Job) -> tuple[list[str], float]:
    """Start a job while every process of the owner is frozen: any change is the new job's."""
    frozen = owner.processes()
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(0.1)
        before = _snapshot(owner.run_dir)
        with Job(owner.config) as job:
            job.end(60.0)
            seconds = time.monotonic() - job.started
            problems = _refusal(job, seconds)
        after = _snapshot(owner.run_dir)
    finally:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if changed:
        problems.append(f"wrote {', '.join(changed)}")
    return problems, seconds


def _refusal(job: Job, seconds: float) -> list[str]:
    code = job.process.poll()
    problems = [] if code == EXIT_BAD_INPUT else [f"exit code {code}, not {EXIT_BAD_INPUT}"]
    lines = job.output.splitlines()
    if len(lines) != 1 or not lines[0].startswith("error: "):
        problems.append(f"no refusal in one line: {_last_line(job.output)}")
    if seconds > REFUSAL_S:
        problems.append(f"refused after {seconds:.1f} s, at most {REFUSAL_S:g} s may pass")
    return problems


def _snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of the last change and hash of every file, by path."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in folder.rglob("*")
    }


def _history(job: Job) -> History:
    return History(RunFiles(job.run_dir).history)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
