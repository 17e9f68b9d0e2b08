"""A real run on one rank with an observer around its objective, which sees and disturbs single steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import trainer.main
from data.batch import Batch
from parallel.mesh import Mesh
from parallel.world import World
from trainer.build import Parts, build_parts
from trainer.config import RunConfig
from trainer.metrics.sums import Mean
from trainer.objective import LossTerms, Objective
from trainer.stop import StopRequest


class Observer:
    """The objective of a run with something before, in and after each step; by default nothing.

    Args:
        parts: of the run on this rank.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.steps = 0
        """Steps begun by this process."""
        self._inner: Objective = parts.objective
        self._in_step = False

    @property
    def means(self) -> tuple[Mean, ...]:
        """Those of the run's objective."""
        return self._inner.means

    def settings(self, step: int) -> Mapping[str, float]:
        """Those of the run's objective."""
        return self._inner.settings(step)

    def __call__(self, model: nn.Module, batch: Batch, *, step: int, detail: bool) -> LossTerms:
        """See :class:`trainer.objective.Objective`."""
        if model.training:
            if not self._in_step:
                self._in_step = True
                self.steps += 1
                self.on_start()
            self.on_tokens(batch.tokens)
        terms = self._inner(model, batch, step=step, detail=detail)
        return self.disturb(terms) if model.training else terms

    def prepare(self, batch: Batch | None) -> None:
        """Before each microbatch, with the one behind it."""
        self._inner.prepare(batch)

    def count(self, batch: Batch) -> Tensor | None:
        """What the inner objective counts."""
        return self._inner.count(batch)

    def before_step(self, model: nn.Module) -> None:
        """Between the last backward and the update."""
        self._inner.before_step(model)
        self.on_gradients()

    def after_step(self, model: nn.Module, mesh: Mesh) -> None:
        """After the update."""
        self._inner.after_step(model, mesh)
        self._in_step = False
        self.on_end()

    def on_start(self) -> None:
        """Before the first forward of a step; all ranks come here."""

    def on_tokens(self, tokens: Tensor) -> None:
        """Sees the (b, T+1) int64 tokens of each training microbatch."""

    def disturb(self, terms: LossTerms) -> LossTerms:
        """May change the loss of a training microbatch."""
        return terms

    def on_gradients(self) -> None:
        """After the last backward of a step, before its update."""

    def on_end(self) -> None:
        """After the update of a step."""


def train_observed(
    config: RunConfig,
    world: World,
    make_observer: Callable[[Parts], Observer],
    stop: StopRequest | None = None,
) -> tuple[str, Observer]:
    """Train as ``trainer.main`` does, with an observer; returns how it ended and the observer."""
    observers: list[Observer] = []

    def build(config: RunConfig, world: World) -> Parts:
        parts = build_parts(config, world)
        observers.append(make_observer(parts))
        return replace(parts, objective=observers[0])

    with mock.patch.object(trainer.main, "build_parts", build), stop or StopRequest() as request:
        outcome = trainer.main.train(config, world, request)
    return outcome, observers[0]


def local_state(parts: Parts) -> list[Tensor]:
    """This rank's own weights and optimizer state, copied, in the optimizer's order."""
    optimizer = parts.engine.optimizer  # type: ignore[attr-defined]  # FsdpEngine's
    tensors: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            tensors.append(parameter.detach())
            tensors += [value for _, value in sorted(optimizer.state[parameter].items())]
    return [(tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone() for tensor in tensors]


def equal_bitwise(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether all bits are the same, those of NaNs and zeros included."""
    return len(ours) == len(theirs) and all(
        torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        for one, other in zip(ours, theirs, strict=True)
    )
