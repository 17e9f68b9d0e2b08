"""The thread that writes checkpoints in the background dies."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from pathlib import Path

from benchmarks.faults.lab import Lab
from benchmarks.faults.ranks import rank_folder, run_ranks
from benchmarks.faults.report import Trials
from benchmarks.faults.watched import Observer, train_observed
from benchmarks.faults.world import read_events
from parallel.world import World
from trainer.config import RunConfig

NUM_RANKS = 2
STEPS = 60
THREAD_NAME = "checkpoint-writer"


class _Notice(logging.Handler):
    """Notes the step at which the run says that a checkpoint was not written."""

    def __init__(self, observer: Observer) -> None:
        super().__init__(logging.ERROR)
        self._observer = observer
        self.step: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Take the first such message."""
        if self.step is None and "NOT written" in record.getMessage():
            self.step = self._observer.steps


class WriterKiller(Observer):
    """Kills background writers on this rank until the run notices one, and notes when that is."""

    def __init__(self, *args: object, kill: bool) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.death_step: int | None = None
        self.notice = _Notice(self)
        logging.getLogger("trainer.loop").addHandler(self.notice)
        if kill:
            threading.Thread(target=self._hunt, daemon=True).start()

    def _hunt(self) -> None:
        """Raise SystemExit inside each writer, wherever it is; one may get through before that arrives."""
        while self.notice.step is None:
            for writer in threading.enumerate():
                # One that is only being started is not alive yet.
                if writer.name == THREAD_NAME and writer.is_alive():
                    _kill(writer)
                    self.death_step = self.steps
            time.sleep(0.0005)


def _kill(thread: threading.Thread) -> None:
    while thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        )
        time.sleep(0.0005)


def dead_writer(lab: Lab, trials: Trials) -> str:
    """The writer of one rank dies, of each in turn: the run says so at its next step and goes on."""
    folder = lab.room("writer")
    delays: list[int] = []
    for rank in range(NUM_RANKS):
        config = lab.world.config(folder / f"rank_{rank}", train__steps=STEPS)
        problems = _kill_writer(config, rank, delays) + lab.compare(config, NUM_RANKS)
        trials.add(
            f"writer of rank {rank}", problems, "noticed, then synchronous saves, all logged values equal"
        )
    return f"0 steps; 1 save each; noticed {max(delays, default=0)} step later at most"


def _kill_writer(config: RunConfig, victim: int, delays: list[int]) -> list[str]:
    def one_rank(world: World) -> tuple[str, int | None, int | None]:
        outcome, observer = train_observed(
            config, world, lambda parts: WriterKiller(parts, kill=world.rank == victim)
        )
        assert isinstance(observer, WriterKiller)
        return outcome, observer.death_step, observer.notice.step

    run_dir = Path(config.run.dir)
    results = run_ranks(one_rank, NUM_RANKS, rank_folder(run_dir))
    problems = [f"rank {r} ended with {out}" for r, (out, *_) in enumerate(results) if out != "finished"]
    _, died, noticed = results[victim]
    if died is None or noticed is None:
        return [*problems, f"the writer died at step {died}, that was noticed at step {noticed}"]
    delays.append(noticed - died)
    if noticed - died > 1:
        problems.append(f"the writer died in step {died}, but that was noticed in step {noticed} only")
    return problems + _check_saves(run_dir, config)


def _check_saves(run_dir: Path, config: RunConfig) -> list[str]:
    interval, steps = config.checkpoint.every_steps, config.train.steps
    faults = [event["step"] for event in read_events(run_dir, "fault")]
    if len(faults) != 1:
        return [f"alarms for the saves of steps {faults}, not for one"]
    problems = []
    saves = read_events(run_dir, "save")
    wanted = [step for step in (*range(interval, steps, interval), steps) if step not in faults]
    if [event["step"] for event in saves] != wanted:
        problems.append(f"saved steps {[event['step'] for event in saves]}, not {wanted}")
    later = [event for event in saves if event["step"] > faults[0]]
    background = [event["step"] for event in later if event["stall_s"] < event["seconds"]]
    if background:
        problems.append(f"steps {background} were still saved in the background")
    return problems
