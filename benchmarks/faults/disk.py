"""A disk that is full while a checkpoint is saved."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults.lab import Lab
from benchmarks.faults.ranks import Launch, rank_folder, train_rank
from benchmarks.faults.report import Trials
from benchmarks.faults.world import read_events
from trainer.checkpoint.store import CheckpointStore
from trainer.config import RunConfig

NUM_RANKS = 2
STEPS = 120
DISK_BYTES = 8 << 20
LEFT_BYTES = 0
"""Enough for records, too little for a checkpoint."""
LIMIT_BYTES = 100_000
"""Above the records, below a rank's tensors."""
NUM_FAULTS = 2


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[bool]:
    """Mount a small file system on a folder; yields whether that is permitted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
    mounted = (
        shutil.which("mount") is not None
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path) -> Callable[[], None]:
    """Leave hardly any room; returns how to make room again."""
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - LEFT_BYTES)))
    return filler.unlink


def full_disk(lab: Lab, trials: Trials) -> str:
    """On a file system of its own where that is permitted, and with a limit on the size of files."""
    folder = lab.room("disk")
    disk = folder / "small"
    disk.mkdir()
    config = lab.world.config(disk / "run", train__steps=STEPS)
    with small_disk(disk) as mounted:
        if mounted:
            problems, note = survive(config, lambda launch: fill(disk))
            trials.add(f"tmpfs of {DISK_BYTES >> 20} MB", problems + lab.compare(config, NUM_RANKS), note)
    config = lab.world.config(folder / "limited", train__steps=STEPS)

    def limit(launch: Launch) -> Callable[[], None]:
        launch.limit_file_size(LIMIT_BYTES)
        return lambda: launch.limit_file_size(-1)

    problems, note = survive(config, limit)
    trials.add("limit on the size of files", problems + lab.compare(config, NUM_RANKS), note)
    how = (
        f"tmpfs with {LEFT_BYTES >> 10} KB left for records" if mounted else "mounting is not permitted here"
    )
    return f"0 steps; the saves that found no room; 0 checkpoints before them ({how}; RLIMIT_FSIZE)"


def survive(config: RunConfig, make_full: Callable[[Launch], Callable[[], None]]) -> tuple[list[str], str]:
    """Take the room away after the first save, give it back after some faults; problems and a note."""
    run_dir = Path(config.run.dir)
    with Launch(train_rank(config), NUM_RANKS, rank_folder(lab_side(run_dir))) as launch:
        if not _await(launch, lambda: len(read_events(run_dir, "save")) > 0):
            return ["no checkpoint was saved while there was room"], ""
        make_room = make_full(launch)
        faulted = _await(launch, lambda: len(_faults(run_dir)) >= NUM_FAULTS)
        problems = [] if faulted else [f"{len(_faults(run_dir))} alarms in events.jsonl"]
        problems += _damage_so_far(run_dir)
        if launch.alive():
            make_room()
        if not launch.wait(120.0):
            return [*problems, "the run does not end"], ""
        outcomes = {str(result) for result in launch.results()}
    if outcomes != {"finished"}:
        problems.append(f"the run ended with {outcomes}")
    saved = [event["step"] for event in read_events(run_dir, "save")]
    faults = [event["step"] for event in _faults(run_dir)]
    if not saved or saved[-1] != STEPS:
        problems.append(f"no save after there was room again: {saved}")
    return problems, f"no room for the saves of steps {faults}, then saves as before, all logged values equal"


def lab_side(run_dir: Path) -> Path:
    """Where ranks write their output: beside the small disk, not on it."""
    return run_dir.parent.parent / run_dir.name


def _faults(run_dir: Path) -> list[dict[str, int]]:
    return [dict(event) for event in read_events(run_dir, "fault") if event["what"] == "checkpoint"]


def _damage_so_far(run_dir: Path) -> list[str]:
    """What a save without room did to the checkpoints before it."""
    store = CheckpointStore(run_dir / "checkpoints")
    if not store.steps():
        return ["no checkpoint is left"]
    return [f"step {step}: {line}" for step in store.steps() for line in store.find_problems(step)]


def _await(launch: Launch, condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while launch.alive() and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return condition()
