"""Rows of damaged chunks in real runs: left out of the loss, counted exactly, or the end of the run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from data.batch import Batch, Damage, DamagedRow
from data.manifest import TAR_BLOCK, read_manifest
from data.order import WindowOrder
from data.source import windows_per_chunk
from parallel.world import World
from tests.ranks import RankError, run_ranks
from tests.trainer.model.tiny import randomize
from tests.trainer.test_run import StopAfter, losses, train_on_ranks
from tests.trainer.tiny_run import tiny_config
from trainer.build import build_parts
from trainer.concepts.extractor import TargetExtractor
from trainer.concepts.sae_training import SaeLearner, init_sae_parameter
from trainer.concepts.states import DistributionExtractor, StateExtractor
from trainer.config import KdConfig, RunConfig, SaeConfig
from trainer.main import train
from trainer.metrics.json_lines import read_json_lines
from trainer.model.formats import load_model
from trainer.model.gpt2 import GPT2
from trainer.model.student import build_student
from trainer.objective import CoCoMixLoss, DistillationLoss, NextToken, Objective, RegressionLoss, SaeLoss

CPU = torch.device("cpu")
ROWS = 6
STEPS = 12
BAD_CHUNK = 15
BAD_VALIDATION_CHUNK = 1


def student(config: RunConfig) -> GPT2:
    assert config.model is not None
    model = build_student(config.model, config.insertion)
    randomize(model, seed=0)
    return model


def next_token(world: Path) -> tuple[nn.Module, Objective]:
    return student(tiny_config(world, world, "ntp")), NextToken()


def single_documents(world: Path) -> tuple[nn.Module, Objective]:
    return student(tiny_config(world, world, "ntp")), NextToken(document_end=7)


def cocomix(world: Path) -> tuple[nn.Module, Objective]:
    config = tiny_config(world, world)
    assert config.concepts is not None
    extractor = TargetExtractor.load(config.concepts, CPU)
    return student(config), CoCoMixLoss(extractor, config.objective, total_steps=5)


def stored_targets(world: Path) -> tuple[nn.Module, Objective]:
    config = tiny_config(world, world)
    return student(config), CoCoMixLoss(None, config.objective, total_steps=5)


def distillation(world: Path) -> tuple[nn.Module, Objective]:
    kd = KdConfig(teacher=str(world / "teacher"))
    return student(tiny_config(world, world, "ntp")), DistillationLoss(
        DistributionExtractor.load(kd, 290, CPU)
    )


def regression(distance: str) -> Callable[[Path], tuple[nn.Module, Objective]]:
    def make(world: Path) -> tuple[nn.Module, Objective]:
        config = tiny_config(world, world, objective__regression=distance, concepts__teacher_width=12)
        assert config.concepts is not None
        extractor = StateExtractor.load(config.concepts, CPU)
        return student(config), RegressionLoss(extractor, config.objective, total_steps=5)

    return make


def autoencoder(world: Path) -> tuple[nn.Module, Objective]:
    teacher = load_model(world / "teacher")
    assert isinstance(teacher, GPT2)
    learner = SaeLearner(12, SaeConfig(teacher="", layer=0, num_latents=37, top_k=6, aux_top_k=4))
    for name, tensor in learner.state_dict().items():
        tensor.copy_(init_sae_parameter(name, tensor.shape, tensor.dtype, seed=3, num_latents=37))
    return learner, SaeLoss(teacher.requires_grad_(False), 0, 96)


def gradients(make: Callable[[Path], tuple[nn.Module, Objective]], world: Path, batch: Batch) -> list[Tensor]:
    """Loss, tokens and gradients of all parameters."""
    model, objective = make(world)
    terms = objective(model, batch, step=0, detail=True)
    terms.loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    sums = [torch.as_tensor(value, dtype=torch.float32).detach() for value in terms.sums.values()]
    return [terms.loss.detach(), *sums, *found]


@pytest.mark.parametrize(
    "make",
    [
        next_token,
        single_documents,
        cocomix,
        stored_targets,
        distillation,
        regression("cosine"),
        regression("l1"),
        autoencoder,
    ],
    ids=["ntp", "documents", "cocomix", "cache", "kd", "cosine", "l1", "sae"],
)
def test_damaged_rows_count_nothing_wherever_they_are(
    make: Callable[[Path], tuple[nn.Module, Objective]], tiny_world: Path
) -> None:
    """Catches labels, targets, states or residuals of a damaged row that are trained on, or NaN from none."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 290, (3, 17), generator=generator)
    targets = torch.randint(0, 37, (3, 16, 3), generator=generator).to(torch.uint16)
    damage = Damage("train", 0, "damaged")
    holed = torch.stack([rows[0], torch.zeros_like(rows[1]), rows[2]])
    blank = torch.stack([targets[0], torch.zeros_like(targets[1]), targets[2]])
    found = gradients(make, tiny_world, Batch(holed, 3, blank, (DamagedRow(1, damage),)))
    last = Batch(rows[[0, 2, 0]], 2, torch.stack([targets[0], targets[2], targets[0]]))
    for value, expected in zip(found, gradients(make, tiny_world, last), strict=True):
        torch.testing.assert_close(value, expected)
    everything = tuple(DamagedRow(row, damage) for row in range(3))
    loss, *others = gradients(make, tiny_world, Batch(rows * 0, 3, torch.zeros_like(targets), everything))
    assert loss == 0
    assert all(value.isfinite().all() for value in others)


