"""Runs against a baseline along every axis: pure functions on curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.analysis.curves import AXES, Axis, Cost, Curve, common_budget


@dataclass(frozen=True, slots=True)
class Run:
    """What a comparison needs of one run."""

    curve: Curve
    parameters: int
    flops_per_token: float
    planned_steps: int
    """``train.steps``; the curve of an unfinished run ends before."""


@dataclass(frozen=True, slots=True)
class AtBudget:
    """All runs once the same amount is spent."""

    axis: Axis
    budget: float
    losses: tuple[float | None, ...]
    """Nats per token by run; None where the run has no validation that early."""


@dataclass(frozen=True, slots=True)
class ToLoss:
    """What all runs spent until they reached the baseline's final loss."""

    axis: Axis
    costs: tuple[Cost | None, ...]
    """By run; None where it was not reached."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs against the first one."""

    runs: tuple[Run, ...]
    at_budget: tuple[AtBudget, ...]
    to_loss: tuple[ToLoss, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the runs, the baseline first."""
        return tuple(run.curve.name for run in self.runs)

    @property
    def target_loss(self) -> float:
        """The baseline's final loss, nats."""
        return self.runs[0].curve.final.loss


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs with the first one along every axis.

    Raises:
        ValueError: fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run given, a comparison needs at least 2")
    curves = [run.curve for run in runs]
    target = curves[0].final.loss
    budgets = {axis: common_budget(curves, axis) for axis in AXES}
    return Comparison(
        tuple(runs),
        tuple(
            AtBudget(axis, budget, tuple(curve.loss_at(axis, budget) for curve in curves))
            for axis, budget in budgets.items()
        ),
        tuple(ToLoss(axis, tuple(curve.cost_of(axis, target) for curve in curves)) for axis in AXES),
    )
