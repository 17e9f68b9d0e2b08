"""Bits flipped, files cut short and files deleted in a committed checkpoint."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path

from benchmarks.faults.lab import Lab
from benchmarks.faults.ranks import Launch, rank_folder, train_to_end
from benchmarks.faults.report import Trials
from benchmarks.faults.world import read_events
from trainer.checkpoint.io import Checkpointer
from trainer.checkpoint.store import CheckpointError, CheckpointStore
from trainer.config import RunConfig
from trainer.config_io import dump_config
from trainer.main import main

NUM_RANKS = 2
NUM_CASES = 5
"""Cases of each kind of damage to each class of file."""
KINDS = ("bit flip", "truncation", "deletion")
FILE_CLASSES = {
    "tensors": "*.distcp",
    "metadata": ".metadata",
    "summary": "COMMITTED",
    "manifest": "manifest_*.json",
    "run state": "state.json",
    "generators": "rank_*.json",
    "configuration": "config.yaml",
}
STEPS = 16
INTERVAL = 6
OLDER, NEWEST = 12, 16


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Damage one file at a random place."""
    if kind == "bit flip":
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "truncation":
        os.truncate(path, rng.randrange(path.stat().st_size))
    else:
        path.unlink()


def find_fallback(root: Path) -> list[str]:
    """Look for the newest good checkpoint as a run does that starts; returns what is wrong with it."""
    try:
        saved = Checkpointer(CheckpointStore(root)).find_newest()
    except CheckpointError as error:
        return [f"no fallback: {error}"]
    if saved is None:
        return ["started afresh"]
    if saved.checkpoint.step != OLDER:
        return [f"not found: took step {saved.checkpoint.step}, not {OLDER}"]
    reason = root / "quarantine" / f"step_{NEWEST:08d}.reason"
    if not reason.exists() or not reason.read_text().strip():
        return ["no reason in quarantine"]
    return []


def damaged_files(lab: Lab, trials: Trials) -> str:
    """Every kind of damage to every class of file, then real resumes, then nothing good left."""
    rng, folder = lab.generator("damage"), lab.room("damage")
    config = lab.world.config(folder / "run", train__steps=STEPS, checkpoint__every_steps=INTERVAL)
    train_to_end(config, NUM_RANKS)
    for kind, name in itertools.product(KINDS, FILE_CLASSES):
        for number in range(NUM_CASES):
            root = folder / "case"
            shutil.copytree(folder / "run" / "checkpoints", root)
            files = sorted((root / f"step_{NEWEST:08d}").glob(FILE_CLASSES[name]))
            damage(rng.choice(files), kind, rng)
            problems = find_fallback(root)
            trials.add(f"{kind} of {name} {number + 1}", problems, f"fallback to step {OLDER}")
            shutil.rmtree(root)
    for kind in KINDS:
        _resume(lab, trials, config, kind, rng)
    _nothing_good(lab, trials, config, rng)
    return f"0 of {trials.tried} cases missed; {NEWEST - OLDER} steps each (one interval); 0 starts afresh"


def _copy_of_run(lab: Lab, config: RunConfig, name: str) -> RunConfig:
    run_dir = Path(config.run.dir)
    copy = run_dir.with_name(name)
    shutil.copytree(run_dir, copy)
    return lab.world.moved(config, copy)


def _resume(lab: Lab, trials: Trials, config: RunConfig, kind: str, rng: random.Random) -> None:
    """A run whose newest checkpoint is damaged goes on from the older one and logs the same."""
    copy = _copy_of_run(lab, config, f"resumed_{kind.replace(' ', '_')}")
    run_dir = Path(copy.run.dir)
    target = run_dir / "checkpoints" / f"step_{NEWEST:08d}"
    damage(rng.choice(sorted(target.glob("*.distcp"))), kind, rng)
    train_to_end(copy, NUM_RANKS)
    resumed = [event["step"] for event in read_events(run_dir, "resume")]
    problems = [] if resumed == [OLDER] else [f"resumed from {resumed}, not from step {OLDER}"]
    problems += lab.compare(copy, NUM_RANKS)
    trials.check(f"resume after a {kind}", problems, "from the older checkpoint, all logged values equal")


def _nothing_good(lab: Lab, trials: Trials, config: RunConfig, rng: random.Random) -> None:
    """Where no checkpoint is good, the program refuses, and does so again at the next try."""
    copy = _copy_of_run(lab, config, "nothing_good")
    run_dir = Path(copy.run.dir)
    for path in (run_dir / "checkpoints").glob("step_*"):
        damage(rng.choice(sorted(path.glob("*.distcp"))), "truncation", rng)
    records = (run_dir / "metrics.jsonl").read_bytes()
    source = run_dir.with_suffix(".yaml")
    source.write_text(dump_config(copy))
    problems = []
    for attempt in (1, 2):
        with Launch(lambda _: main(["--config", str(source)]), NUM_RANKS, rank_folder(run_dir)) as launch:
            launch.wait(60.0)
            codes = set(launch.results())
        if codes != {2}:
            problems.append(f"try {attempt} ended with {codes}, not 2")
    if (run_dir / "metrics.jsonl").read_bytes() != records:
        problems.append("the records of the run were changed")
    output = (rank_folder(run_dir) / "output_0.txt").read_text()
    if output.count("error: ") != 2 or "no checkpoint is good" not in output:
        problems.append("the refusal does not say why")
    trials.check("nothing good left", problems, "refused twice, records untouched")
