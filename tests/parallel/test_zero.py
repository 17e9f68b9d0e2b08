"""ZeroEngine on real gloo ranks, against FSDP2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel.zero
from parallel.config import ParallelConfig
from parallel.world import World
from parallel.zero import ZeroEngine
from tests.parallel.toy import CLIP_NORM, ToyModel, ToyRun, assert_equal
from tests.ranks import run_ranks

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

FSDP = ParallelConfig()
ZERO = {stage: ParallelConfig(engine="deepspeed", zero_stage=stage) for stage in (1, 2, 3)}
LAYOUTS = {"fsdp": FSDP, **{f"zero{stage}": config for stage, config in ZERO.items()}}
STEPS = 20

History = list[tuple[float, float]]


pytestmark = pytest.mark.usefixtures("deepspeed_before_forks")


def _train(
    world: World, config: ParallelConfig, precision: Any, steps: int
) -> tuple[History, dict[str, Any], dict[str, Any], set[torch.dtype]]:
    run = ToyRun(world, config, precision)
    initial = run.whole()
    return run.train(0, steps), run.whole(), initial, {weight.dtype for weight in run.model.parameters()}


def deviation(one: History, other: History) -> float:
    return torch.tensor(one).sub(torch.tensor(other)).abs().max().item()


@pytest.fixture(scope="module")
def one_rank() -> History:
    history: History = run_ranks(_train, 1, FSDP, "fp32", STEPS)[0][0]
    norms = [norm for _, norm in history]
    assert min(norms) < CLIP_NORM < max(norms), "both sides of the clipping bound"
    return history


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "world_size"), [(1, 2), (2, 2), (3, 2), (2, 3), (3, 3)])
def test_every_stage_trains_like_one_rank(stage: int, world_size: int, one_rank: History) -> None:
    """Catches averaged gradients, lost microbatches and a norm of one rank's part; 3 divides no size."""
    for history, *_ in run_ranks(_train, world_size, ZERO[stage], "fp32", STEPS):
        assert deviation(history, one_rank) < 1e-5


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_starts_from_and_keeps_fp32_masters(stage: int) -> None:
    """Catches initial weights rounded to bf16, and masters or moments in bf16."""
    expected, _, initial, _ = run_ranks(_train, 2, FSDP, "bf16", STEPS)[0]
    history, whole, own_initial, computed = run_ranks(_train, 2, ZERO[stage], "bf16", STEPS)[0]
    assert computed == {torch.bfloat16}
    assert_equal(own_initial, initial)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    weight = whole["model.blocks.0.mlp.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    assert deviation(history, expected) < 5e-3


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_offload_to_the_cpu_trains_alike(stage: int, precision: Any) -> None:
    """Catches gradients or state lost on the way to the CPU, where other code accumulates and clips."""
    offload = ParallelConfig(
        engine="deepspeed", zero_stage=stage, offload_optimizer=True, offload_parameters=stage == 3
    )
    plain, expected, *_ = run_ranks(_train, 2, ZERO[stage], precision, 6)[0]
    history, whole, *_ = run_ranks(_train, 2, offload, precision, 6)[0]
    assert deviation(history, plain) < 1e-6
    # A bias of all keys changes no softmax: its gradient is rounding noise, which Adam blows up.
    for name in [name for name in whole if "qkv.bias" not in name]:
        torch.testing.assert_close(whole[name], expected[name], rtol=1e-4, atol=1e-6)


def _train_and_save(world: World, config: ParallelConfig, folder: Path) -> dict[str, torch.Tensor]:
    run = ToyRun(world, config)
    run.train(0, 3)
    run.save(folder)
    return run.whole()


def _other_init(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, -0.0, dtype=dtype)


def _load(world: World, config: ParallelConfig, folder: Path) -> tuple[dict[str, Any], float, History]:
    run = ToyRun(world, config, init=_other_init)
    run.validate()
    run.load(folder)
    loaded = run.whole()
    return loaded, run.validate(), run.train(3, 5)


@pytest.mark.dist
@pytest.mark.parametrize("saved_by", LAYOUTS)
def test_state_moves_between_engines_stages_and_world_sizes_bitwise(saved_by: str, tmp_path: Path) -> None:
    """Catches rows lost between flat parts and rows, stale weights in forward, and a lost step counter."""
    saved = run_ranks(_train_and_save, 2, LAYOUTS[saved_by], tmp_path / "state")[0]
    others = {
        "fsdp": ["zero1", "zero2", "zero3"],
        "zero1": ["fsdp", "zero2"],
        "zero2": ["zero3"],
        "zero3": ["fsdp", "zero1"],
    }
    losses, histories = [], []
    for index, loaded_by in enumerate(others[saved_by]):
        world_size = 3 - 2 * (index % 2)
        loaded, loss, history = run_ranks(_load, world_size, LAYOUTS[loaded_by], tmp_path / "state")[0]
        assert_equal(saved, loaded)
        losses.append(loss)
        histories.append(history)
    assert max(losses) - min(losses) < 1e-5
    assert all(deviation(history, histories[0]) < 1e-5 for history in histories)


def _signed_zeros(world: World, stage: int) -> list[bool]:
    run = ToyRun(world, ZERO[stage], init=_other_init)
    return [bool(tensor.signbit().all()) for name, tensor in run.whole().items() if "model" in name]


@pytest.mark.dist
def test_negative_zeros_survive() -> None:
    """Catches parts put together by a floating-point sum, where 0.0 + -0.0 is 0.0."""
    signs = run_ranks(_signed_zeros, 2, 1)[0]
    assert signs and all(signs)


def _resume(
    world: World, config: ParallelConfig, precision: Any, folder: Path
) -> tuple[History, History, dict[str, Any], dict[str, Any]]:
    straight = ToyRun(world, config, precision)
    history = straight.train(0, 6)
    first = ToyRun(world, config, precision)
    resumed = first.train(0, 3)
    first.save(folder)
    second = ToyRun(world, config, precision, init=_other_init)
    second.load(folder)
    return history, resumed + second.train(3, 6), straight.whole(), second.whole()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    stage: int, precision: Any, tmp_path: Path
) -> None:
    """Catches any state that the engine-neutral form forgets."""
    history, resumed, whole, resumed_whole = run_ranks(_resume, 2, ZERO[stage], precision, tmp_path)[0]
    assert history == resumed
    assert_equal(whole, resumed_whole)


