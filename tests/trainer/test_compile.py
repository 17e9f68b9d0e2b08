"""Compiled blocks: the same run, in whole graphs, each shape compiled once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
from torch._dynamo.utils import counters

import parallel.titan  # noqa: F401  (both take seconds: imported once, before ranks are forked)
import trainer.kernels.matmul
from data.loader import validation_batches
from parallel.collectives import sum_over_ranks
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.tiny_run import tiny_config
from trainer.build import build_parts
from trainer.config import RunConfig
from trainer.metrics.sums import StepMetrics
from trainer.step import train_step, validate


def run(config: RunConfig, world: World) -> list[tuple[dict[str, float], int, int]]:
    """Losses, graphs compiled so far and graph breaks, after each of five steps and two validations.

    Metrics in detail are asked for at every other step, and the last microbatch is a short one.
    """
    torch.set_num_threads(1)
    parts = build_parts(config, world)
    metrics = StepMetrics(parts.objective.means, world.device)
    history = []

    def note(values: dict[str, float]) -> None:
        history.append((values, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))

    for step in range(1, 6):
        train_step(
            parts.engine,
            parts.objective,
            parts.mesh,
            next(parts.loader),
            step=step - 1,
            microbatch_size=config.train.microbatch_size,
            tokens_per_step=config.tokens_per_step,
            lr=1e-2,
            metrics=metrics,
            usage=None,
            detail=step % 2 == 0,
        )
        means = metrics.reduce(lambda value: sum_over_ranks(value, parts.mesh))
        note({name: value.item() for name, value in means.items()})
        if step in (2, 4):
            batches = validation_batches(
                config.data,
                share=1.0,
                rows=config.train.microbatch_size,
                rank=parts.mesh.dp_rank,
                world_size=parts.mesh.dp_size,
            )
            rows = config.train.microbatch_size
            place = (parts.mesh, batches, rows, world.device)
            note(validate(parts.engine, parts.objective, *place, step=step))
    return history


# Number of ranks, keys, and graphs compiled by the training steps and by the validation. A short
# microbatch, the last block, the teacher's two halves and a forward without gradients have their own.
CASES: dict[str, tuple[int, str, dict[str, Any], int, int]] = {
    "one": (1, "cocomix", {"train__batch_size": 3}, 8, 2),
    "documents": (1, "cocomix", {"train__batch_size": 3, "data__mask_documents": True}, 8, 2),
    "fsdp2, selective": (
        2,
        "cocomix",
        {"train__batch_size": 4, "parallel__recompute": "selective", "parallel__shard_teacher": True},
        4,
        2,
    ),
    "tp2, full": (
        2,
        "cocomix",
        {"train__batch_size": 2, "parallel__tp": 2, "parallel__recompute": "full"},
        4,
        2,
    ),
    "autoencoder": (1, "sae", {"train__batch_size": 3}, 2, 0),
}


def check(configs: list[RunConfig], num_ranks: int, trained: int, validated: int) -> None:
    """Compare an eager and a compiled configuration, and count what was compiled."""
    results = run_ranks(lambda world: [run(config, world) for config in configs], num_ranks, timeout_s=200)
    for eager, compiled in results:
        assert [(graphs, breaks) for _, graphs, breaks in eager] == [(0, 0)] * 7
        for (own, *_), (other, *_) in zip(compiled, eager, strict=True):
            for name in own.keys() & {"loss_ntp", "loss_concept", "sae_nmse", "sae_aux_loss"}:
                assert own[name] == pytest.approx(other[name], abs=2e-5)
        assert [breaks for *_, breaks in compiled] == [0] * 7
        assert [graphs for _, graphs, _ in compiled] == [trained, trained, *[trained + validated] * 5]


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_run_equals_the_eager_one(
    case: str, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a graph break, a compilation per step, per microbatch or per block, and other numbers.

    With everything but the generation of kernels, which takes most of the time.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    num_ranks, objective, changes, trained, validated = CASES[case]
    changes |= {"train__microbatch_size": 2} | ({} if objective == "sae" else {"model__n_layer": 2})
    configs = [
        tiny_config(tiny_world, tmp_path / "run", objective, parallel__compile=compiled, **changes)
        for compiled in (False, True)
    ]
    check(configs, num_ranks, trained, validated)


@pytest.mark.dist
@pytest.mark.slow
def test_generated_kernels_too(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches what only the real backend refuses: one block's shape, with and without gradients."""
    # Also products of a size for which oneDNN is used on a CPU.
    monkeypatch.setattr(trainer.kernels.matmul, "_SMALLEST", 0)
    # Otherwise a pool of compiling processes is started, each of which imports torch.
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    changes = {"train__batch_size": 4, "train__microbatch_size": 2, "parallel__recompute": "selective"}
    configs = [
        tiny_config(tiny_world, tmp_path / "run", "ntp", parallel__compile=compiled, **changes)
        for compiled in (False, True)
    ]
    check(configs, 1, 1, 1)
