"""The training step never waits for the device, and compiles nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.host_waits import host_waits
from tests.trainer.tiny_run import tiny_config
from trainer.build import build_parts
from trainer.config import RunConfig
from trainer.metrics.sums import ConceptUsage, StepMetrics
from trainer.step import train_step

PLANTED: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "float": lambda x: float(x.sum()),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assigned through a mask": lambda x: x.clone().index_put_((x > 0,), x.new_ones(len(x))),
    "unique": lambda x: x.unique(),
    "counts": lambda x: torch.repeat_interleave(torch.ones(len(x), dtype=torch.int64)),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_every_kind_of_wait_is_counted(kind: str) -> None:
    """Catches a counter that sees nothing: each way to wait is planted in a backward, where hooks run too."""
    x = torch.ones(3, requires_grad=True)
    y = (x * 2).sum()

    def hook(grad: Tensor) -> None:
        PLANTED[kind](grad)

    x.register_hook(hook)
    with host_waits() as found:
        y.backward()
    assert found.total() > 0


def step_waits(config: RunConfig, world: World, plant: bool) -> list[Counter[str]]:
    """Waits of three steps of the real trainer; two microbatches, metrics in detail at the second."""
    parts = build_parts(config, world)
    metrics = StepMetrics(parts.objective.means, world.device)
    concepts = config.predicted_concepts
    usage = None if concepts is None else ConceptUsage(concepts.num_concepts, world.device)
    model = parts.engine.model
    if plant:
        model.register_forward_hook(lambda *_: torch.zeros(1).item() or None)
    history = []
    for step in range(3):
        batch = next(parts.loader).to(world.device)
        with host_waits() as found:
            train_step(
                parts.engine,
                parts.objective,
                parts.mesh,
                batch,
                step=step,
                microbatch_size=config.train.microbatch_size,
                tokens_per_step=config.tokens_per_step,
                lr=1e-3,
                metrics=metrics,
                usage=usage,
                detail=step == 1,
            )
        history.append(found)
    parts.loader.close()
    return history


@pytest.mark.dist
@pytest.mark.parametrize("plant", [False, True], ids=["as it is", "planted"])
@pytest.mark.parametrize(
    ("objective", "changes", "allowed"),
    [
        ("cocomix", {}, 0),
        ("cocomix", {"train__precision": "bf16", "concepts__precision": "bf16"}, 0),
        ("cocomix", {"concepts__every": 2}, 0),
        ("ntp", {}, 0),
        # On a CPU alone it asks whether any latent is dead, in each of two microbatches.
        ("sae", {}, 2),
    ],
    ids=["cocomix", "bf16", "every second token", "ntp", "sae"],
)
def test_the_step_waits_for_nothing(
    objective: str, changes: dict[str, Any], allowed: int, plant: bool, tiny_world: Path, tmp_path: Path
) -> None:
    """Catches a wait in forward, backward, clipping, update, metrics or the counts of concepts."""
    changes = {"train__batch_size": 4, "train__microbatch_size": 2, **changes}
    config = tiny_config(tiny_world, tmp_path / "run", objective, **changes)
    (history,) = run_ranks(lambda world: step_waits(config, world, plant), 1)
    reads = allowed + (2 if plant else 0)
    assert history == [Counter({"aten::_local_scalar_dense": reads} if reads else {})] * 3


def test_a_compilation_per_step_is_counted() -> None:
    """Catches a counter of compilations, which ``test_compile`` relies on, that does not move."""
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="eager", dynamic=False)
    def double(x: Tensor) -> Tensor:
        return 2 * x

    seen = []
    for length in (2, 2, 3, 4):
        double(torch.ones(length))
        seen.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    counters.clear()
    assert seen == [1, 1, 2, 3]
