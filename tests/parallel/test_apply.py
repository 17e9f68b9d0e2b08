"""Weights in and out of sharded models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.apply import (
    apply_parallel,
    gather_full_state,
    load_full_state,
    materialize,
    shard_frozen,
)
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh, replica_mesh
from parallel.plan import ParallelPlan
from parallel.world import World
from tests.parallel.toy import PLAN, ToyModel, ToyRun, assert_equal, init_weight, tokens_of
from tests.ranks import RankError, run_ranks


def _materialize(world: World, config: ParallelConfig) -> tuple[dict[str, Tensor], list[float], float]:
    run = ToyRun(world, config)
    return gather_full_state(run.model), run.model.mask.tolist(), run.validate()


@pytest.mark.dist
def test_weights_do_not_depend_on_the_layout() -> None:
    """Catches an initialisation per shard, and rows lost where they do not divide by the ranks."""
    model = ToyModel()
    expected = {
        name: init_weight(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()
    }
    losses = []
    for world_size, dp_replicate in ((1, 1), (2, 1), (4, 1), (4, 2)):
        results = run_ranks(_materialize, world_size, ParallelConfig(dp_replicate=dp_replicate))
        assert_equal(expected, results[0][0])
        assert list(results[0][0]) == list(expected), "names must come in the model's order"
        assert all(not state for state, _, _ in results[1:]), "only rank 0 keeps whole weights"
        assert all(mask == [1.0, 1.0] for _, mask, _ in results), "every rank fills its own buffers"
        losses += [loss for _, _, loss in results]
    assert max(losses) - min(losses) < 1e-5


def _messages_of_materialize(world: World) -> int:
    with torch.device("meta"):
        model = ToyModel()
    config = ParallelConfig()
    apply_parallel(model, PLAN, build_mesh(config, world), config, "fp32")
    with CommDebugMode() as communication:
        materialize(model, world.device, init_weight)
    return communication.get_total_counts()


@pytest.mark.dist
def test_weights_are_made_without_communication() -> None:
    """Catches a broadcast per parameter, which would make every start wait for rank 0."""
    assert run_ranks(_messages_of_materialize, 2) == [0, 0]


def _round_trip(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor], float, float]:
    """Load whole weights into a model that has just validated with others."""
    run = ToyRun(world, init=lambda name, shape, dtype: torch.ones(shape, dtype=dtype))
    run.validate()
    model = ToyModel()
    tensors = {
        name: 2 * init_weight(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()
    }
    load_full_state(run.model, tensors)
    loaded = run.validate()
    # Gathered with the root's weights still whole from that forward.
    gathered = gather_full_state(run.model)
    return tensors, gathered, loaded, run.validate()


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 3])
def test_whole_weights_go_in_and_come_out_unchanged(world_size: int) -> None:
    """Catches shards of the wrong rows, and a root that computes on with the weights from before."""
    results = run_ranks(_round_trip, world_size)
    tensors, gathered, *_ = results[0]
    assert_equal(tensors, gathered)
    model = ToyModel()
    model.reset_buffers()
    model.load_state_dict(tensors)
    tokens = tokens_of(999)
    expected = model(tokens[:, :-1], tokens[:, 1:]).item()
    for _, _, loaded, again in results:
        assert loaded == again == pytest.approx(expected, rel=1e-6)


def _gather_is_a_copy(world: World) -> bool:
    run = ToyRun(world)
    before = gather_full_state(run.model)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    run.train(0, 1)
    return all(torch.equal(before[name], kept[name]) for name in kept)


@pytest.mark.dist
def test_gathered_weights_do_not_follow_the_training() -> None:
    """Catches whole weights of a single rank that are views of the live ones."""
    assert run_ranks(_gather_is_a_copy, 1) == [True]


def _load_wrong(world: World) -> list[str]:
    run = ToyRun(world)
    good = {
        name: init_weight(name, tensor.shape, tensor.dtype) for name, tensor in run.model.state_dict().items()
    }
    messages = []
    for wrong in (
        {name: tensor for name, tensor in good.items() if name != "weights.scale"},
        good | {"extra": torch.ones(1)},
        good | {"weights.scale": torch.ones(3)},
    ):
        with pytest.raises(ValueError, match="model") as error:
            load_full_state(run.model, wrong)
        messages.append(str(error.value))
    return messages


@pytest.mark.dist
def test_weights_of_another_model_are_refused() -> None:
    """Catches a load that keeps initial weights where a name is missing, or broadcasts a shape."""
    missing, unknown, shape = run_ranks(_load_wrong, 2)[0]
    assert missing == "weights do not match the model: missing ['weights.scale'], unknown []"
    assert unknown == "weights do not match the model: missing [], unknown ['extra']"
    assert shape == "weights.scale has shape (3,), but the model's is (2,)"


def _unknown_unit(world: World) -> None:
    config = ParallelConfig()
    with torch.device("meta"):
        model = ToyModel()
    apply_parallel(model, ParallelPlan(fsdp_units=("layers.0",)), build_mesh(config, world), config, "fp32")


@pytest.mark.dist
def test_a_plan_of_another_model_is_refused() -> None:
    """Catches a unit that is silently left to the root."""
    with pytest.raises(RankError, match="the plan's unit 'layers.0' is no module of ToyModel"):
        run_ranks(_unknown_unit, 1)


def _memory(world: World) -> tuple[int, int]:
    run = ToyRun(world)
    local = sum(p.to_local().numel() for p in run.model.parameters())  # type: ignore[attr-defined]
    return local, sum(p.numel() for p in run.model.parameters())


@pytest.mark.dist
def test_each_rank_holds_its_share_only() -> None:
    """Catches a plan that shards nothing: the shares add up to the model, and none has it all."""
    shares = run_ranks(_memory, 3)
    whole = shares[0][1]
    assert sum(local for local, _ in shares) == whole
    assert max(local for local, _ in shares) < 0.5 * whole


class _Spliced(ToyModel):
    """Called in two parts from outside, as a teacher is."""

    def below(self, input_ids: Tensor) -> Tensor:
        return self.blocks[0](nn.functional.embedding(input_ids, self.weights["embedding"]))

    def above(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.blocks[1](x) @ self.weights["embedding"].T
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def _frozen() -> _Spliced:
    with torch.device("meta"):
        model = _Spliced()
    materialize(model, torch.device("cpu"), init_weight)
    return model.requires_grad_(False)


def _gradient(model: _Spliced, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        x = model.below(tokens[:, :-1])
    (gradient,) = torch.autograd.grad(model.above(x.requires_grad_(), tokens[:, 1:]), x)
    return gradient


def _whole_blocks(model: nn.Module) -> int:
    blocks = (model.get_submodule(f"blocks.{index}") for index in range(2))
    return sum(not any(isinstance(weight, DTensor) for weight in block.parameters()) for block in blocks)


class _Gathers(TorchDispatchMode):
    """Counts all-gathers. (CommDebugMode does not work with gradients of inputs.)"""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def _split_and_use(world: World, backward: bool) -> tuple[int, int, list[int]]:
    """All-gathers of one use, weights held after it, and blocks whole while each block computes."""
    ranks = replica_mesh(build_mesh(ParallelConfig(), world), world)
    model, whole = _frozen(), _frozen()
    shard_frozen(model, PLAN, ranks, ("below", "above"), backward=backward)
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(_whole_blocks(model)))
    for step in (0, 1):
        tokens = tokens_of(step)[world.rank :: world.size]
        with _Gathers() as gathers:
            if backward:
                assert torch.equal(_gradient(model, tokens), _gradient(whole, tokens))
            else:
                with torch.no_grad():
                    assert torch.equal(model.below(tokens), whole.below(tokens))
    held = sum(weight.to_local().numel() for weight in model.parameters())  # type: ignore[attr-defined]
    return gathers.count, held, seen


@pytest.mark.dist
def test_frozen_weights_are_whole_only_while_they_compute() -> None:
    """Catches a model that gathers at every call, keeps what it gathered, or computes something else."""
    whole = sum(weight.numel() for weight in _frozen().parameters())
    # The root once, the lower block once, the upper one again in backward.
    for backward, gathers, blocks in ((True, 1 + 1 + 2, 2), (False, 1 + 1, 1)):
        results = run_ranks(_split_and_use, 3, backward)
        assert sum(held for _, held, _ in results) == whole
        for count, held, seen in results:
            assert count == gathers
            assert held < whole / 2
            assert seen == [1] * 2 * blocks


def test_an_unsharded_model_works_too() -> None:
    """Catches helpers that need a process group: a script may fill and read a plain model."""
    with torch.device("meta"):
        model = ToyModel()
    materialize(model, torch.device("cpu"), init_weight)
    whole = gather_full_state(model)
    load_full_state(model, whole)
    assert_equal(whole, gather_full_state(model))