@pytest.fixture(scope="module")
def damaged_world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world with one training and one validation chunk changed."""
    root = tmp_path_factory.mktemp("damaged") / "world"
    shutil.copytree(tiny_world, root)
    splits = read_manifest(root / "data").splits
    for split, number in (("train", BAD_CHUNK), ("val", BAD_VALIDATION_CHUNK)):
        shard, chunk = splits[split].chunks[number]
        raw = bytearray((root / "data" / shard.name).read_bytes())
        raw[chunk.offset + TAR_BLOCK + 1] ^= 4
        (root / "data" / shard.name).write_bytes(raw)
    return root


def damaged_run(world: Path, run_dir: Path, objective: str = "ntp", **changes: Any) -> RunConfig:
    config = {"data__on_damage": "skip", "validation__every_steps": 6, **changes}
    return tiny_config(world, run_dir, objective, **config)


def rows_of_chunk(world: Path) -> np.ndarray:
    """How many rows of each step of a run are windows of the damaged chunk."""
    counts = windows_per_chunk(read_manifest(world / "data"), "train", 16)
    order = WindowOrder(counts, seed=0, lanes=4)
    chunks = order.locate(np.arange(STEPS * ROWS))[2].reshape(STEPS, ROWS)
    return (chunks == BAD_CHUNK).sum(axis=1)


def damage_events(run_dir: Path, split: str) -> list[tuple[int, int, int]]:
    """Step, chunk and rows of each event."""
    events = read_json_lines(run_dir / "events.jsonl")
    damaged = [event for event in events if event.get("what") == "damaged data" and event["split"] == split]
    assert all(event["kind"] == "skip" and "CRC-32" in event["error"] for event in damaged)
    return [(event["step"], event["chunk"], event["rows"]) for event in damaged]


@pytest.mark.dist
@pytest.mark.parametrize("objective", ["ntp", "cocomix"])
def test_ranks_agree_on_what_counts(objective: str, damaged_world: Path, tmp_path: Path) -> None:
    """Catches a rank that divides by its own count, a collective that hangs, and rows counted twice."""
    skipped = rows_of_chunk(damaged_world)
    assert 0 < skipped.sum() < 3 * STEPS
    for num_ranks in (1, 2):
        run_dir = tmp_path / f"{num_ranks}"
        train_on_ranks(damaged_run(damaged_world, run_dir, objective), num_ranks)
        total = np.cumsum(skipped).tolist()
        saves = [step for step in (4, 8, 12) if total[step - 1] > (total[step - 5] if step > 4 else 0)]
        assert damage_events(run_dir, "train") == [(step, BAD_CHUNK, total[step - 1]) for step in saves]
        assert damage_events(run_dir, "val") == [(step, BAD_VALIDATION_CHUNK, 4) for step in (6, 12)]
    one, two = (losses(tmp_path / name) for name in ("1", "2"))
    for record, expected in zip(two, one, strict=True):
        for key, value in expected.items():
            assert record[key] == (None if value is None else pytest.approx(value, abs=1e-5)), key


@pytest.mark.dist
def test_a_step_is_the_mean_over_the_rows_that_count(
    tiny_world: Path, damaged_world: Path, tmp_path: Path
) -> None:
    """Catches a loss or gradient that is divided by rows that were left out, and steps before that change."""
    skipped = rows_of_chunk(damaged_world)
    first = int(np.flatnonzero(skipped)[0])
    ranges = [[0, first * ROWS]] if first else []
    config = damaged_run(damaged_world, tmp_path / "run", data__skip=ranges, train__steps=1)

    def by_hand(world: World) -> tuple[float, float, int]:
        parts = build_parts(config, world)
        batch = next(parts.loader)
        parts.loader.close()
        tokens = batch.counted(batch.tokens).long()
        logits = parts.engine.model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        grads = [p.grad for p in parts.engine.model.parameters()]
        whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in whole if grad is not None))
        return loss.item(), norm, len(tokens)

    ((loss, norm, rows),) = run_ranks(by_hand, 1)
    assert rows == ROWS - skipped[first] < ROWS
    train_on_ranks(config, 2)
    (record,) = losses(tmp_path / "run")
    assert record["loss_ntp"] == pytest.approx(loss, abs=1e-5)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.dist
def test_steps_before_the_damage_are_the_same_bits(
    tiny_world: Path, damaged_world: Path, tmp_path: Path
) -> None:
    """Catches a policy that changes sound steps."""
    first = int(np.flatnonzero(rows_of_chunk(damaged_world))[0])
    train_on_ranks(damaged_run(damaged_world, tmp_path / "skip", validation__every_steps=0), 2)
    train_on_ranks(tiny_config(tiny_world, tmp_path / "raise", "ntp", validation__every_steps=0), 2)
    skip, sound = losses(tmp_path / "skip"), losses(tmp_path / "raise")
    assert first > 0
    assert skip[:first] == sound[:first]
    assert skip[first] != sound[first]


@pytest.mark.dist
def test_counts_go_on_after_a_resume(damaged_world: Path, tmp_path: Path) -> None:
    """Catches counts that start anew with a process, or count the steps that it lost."""
    skipped = rows_of_chunk(damaged_world)
    config = damaged_run(damaged_world, tmp_path / "parts")

    def in_parts(world: World) -> list[str]:
        return [train(config, world, StopAfter(polls)) for polls in (int(np.flatnonzero(skipped)[0]) + 1, 99)]

    assert run_ranks(in_parts, 1) == [["stopped", "finished"]]
    train_on_ranks(damaged_run(damaged_world, tmp_path / "whole"), 1)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert damage_events(tmp_path / "parts", "train")[-1][2] == skipped.sum()


@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_raise_ends_the_run(num_ranks: int, damaged_world: Path, tmp_path: Path) -> None:
    """Catches damage that is trained on, and ranks that wait for the one that found it."""
    config = damaged_run(damaged_world, tmp_path / "run", data__on_damage="raise", validation__every_steps=0)
    with pytest.raises(RankError, match=r"at offset \d+: chunk is damaged: its CRC-32"):
        train_on_ranks(config, num_ranks)
