"""FsdpEngine on real gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.config import ParallelConfig
from parallel.engine import FsdpEngine
from parallel.world import World
from tests.parallel.toy import CLIP_NORM, ROWS, TOKENS, ToyModel, ToyRun, assert_equal, init_weight, tokens_of
from tests.ranks import RankError, run_ranks

STEPS = 10


def _train(world: World, config: ParallelConfig) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    run = ToyRun(world, config)
    return run.train(0, STEPS), run.whole()


def _train_in_plain_torch() -> list[tuple[float, float]]:
    """The oracle: one process, whole batch, nothing of the package."""
    model = ToyModel()
    model.reset_buffers()
    for name, tensor in model.state_dict().items():
        tensor.copy_(init_weight(name, tensor.shape, tensor.dtype))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    history = []
    for step in range(STEPS):
        tokens = tokens_of(step)
        loss = model(tokens[:, :-1], tokens[:, 1:]) / (ROWS * TOKENS)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    return history


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world_size", "dp_replicate"), [(1, 1), (2, 1), (3, 1), (4, 2)], ids=["1", "fsdp2", "fsdp3", "hsdp2x2"]
)
def test_every_layout_trains_like_plain_torch(world_size: int, dp_replicate: int) -> None:
    """Catches averaged instead of summed gradients, lost microbatches and norms of one shard alone.

    Per rank there are 6, 3, 2 and 2 microbatches; on 4 ranks the last one is short. The gradient
    norm passes the clipping bound on both sides.
    """
    expected = _train_in_plain_torch()
    assert min(norm for _, norm in expected) < CLIP_NORM < max(norm for _, norm in expected)
    for history, _ in run_ranks(_train, world_size, ParallelConfig(dp_replicate=dp_replicate)):
        assert torch.tensor(history).sub(torch.tensor(expected)).abs().max() < 1e-6


def _count_reductions(world: World) -> list[int]:
    run = ToyRun(world)
    rows = run.microbatches(0)
    counts = []
    for index, tokens in enumerate(rows):
        loss = run.model(tokens[:, :-1], tokens[:, 1:])
        with CommDebugMode() as communication:
            run.engine.backward(loss, last_microbatch=index == len(rows) - 1)
        names = {str(op): count for op, count in communication.get_comm_counts().items()}
        counts.append(sum(count for name, count in names.items() if "reduce" in name))
    return counts


@pytest.mark.dist
def test_gradients_are_communicated_once_per_step() -> None:
    """Catches a reduction per microbatch: three units are reduced in the last backward only."""
    assert run_ranks(_count_reductions, 2)[0] == [0, 0, 3]


def _poison(world: World, poisoned_rank: int) -> tuple[dict[str, Any], dict[str, Any], float, list[Any]]:
    run = ToyRun(world)
    run.train(0, 3)
    before = run.whole()
    run.accumulate(3)
    if world.rank == poisoned_rank:
        grad = run.model.weights["embedding"].grad
        assert isinstance(grad, DTensor)
        grad.to_local()[0, 0] = float("nan")
    norm = run.engine.step(1e-2).item()
    return before, run.whole(), norm, run.train(4, 6)


@pytest.mark.dist
def test_a_step_with_a_nan_gradient_changes_nothing_on_any_rank() -> None:
    """Catches an update, a decay of weights or a step counter that moves although one rank saw a NaN."""
    results = run_ranks(_poison, 2, 1)
    before, after, _, _ = results[0]
    assert_equal(before, after)
    assert before["optimizer.weights.embedding.step"].item() == 3
    assert all(norm != norm for _, _, norm, _ in results), "every rank must see that the norm is not finite"
    assert all(torch.tensor(later).isfinite().all() for *_, later in results)


def _overflow(world: World) -> tuple[dict[str, Any], dict[str, Any], float]:
    run = ToyRun(world, clip_norm=0.0)
    before = run.whole()
    tokens = run.microbatches(0)[0]
    run.engine.backward(run.model(tokens[:, :-1], tokens[:, 1:]) * float("inf"), last_microbatch=True)
    norm = run.engine.step(1e-2).item()
    return before, run.whole(), norm


@pytest.mark.dist
def test_a_first_step_that_overflows_without_clipping_changes_nothing() -> None:
    """Catches a skip that works only after clipping, or only once the optimizer has a state."""
    before, after, norm = run_ranks(_overflow, 1)[0]
    assert_equal(before, after)
    assert norm != norm or norm == float("inf")


def _norms(world: World, clip_norm: float) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    run = ToyRun(world, clip_norm=clip_norm)
    return run.train(0, 1), run.whole()


@pytest.mark.dist
def test_clipping_scales_the_gradient_and_0_does_not_clip() -> None:
    """Catches a clip of 0 that zeroes the gradient, and a returned norm that is the clipped one."""
    (free_history, free), (clipped_history, clipped) = (
        run_ranks(_norms, 2, clip_norm)[0] for clip_norm in (0.0, 1e-3)
    )
    assert free_history == clipped_history
    norm = free_history[0][1]
    assert norm > 1e-3
    for name, moment in free.items():
        if name.endswith("exp_avg"):
            torch.testing.assert_close(moment * 1e-3 / norm, clipped[name], rtol=1e-4, atol=1e-9)


class _HostReads(TorchDispatchMode):
    """Collects operations that hand a tensor's value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "equal.default" in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _host_reads(world: World) -> tuple[list[str], list[str]]:
    run = ToyRun(world)
    run.accumulate(0)
    with _HostReads() as reads:
        norm = run.engine.step(1e-2)
    with _HostReads() as control:
        norm.item()
    return reads.seen, control.seen