@pytest.mark.dist
def test_weights_that_stage_3_leaves_whole_follow_a_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches small weights, by default whole on every rank, that stay the initial ones in forward."""
    monkeypatch.setattr(parallel.zero, "_WHOLE_BELOW", 100_000)
    history, resumed, whole, resumed_whole = run_ranks(_resume, 2, ZERO[3], "bf16", tmp_path)[0]
    assert history == resumed
    assert_equal(whole, resumed_whole)


def _poison(
    world: World, config: ParallelConfig, precision: Any
) -> tuple[dict[str, Any], dict[str, Any], float, History, History]:
    run, clean = ToyRun(world, config, precision), ToyRun(world, config, precision)
    run.train(0, 3)
    clean.train(0, 3)
    before = run.whole()
    for index, tokens in enumerate(run.microbatches(3)):
        loss = run.engine.model(tokens[:, :-1], tokens[:, 1:])
        factor = float("nan") if world.rank == 1 and index == 0 else 1.0
        run.engine.backward(loss * factor, last_microbatch=index == 2)
    norm = run.engine.step(1e-2).item()
    return before, run.whole(), norm, run.train(4, 6), clean.train(4, 6)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_a_step_with_a_nan_gradient_changes_nothing_on_any_rank(stage: int, precision: Any) -> None:
    """Catches an update of the ranks that saw no NaN, and a poisoned gradient left for the next step."""
    results = run_ranks(_poison, 2, ZERO[stage], precision)
    before, after, _, _, _ = results[0]
    assert_equal(before, after)
    for _, _, norm, later, clean in results:
        assert not torch.tensor(norm).isfinite()
        assert later == clean


def _poison_offloaded(world: World, stage: int) -> Any:
    return _poison(
        world, ParallelConfig(engine="deepspeed", zero_stage=stage, offload_optimizer=True), "fp32"
    )


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_a_nan_is_skipped_with_offload_too(stage: int) -> None:
    """Catches the CPU path, which looks for NaNs elsewhere."""
    before, after, norm, later, clean = run_ranks(_poison_offloaded, 2, stage)[1]
    assert not torch.tensor(norm).isfinite()
    assert later == clean
    assert before == after == {}


def _whole_weights(world: World) -> tuple[int, int]:
    run = ToyRun(world, ZERO[3])
    run.train(0, 1)
    assert isinstance(run.engine, ZeroEngine)
    held = sum(parameter.numel() for parameter in run.model.parameters())
    return held, sum(part.weight.numel() for part in run.engine._fragments.values())


@pytest.mark.dist
def test_stage_3_frees_what_it_gathered() -> None:
    """Catches parameters that stay whole between steps, and parts that overlap or miss elements."""
    with torch.device("meta"):
        model = ToyModel()
    total = sum(tensor.numel() for tensor in model.parameters())
    shares = run_ranks(_whole_weights, 3)
    assert [held for held, _ in shares] == [0, 0, 0]
    assert sum(part for _, part in shares) == total


def _close_and_build_again(world: World) -> list[History]:
    histories = []
    for stage in (1, 3):
        run = ToyRun(world, ZERO[stage])
        histories.append(run.train(0, 2))
        run.engine.close()
    return histories


@pytest.mark.dist
def test_an_engine_can_follow_another_in_one_process() -> None:
    """Catches globals of deepspeed that a closed engine leaves behind."""
    first, second = run_ranks(_close_and_build_again, 1)[0]
    assert deviation(first, second) < 1e-5


def _mixed_steps(world: World) -> str:
    run = ToyRun(world, ZERO[1])
    state = run.engine.state_dict()
    state["optimizer"]["blocks.0.mlp.weight"]["step"] += 1
    with pytest.raises(ValueError, match="steps 0 to 1: ZeRO needs one") as error:
        run.engine.load_state_dict(state)
    return str(error.value)


@pytest.mark.dist
def test_a_state_with_several_step_counters_is_refused() -> None:
    """Catches a bias correction that would silently be another one than that of the saved run."""
    assert "\n" not in run_ranks(_mixed_steps, 1)[0]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"engine": "deepspeed"}, r"zero_stage=0 must be 1, 2 or 3 with engine=deepspeed"),
    ({"engine": "deepspeed", "zero_stage": 4}, r"zero_stage=4 must be 1, 2 or 3"),
    ({"engine": "fsdp", "zero_stage": 1}, r"zero_stage=1 must be 0 with engine=fsdp"),
    ({"engine": "deepspeed", "zero_stage": 1, "tp": 2}, r"tp=2 must be 1 with engine=deepspeed"),
    ({"engine": "deepspeed", "zero_stage": 1, "dp_replicate": 2}, r"dp_replicate=2 must be 1"),
    ({"engine": "deepspeed", "zero_stage": 2, "offload_parameters": True}, r"needs zero_stage=3"),
]


@pytest.mark.parametrize(("section", "message"), REFUSALS)
def test_what_does_not_fit_is_refused(section: dict[str, Any], message: str) -> None:
    """Catches a layout that would be ignored silently."""
    with pytest.raises(ValueError, match=message) as error:
        ParallelConfig(**section)
    assert "\n" not in str(error.value)


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # what Python does for a package that is not there
import torch
import trainer.build, parallel.zero
try:
    parallel.zero.load_deepspeed(torch.device("cpu"))
except ValueError as error:
    print(error)
"""


def test_without_deepspeed_only_its_engine_is_missing() -> None:
    """Catches an import of deepspeed by a run that does not use it."""
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED], capture_output=True, text=True, check=True
    )
    assert "deepspeed is not installed; install the extra 'cocomix[deepspeed]'" in ended.stdout
    assert ended.stdout.count("\n") == 1
