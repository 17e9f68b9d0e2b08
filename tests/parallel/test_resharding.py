"""When blocks' weights are gathered and freed: as configured, and with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from parallel.apply import apply_parallel, materialize
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh
from parallel.world import World
from tests.parallel.toy import init_weight
from tests.ranks import run_ranks
from trainer.config import ModelConfig
from trainer.model.gpt2 import GPT2

BLOCKS = 5
SIZES = ModelConfig(d_model=8, n_layer=BLOCKS, n_head=2, vocab_size=30, n_positions=8)


def build(world: World, config: ParallelConfig, ranks_per_node: int | None = None) -> GPT2:
    mesh = build_mesh(config, replace(world, local_size=ranks_per_node or world.size))
    with torch.device("meta"):
        model = GPT2(SIZES)
    apply_parallel(model, model.plan, mesh, config, "fp32")
    materialize(model, world.device, init_weight)
    return model


def train(model: GPT2) -> list[Tensor]:
    """Losses of two steps, a forward without backward after each of them, and the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        tokens = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(step))
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss_ntp
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses += [loss.detach(), model(tokens[:, :-1], tokens[:, 1:]).loss_ntp]
    # Asking for the state frees what the last forward has left gathered.
    return [*losses, *(tensor.full_tensor() for tensor in model.state_dict().values())]


def log_events(model: GPT2, log: list[str]) -> None:
    """Write ``F2`` when block 2 computes, ``B2`` before its backward, ``2`` when its weights are gathered."""
    names: dict[int, str] = {}
    for index, module in enumerate([*model.blocks, model]):
        assert isinstance(module, FSDPModule)
        group = module._get_fsdp_state()._fsdp_param_group
        assert group is not None
        names[id(group)] = "root" if module is model else str(index)
    unshard = FSDPParamGroup.unshard

    def logged_unshard(self: FSDPParamGroup, async_op: bool = False) -> None:
        if self._all_gather_result is None and not self.is_unsharded:
            size = self._all_gather_process_group.size()
            log.append(names[id(self)] + ("" if size == torch.distributed.get_world_size() else f"@{size}"))
        unshard(self, async_op)

    FSDPParamGroup.unshard = logged_unshard  # type: ignore[method-assign]
    for index, block in enumerate(model.blocks):
        block.forward = logged(block.forward, index, log)


def logged(forward: Callable[..., Tensor], index: int, log: list[str]) -> Callable[..., Tensor]:
    def logging_forward(x: Tensor, **more: Any) -> Tensor:
        log.append(f"F{index}")
        out = forward(x, **more)
        out.register_hook(lambda grad: log.append(f"B{index}"))
        return out

    return logging_forward


# Gathers between the computations of one forward and backward over five blocks.
EXPECTED: dict[tuple[str, int], str] = {
    ("always", 0): "root 0 F0 1 F1 2 F2 3 F3 4 F4 4 B4 3 B3 2 B2 1 B1 0 B0",
    ("auto", 0): "root 0 F0 1 F1 2 F2 3 F3 4 F4 B4 3 B3 2 B2 1 B1 0 B0",
    ("never", 0): "root 0 F0 1 F1 2 F2 3 F3 4 F4 B4 B3 B2 B1 B0",
    ("always", 2): "root 0 1 2 F0 3 F1 4 F2 F3 F4 4 B4 3 2 B3 1 B2 0 B1 B0",
    ("auto", 1): "root 0 1 F0 2 F1 3 F2 4 F3 F4 B4 3 B3 2 B2 1 B1 0 B0",
    ("never", 3): "root 0 1 2 3 F0 4 F1 F2 F3 F4 B4 B3 B2 B1 B0",
}


def events(world: World, policies: list[tuple[Any, int]], **more: Any) -> list[tuple[str, list[Tensor]]]:
    found = []
    for policy, prefetch in policies:
        config = ParallelConfig(reshard_after_forward=policy, prefetch=prefetch)
        numbers = train(build(world, config, **more))
        model, log = build(world, config, **more), list[str]()
        unshard = FSDPParamGroup.unshard
        log_events(model, log)
        tokens = torch.zeros(2, 7, dtype=torch.int64)
        model(tokens[:, :-1], tokens[:, 1:]).loss_ntp.backward()
        FSDPParamGroup.unshard = unshard  # type: ignore[method-assign]
        found.append((" ".join(log), numbers))
    return found


@pytest.mark.dist
def test_weights_are_gathered_in_the_stated_order() -> None:
    """Catches a policy that is ignored, weights gathered twice or too early, and numbers that follow them."""
    for rank in run_ranks(events, 2, list(EXPECTED)):
        for policy, (log, numbers) in zip(EXPECTED, rank, strict=True):
            assert log == EXPECTED[policy], policy
            assert all(map(torch.equal, numbers, rank[0][1])), policy


def _on_nodes(world: World) -> list[tuple[str, list[Tensor]]]:
    return [
        *events(world, [("node", 0), ("node", 1)], ranks_per_node=2),
        *events(world, [("always", 0)], ranks_per_node=2),
    ]


@pytest.mark.dist
def test_a_copy_per_node_stays_between_forward_and_backward() -> None:
    """Catches a backward that gathers from other nodes, and weights of the step before in a validation."""
    for (log, numbers), (ahead, others), (_, expected) in run_ranks(_on_nodes, 4):
        assert log == "root 0 F0 1 F1 2 F2 3 F3 4 F4 4@2 B4 3@2 B3 2@2 B2 1@2 B1 0@2 B0"
        assert ahead == "root 0 1 F0 2 F1 3 F2 4 F3 F4 4@2 B4 3@2 B3 2@2 B2 1@2 B1 0@2 B0"
        assert all(map(torch.equal, numbers, expected))
        assert all(map(torch.equal, others, expected))


def _replicas(world: World) -> str:
    model, log = build(world, ParallelConfig(dp_replicate=2)), list[str]()
    log_events(model, log)
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    model(tokens[:, :-1], tokens[:, 1:]).loss_ntp.backward()
    return " ".join(log)


@pytest.mark.dist
def test_replicas_free_nothing() -> None:
    """Catches weights that are copied a second time although nothing is sharded."""
    expected = "root@1 0@1 F0 1@1 F1 2@1 F2 3@1 F3 4@1 F4 B4 B3 B2 B1 B0"
    assert run_ranks(_replicas, 2) == [expected] * 2


@pytest.mark.parametrize("ranks_per_node", [1, 3, 4])
def test_a_copy_per_node_needs_several_nodes(ranks_per_node: int) -> None:
    """Catches a policy that silently is another one: shards of one node, no neighbours, half a node."""
    config = ParallelConfig(reshard_after_forward="node")
    with pytest.raises(ValueError, match=f"whole nodes of {ranks_per_node} ranks"):
        config.shards_per_node(4, ranks_per_node)