@pytest.mark.dist
def test_the_update_reads_no_value_on_the_host() -> None:
    """Catches an .item() or a branch on a tensor in the step, which would stall a GPU every step."""
    seen, control = run_ranks(_host_reads, 2)[0]
    assert not seen
    assert control, "the probe must see .item()"


def _train_and_save(world: World, folder: Path) -> dict[str, torch.Tensor]:
    run = ToyRun(world)
    run.train(0, 3)
    run.validate()
    run.save(folder)
    return run.whole()


def _other_init(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def _load(world: World, folder: Path) -> tuple[dict[str, torch.Tensor], list[Any]]:
    run = ToyRun(world, init=_other_init, betas=(0.8, 0.7))
    run.validate()
    run.load(folder)
    groups = [
        {key: group[key] for key in ("betas", "weight_decay", "fused")}
        for group in run.engine.optimizer.param_groups
    ]
    return run.whole(), [groups, run.validate()]


@pytest.mark.dist
def test_state_moves_between_world_sizes_bitwise(tmp_path: Path) -> None:
    """Catches rows lost or repeated by uneven shards, and optimizer state that a fresh run ignores.

    Hyper-parameters are the loading run's, and weights that a validation left gathered do not
    survive the load.
    """
    saved = run_ranks(_train_and_save, 2, tmp_path / "state")[0]
    losses = []
    for world_size in (1, 3):
        loaded, (groups, loss) = run_ranks(_load, world_size, tmp_path / "state")[0]
        assert_equal(saved, loaded)
        assert [group["betas"] for group in groups] == [(0.8, 0.7)] * 2
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert all(group["fused"] for group in groups)
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def _resume(world: World, folder: Path) -> tuple[list[Any], list[Any], dict[str, Any], dict[str, Any]]:
    straight = ToyRun(world)
    history = straight.train(0, 6)
    first = ToyRun(world)
    first.save(folder / "0")
    resumed_history = []
    for start in (0, 3):
        second = ToyRun(world, init=_other_init)
        second.load(folder / str(start))
        resumed_history += second.train(start, start + 3)
        second.save(folder / str(start + 3))
    return history, resumed_history, straight.whole(), second.whole()


@pytest.mark.dist
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(tmp_path: Path) -> None:
    """Catches a step counter that a save before the first step moves, and any state left out."""
    history, resumed, whole, resumed_whole = run_ranks(_resume, 2, tmp_path)[0]
    assert history == resumed
    assert_equal(whole, resumed_whole)


def _load_foreign(world: World) -> str:
    run = ToyRun(world)
    state = run.engine.state_dict()
    state["model"] = {f"old.{name}": tensor for name, tensor in state["model"].items()}
    with pytest.raises(ValueError, match=r"the model state does not fit: missing \['blocks\.0") as error:
        run.engine.load_state_dict(state)
    return str(error.value)


@pytest.mark.dist
def test_a_state_of_another_model_is_refused_in_one_line() -> None:
    """Catches a load that skips the names that it does not know."""
    assert "\n" not in run_ranks(_load_foreign, 1)[0]


class _Reductions(TorchDispatchMode):
    """Collects the precisions in which gradients are summed over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce_scatter" in str(func):
            self.dtypes |= {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def _precisions(world: World, residual_dtype: torch.dtype | None) -> dict[str, Any]:
    run = ToyRun(world, precision="bf16", residual_dtype=residual_dtype)
    tokens = run.microbatches(0)
    with _Reductions() as reductions:
        for index, rows in enumerate(tokens):
            loss = run.model(rows[:, :-1], rows[:, 1:]) / (ROWS * TOKENS)
            run.engine.backward(loss, last_microbatch=index == len(tokens) - 1)
    grads = {p.grad.dtype for p in run.model.parameters() if p.grad is not None}
    blocks = {dtypes for block in run.model.blocks for dtypes in block.dtypes}  # type: ignore[union-attr]
    run.engine.step(1e-2)
    history = run.train(1, STEPS)
    whole = run.whole()
    weight = whole.get("model.blocks.0.mlp.weight", torch.zeros(1))
    return {
        "loss": loss.dtype,
        "grads": grads,
        "reductions": reductions.dtypes,
        "blocks": blocks,
        "state": {tensor.dtype for tensor in whole.values()},
        "rounded": torch.equal(weight, weight.bfloat16().float()),
        "history": history,
    }


@pytest.mark.dist
@pytest.mark.parametrize("residual", [None, torch.float32], ids=["bf16-residual", "fp32-residual"])
def test_bf16_computes_low_and_keeps_fp32_masters(residual: torch.dtype | None) -> None:
    """Catches masters, gradients or moments in bf16, and units that cast an fp32 residual silently."""
    facts = run_ranks(_precisions, 2, residual)[0]
    stream = residual or torch.bfloat16
    assert facts["blocks"] == {(stream, stream)}
    assert facts["loss"] == torch.float32
    assert facts["grads"] == {torch.float32}
    assert facts["reductions"] == {torch.float32}
    assert facts["state"] == {torch.float32}
    assert not facts["rounded"], "an fp32 master of a trained weight is not a bf16 number"
    expected = _train_in_plain_torch()[1:]
    assert torch.tensor(facts["history"]).sub(torch.tensor(expected)).abs().max() < 0.1


def _unfused(world: World) -> None:
    run = ToyRun(world)
    FsdpEngine(run.model, torch.optim.AdamW(run.model.parameters(), lr=0.0, fused=False), run.mesh, 1.0)


@pytest.mark.dist
def test_an_optimizer_that_cannot_skip_on_the_device_is_refused() -> None:
    """Catches an unfused AdamW, with which a NaN step would be applied."""
    with pytest.raises(RankError, match="must be built with fused=True"):
        run_ranks(_unfused, 1)
