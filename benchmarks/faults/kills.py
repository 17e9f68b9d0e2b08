"""SIGKILL to random ranks at random moments, a part of them while a checkpoint is being written."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.lab import Lab
from benchmarks.faults.ranks import Launch, rank_folder, train_rank
from benchmarks.faults.report import Trials
from benchmarks.faults.world import logged_values, read_events
from trainer.checkpoint.store import CheckpointStore
from trainer.config import RunConfig

NUM_RANKS = 2
STEPS = 60
SHARE_DURING_SAVES = 0.5
SHARE_OF_ALL_RANKS = 0.2
LAUNCH_TIMEOUT_S = 120.0
_POLL_S = 0.002


@dataclass(slots=True)
class Tally:
    """What the kills of all runs cost together."""

    lost_steps: list[int] = field(default_factory=list)
    in_saves: int = 0
    broken_saves: int = 0
    quarantined: int = 0
    runs: int = 0

    def text(self, interval: int) -> str:
        """The cell of the table."""
        beyond = sum(steps > interval for steps in self.lost_steps)
        return (
            f"{sum(self.lost_steps)} steps in all, at most {max(self.lost_steps, default=0)} by one kill: "
            f"the interval of {interval} and, for {beyond} kills that broke a save, the steps made while it "
            f"was written; {self.in_saves} kills hit a save and broke {self.broken_saves}; "
            f"{self.quarantined} committed checkpoints; 0 starts afresh in {self.runs} runs"
        )


class KilledRun:
    """One run that is killed again and again.

    Args:
        config: the run.
        rng: when and whom.
        tally: shared with the other runs.
    """

    def __init__(self, config: RunConfig, rng: random.Random, tally: Tally) -> None:
        self.config, self.tally = config, tally
        self.finished = False
        self._rng = rng
        self._run_dir = Path(config.run.dir)
        self._store = CheckpointStore(self._run_dir / "checkpoints")
        self._interval = config.checkpoint.every_steps
        self._launch_s = 3.0

    def kill_once(self) -> tuple[str, list[str]] | None:
        """Launch, kill, and look at what is left.

        Returns:
            What was done and what was wrong; None when the run ended before the kill.
        """
        committed, num_events = self._newest(), len(read_events(self._run_dir))
        leftovers = self._unfinished()
        during_save = self._rng.random() < SHARE_DURING_SAVES
        victims = self._choose_victims()
        with Launch(train_rank(self.config), NUM_RANKS, rank_folder(self._run_dir)) as launch:
            killed = self._wait(launch, leftovers, during_save) and launch.signal(signal.SIGKILL, *victims)
            hit = self._unfinished() - leftovers
            if not killed:  # one rank has ended by itself: the others are about to
                launch.wait(LAUNCH_TIMEOUT_S)
                self.finished = True
                launch.results()
                return None
            launch.end()
        problems = self.check_start(committed, num_events)
        what, more = self.check_end(num_events)
        self.tally.in_saves += bool(hit)
        self.tally.broken_saves += any(_step_of(name) not in self._store.steps() for name in hit)
        who = "all ranks" if len(victims) == NUM_RANKS else f"rank {victims[0]}"
        return f"{who} {'in a save' if hit else 'between saves'}, {what}", problems + more

    def run_to_end(self) -> list[str]:
        """Let the run finish; returns what was wrong with its start."""
        committed, num_events = self._newest(), len(read_events(self._run_dir))
        with Launch(train_rank(self.config), NUM_RANKS, rank_folder(self._run_dir)) as launch:
            if not launch.wait(LAUNCH_TIMEOUT_S):
                return [f"ranks {launch.alive()} still ran after {LAUNCH_TIMEOUT_S:g} s"]
            launch.results()
        self.finished = True
        return self.check_start(committed, num_events)

    def _choose_victims(self) -> list[int]:
        if self._rng.random() < SHARE_OF_ALL_RANKS:
            return list(range(NUM_RANKS))
        return [self._rng.randrange(NUM_RANKS)]

    def _wait(self, launch: Launch, leftovers: set[str], during_save: bool) -> bool:
        """Wait for the moment; False when the ranks ended before it."""
        if during_save:
            if not _wait_until(launch, lambda: bool(self._unfinished() - leftovers)):
                return False
            seconds = [event["seconds"] for event in read_events(self._run_dir, "save")[-5:]]
            delay = self._rng.uniform(0.0, sorted(seconds)[len(seconds) // 2] if seconds else 0.2)
        else:
            delay = self._rng.uniform(0.0, self._launch_s)
        until = time.monotonic() + delay
        return _wait_until(launch, lambda: time.monotonic() > until)

    def _newest(self) -> int:
        return max(self._store.steps(), default=0)

    def _unfinished(self) -> set[str]:
        return {path.name for path in self._store.root.glob(".tmp-step_*")}

    def check_start(self, committed: int, num_events: int) -> list[str]:
        """The launch must have gone on from the newest checkpoint that there was."""
        starts = [e for e in read_events(self._run_dir)[num_events:] if e["kind"] in ("start", "resume")]
        if not starts:  # killed before
            return []
        wanted = ("resume", committed) if committed else ("start", None)
        found = (starts[0]["kind"], starts[0].get("step"))
        return [] if found == wanted else [f"the launch began with {found}, not with {wanted}"]

    def check_end(self, num_events: int) -> tuple[str, list[str]]:
        """What is lost, and whether it may be."""
        newest, records = self._newest(), logged_values(self._run_dir)
        worked = any(e["kind"] in ("start", "resume") for e in read_events(self._run_dir)[num_events:])
        # A record is written when the step after it is done.
        done = min(records[-1]["step"] + 1, self.config.train.steps) if worked and records else newest
        lost = max(0, done - newest)
        self.tally.lost_steps.append(lost)
        bad = list(self._store.quarantine_root.glob("step_????????"))
        self.tally.quarantined += len(bad)
        problems = [f"{path.name} was found damaged" for path in bad]
        # A save is under way until the next one begins, which waits for it: two intervals at most.
        oldest = max(0, (done - 1) // self._interval - 1) * self._interval
        if newest < oldest:
            problems.append(f"after step {done} the newest checkpoint is that of step {newest}")
        reported = max((event["step"] for event in read_events(self._run_dir, "save")), default=0)
        if newest < reported:
            problems.append(f"step {reported} was reported as saved, the newest checkpoint is {newest}")
        return f"after step {done}, checkpoint {newest}", problems


def _wait_until(launch: Launch, condition: Callable[[], bool]) -> bool:
    """Wait for a condition while all ranks run; False when one has ended, or nothing happens."""
    deadline = time.monotonic() + LAUNCH_TIMEOUT_S
    while len(launch.alive()) == NUM_RANKS and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(_POLL_S)
    return False


def _step_of(unfinished: str) -> int:
    """Step of a hidden directory ``.tmp-step_00000008-<hex>``."""
    return int(unfinished.split("-")[1].removeprefix("step_"))


def random_kills(lab: Lab, trials: Trials) -> str:
    """Kill until there were enough kills; every run that is finished must have logged the right losses."""
    rng, tally = lab.generator("kills"), Tally()
    folder = lab.room("kills")

    def enough() -> bool:
        # Few kills may miss the saves by chance; a few more then settle it.
        hits = tally.in_saves >= lab.kills // 5 or trials.tried >= 2 * lab.kills
        return trials.tried >= lab.kills and hits

    while not enough():
        tally.runs += 1
        run = KilledRun(lab.world.config(folder / f"run_{tally.runs}", train__steps=STEPS), rng, tally)
        while not enough() and not run.finished:
            outcome = run.kill_once()
            if outcome is not None:
                what, problems = outcome
                trials.add(f"kill {trials.tried + 1}", problems, what)
        problems = [] if run.finished else run.run_to_end()
        problems += lab.compare(run.config, NUM_RANKS)
        trials.check(f"run {tally.runs} to its end", problems, "all logged values equal")
    if tally.in_saves < lab.kills // 5:
        trials.check("kills in saves", [f"only {tally.in_saves} of {lab.kills} hit one: this proves little"])
    return tally.text(run.config.checkpoint.every_steps)
