"""Every row of the table can fail: the code under trial is sabotaged, and the verdict must say so.

The sabotage reaches the ranks because they are forked from this process.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from benchmarks.faults import damage, disk, gradients, hostile, kills, launcher, reshard, writer
from benchmarks.faults.lab import Lab
from benchmarks.faults.ranks import Launch, train_to_end
from benchmarks.faults.report import Trials
from benchmarks.faults.world import first_difference
from data.storage import LocalStorage
from parallel.engine import FsdpEngine
from trainer.checkpoint.dcp_files import SafeLoadPlanner, SafeReader
from trainer.checkpoint.io import Checkpointer
from trainer.checkpoint.store import CheckpointStore
from trainer.config import RunConfig
from trainer.loop import Loop

dist = pytest.mark.dist


# Kills


@dist
def test_kills_are_survived(lab: Lab, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a row that cannot pass."""
    monkeypatch.setattr(kills, "STEPS", 16)
    assert "0 committed checkpoints" in kills.random_kills(lab, trials)
    assert trials.passed, trials.problems
    assert trials.tried == 1


def finished_run(lab: Lab, name: str) -> RunConfig:
    """A run of 20 steps with checkpoints of steps 8, 16 and 20."""
    config = lab.world.config(lab.room(name) / "run", "ntp", train__steps=20, validation__every_steps=0)
    train_to_end(config, 2)
    return config


@dist
def test_a_fresh_start_and_a_lost_checkpoint_are_noticed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a row that would not see a silent fresh start, or retention that removes too much."""
    config = finished_run(lab, "sabotaged_kills")
    run = kills.KilledRun(config, lab.generator("x"), kills.Tally())
    assert run.check_end(0) == ("after step 20, checkpoint 20", [])
    checkpoints = Path(config.run.dir) / "checkpoints"
    checkpoints.rename(checkpoints.with_name("aside"))
    assert run.check_end(0)[1] == [
        "after step 20 the newest checkpoint is that of step 0",
        "step 20 was reported as saved, the newest checkpoint is 0",
    ]
    checkpoints.with_name("aside").rename(checkpoints)
    monkeypatch.setattr(CheckpointStore, "newest_step", lambda self: None)
    assert run.run_to_end() == ["the launch began with ('start', None), not with ('resume', 20)"]


def test_the_last_bit_of_a_logged_value_counts() -> None:
    """Catches a comparison of losses with a tolerance, and one that overlooks records."""
    good = [{"step": 1, "loss_ntp": 0.1}, {"step": 2, "loss_ntp": 0.3}]
    assert first_difference(good, good) == ""
    off = [good[0], {"step": 2, "loss_ntp": 0.1 + 0.2}]
    assert "step 2: loss_ntp=0.30000000000000004, undisturbed 0.3" in first_difference(off, good)
    assert first_difference(good[:1], good) == "1 records, undisturbed 2"


# Damage


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    checkpointer = Checkpointer(CheckpointStore(tmp_path))
    for step in (damage.OLDER, damage.NEWEST):
        checkpointer.save(step, {"weight": torch.ones(9)}, {"step": step}, config_text="")
    assert all(result.error is None for result in checkpointer.close())
    return tmp_path


def damage_newest(root: Path, lab: Lab) -> None:
    damage.damage(root / f"step_{damage.NEWEST:08d}" / "state.json", "bit flip", lab.generator("x"))


def test_found_damage_is_no_problem(two_checkpoints: Path, lab: Lab) -> None:
    """Catches a row that cannot pass."""
    damage_newest(two_checkpoints, lab)
    assert damage.find_fallback(two_checkpoints) == []


@pytest.mark.parametrize(
    ("method", "substitute", "problem"),
    [
        ("find_problems", lambda *_, **__: [], "not found: took step 16, not 12"),
        ("newest_step", lambda _: None, "started afresh"),
        ("find_problems", lambda *_, **__: ["bad"], "no fallback: "),
    ],
)
def test_missed_damage_is_a_problem(
    two_checkpoints: Path,
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    substitute: Any,
    problem: str,
) -> None:
    """Catches a row that does not look at what was loaded."""
    damage_newest(two_checkpoints, lab)
    monkeypatch.setattr(CheckpointStore, method, substitute)
    (found,) = damage.find_fallback(two_checkpoints)
    assert found.startswith(problem)


@dist
def test_unverified_checkpoints_fail_the_row(
    lab: Lab, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a row whose real resumes prove nothing."""
    monkeypatch.setattr(damage, "NUM_CASES", 0)
    monkeypatch.setattr(damage, "KINDS", ("bit flip",))
    monkeypatch.setattr(CheckpointStore, "find_problems", lambda *_, **__: [])
    damage.damaged_files(lab, trials)
    assert any("resumed from [16], not from step 12" in problem for problem in trials.problems)
    assert any(problem.startswith("nothing good left") for problem in trials.problems)


# Disk


