"""Shards and optimizer state in the host's memory with FSDP2."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from parallel.apply import materialize
from parallel.config import ParallelConfig
from parallel.world import World, start_world, stop_world
from tests.parallel.toy import ROWS, TOKENS, ToyModel, ToyRun, assert_equal, init_weight, tokens_of
from tests.ranks import run_ranks

OFFLOAD = ParallelConfig(offload_parameters=True, offload_optimizer=True)


def _moves(world: World, folder: Path) -> tuple[Any, ...]:
    """Three steps offloaded and three without from its checkpoint; six steps without any offloading."""
    run = ToyRun(world, OFFLOAD)
    history = run.train(0, 3)
    run.validate()
    run.save(folder)
    other = ToyRun(world)
    other.load(folder)
    whole = ToyRun(world)
    return [*history, *other.train(3, 6)], other.whole(), whole.train(0, 6), whole.whole()


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_offloaded_run_is_the_same_run(world_size: int, tmp_path: Path) -> None:
    """Catches gradients that are not summed or clipped over ranks, and a state that others misread."""
    history, state, expected, expected_state = run_ranks(_moves, world_size, tmp_path / "saved")[0]
    assert history == expected
    assert_equal(state, expected_state)


def _skips(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    run = ToyRun(world, OFFLOAD)
    run.train(0, 2)
    before = run.whole()
    run.accumulate(2)
    if world.rank == 1:
        grad = next(run.model.parameters()).grad
        assert grad is not None
        grad.to_local()[0, 0] = float("nan")  # type: ignore[attr-defined]
    norm = run.engine.step(1e-2).item()
    return before, run.whole(), norm


@pytest.mark.dist
def test_a_nan_is_skipped_on_all_ranks() -> None:
    """Catches an update on the host that does not hear of the norm."""
    results = run_ranks(_skips, 2)
    assert_equal(*results[0][:2])
    assert all(norm != norm for *_, norm in results)


def _placement(world: World) -> list[Any]:
    run = ToyRun(world, OFFLOAD)
    run.train(0, 1)
    groups = [
        module._get_fsdp_state()._fsdp_param_group
        for module in run.model.modules()
        if isinstance(module, FSDPModule)
    ]
    parameters = [parameter for group in groups if group is not None for parameter in group.fsdp_params]
    return [(parameter.offload_to_cpu, parameter.pin_memory) for parameter in parameters]


@pytest.mark.dist
def test_every_parameter_is_offloaded_and_pinned_for_a_gpu_only() -> None:
    """Catches units that are left out, and pinning on a machine without CUDA."""
    placements = run_ranks(_placement, 2)[0]
    assert len(placements) == len(list(ToyModel().parameters()))
    assert set(placements) == {(True, False)}


def test_buffers_stay_on_the_device() -> None:
    """Catches counters and masks that a forward on the GPU would find in the host's memory."""
    with torch.device("meta"):
        model = ToyModel()
    device = torch.device("meta")  # any that is not the CPU
    model.reset_buffers = lambda: None  # type: ignore[method-assign]
    materialize(model, device, init_weight, offload=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert torch.equal(model.weights["scale"], init_weight("weights.scale", torch.Size([2]), torch.float32))


def _on_a_gpu() -> tuple[float, float]:
    """Gradient norms of the first step, offloaded and not."""
    world = start_world("cuda", 60.0)
    norms = []
    for config in (OFFLOAD, ParallelConfig()):
        run = ToyRun(world, config)
        tokens = tokens_of(0).to(world.device)
        loss = run.engine.model(tokens[:, :-1], tokens[:, 1:]) / (ROWS * TOKENS)
        run.engine.backward(loss, last_microbatch=True)
        norm = run.engine.step(1e-2)
        assert norm.device.type == "cuda"
        norms.append(norm.item())
        weights = [parameter.to_local() for parameter in run.model.parameters()]  # type: ignore[attr-defined]
        offloaded = config.offload_parameters
        assert {weight.device.type for weight in weights} == {"cpu" if offloaded else "cuda"}
        assert not offloaded or all(weight.is_pinned() for weight in weights)
    stop_world()
    return norms[0], norms[1]


@pytest.mark.gpu
def test_shards_are_pinned_and_the_norm_is_on_the_gpu() -> None:
    """Catches shards that went to the GPU after all, and a norm that the metrics find on another device."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        offloaded, plain = pool.submit(_on_a_gpu).result()
    assert offloaded == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("alone", "needed"),
    [("offload_optimizer", "offload_parameters"), ("offload_parameters", "offload_optimizer")],
)
def test_one_without_the_other_is_refused(alone: str, needed: str) -> None:
    """Catches a promise that FSDP2 cannot keep: its shards are the optimizer's weights."""
    with pytest.raises(ValueError, match=f"{alone}=true needs {needed}=true with engine=fsdp"):
        ParallelConfig(**{alone: True})