@dist
def test_a_store_that_removes_before_it_has_written_fails(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a row that does not look at the checkpoints before the full disk."""
    original = CheckpointStore.begin

    def remove_first(store: CheckpointStore, step: int) -> Path:
        for old in store.steps():
            shutil.rmtree(store.root / f"step_{old:08d}")
        return original(store, step)

    monkeypatch.setattr(CheckpointStore, "begin", remove_first)
    monkeypatch.setattr(disk, "NUM_FAULTS", 1)
    monkeypatch.setattr(disk, "STEPS", 40)
    config = lab.world.config(lab.room("sabotaged_disk") / "d" / "run", train__steps=disk.STEPS)

    def limit(launch: Launch) -> Any:
        launch.limit_file_size(disk.LIMIT_BYTES)
        return lambda: launch.limit_file_size(-1)

    problems, _ = disk.survive(config, limit)
    assert "no checkpoint is left" in problems


# Gradients, writer, world size


@dist
def test_a_rank_that_updates_alone_fails(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a row that looks at one rank, or at the log alone."""
    original = FsdpEngine.step

    @torch.no_grad()
    def step(engine: FsdpEngine, lr: float) -> torch.Tensor:
        norm = original(engine, lr)
        if engine.mesh.dp_rank == 1:
            next(iter(engine.optimizer.param_groups[0]["params"])).mul_(1.0 + 1e-6)
        return norm

    monkeypatch.setattr(FsdpEngine, "step", step)
    monkeypatch.setattr(gradients, "NUM_RANKS", 2)
    config = lab.world.config(
        lab.room("sabotaged_gradients") / "run",
        "ntp",
        train__steps=gradients.STEPS,
        validation__every_steps=0,
    )
    (problem,) = gradients.poison(config, 0, float("nan"))
    assert problem.startswith("rank 1: all steps but 5 must change the state")


@dist
def test_a_dead_writer_that_nobody_hears_of_fails(
    lab: Lab, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a row that only looks whether the run ends well."""
    monkeypatch.setattr(Loop, "report_saves", lambda *_: None)
    monkeypatch.setattr(writer, "STEPS", 12)
    monkeypatch.setattr(writer, "NUM_RANKS", 1)
    writer.dead_writer(lab, trials)
    assert "was noticed at step None" in trials.problems[0]


@dist
def test_a_state_that_is_not_loaded_fails(lab: Lab, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison of hashes that are always equal."""
    monkeypatch.setattr(reshard, "LAYOUTS", ((2, 1), (1, 1)))
    original = FsdpEngine.load_state_dict

    @torch.no_grad()
    def forget_moments(engine: FsdpEngine, state: Any) -> None:
        original(engine, state)
        for entry in engine.optimizer.state.values():
            entry["exp_avg_sq"].mul_(1.0 + 1e-6)

    monkeypatch.setattr(FsdpEngine, "load_state_dict", forget_moments)
    reshard.other_world_sizes(lab, trials)
    assert trials.problems == ["1 ranks, tp=1: the loaded state is not the saved one"]


# Hostile files


@pytest.mark.parametrize(
    ("owner", "method", "substitute", "place"),
    [
        (SafeReader, "read_metadata", FileSystemReader.read_metadata, ".metadata"),
        (SafeLoadPlanner, "load_bytes", DefaultLoadPlanner.load_bytes, "item"),
    ],
)
def test_an_unrestricted_reader_fails(
    lab: Lab,
    trials: Trials,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    substitute: Any,
    place: str,
) -> None:
    """Catches payloads that would not run even where they may."""
    monkeypatch.setattr(owner, method, substitute)
    hostile.hostile_pickles(lab, trials, lab.room("hostile"))
    executed = {line.split(":")[0] for line in trials.problems if line.endswith("EXECUTED")}
    assert {name.partition(" in ")[2].partition(",")[0] for name in executed} == {place}
    assert len(executed) >= 7


@dist
def test_a_reader_that_extracts_members_fails(
    lab: Lab, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a row that does not see files outside the shard folder."""

    def extract(storage: LocalStorage, *_: Any) -> None:
        (Path(storage.place) / ".." / ".." / "escaped.tokens").touch()
        raise ValueError("extracted")

    monkeypatch.setattr("data.stream.read_chunk", extract)
    hostile.hostile_shards(lab, trials, lab.room("hostile"))
    assert any("wrote a/escaped.tokens" in problem for problem in trials.problems)


# The launcher


@pytest.mark.parametrize("row", [launcher.launcher_signals, launcher.hung_rank, launcher.second_job])
def test_a_launcher_that_does_nothing_fails(
    lab: Lab, trials: Trials, monkeypatch: pytest.MonkeyPatch, row: Any
) -> None:
    """Catches rows that are content with a program that ends at once."""
    monkeypatch.setattr("benchmarks.faults.launcher.sys.executable", "/bin/false")
    row(lab, trials)
    assert not trials.passed
    assert trials.survived == 0
