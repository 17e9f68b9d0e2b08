"""Runs that differ by their seeds alone, as one: means and 95% confidence intervals.

Intervals are Student's t of the mean of n seeds; differences are Welch's, which does not assume that two
settings scatter alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.analysis.compare_budgets import Run
from trainer.analysis.curves import AXES, Axis, common_budget
from trainer.config import RunConfig

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and how sure it is."""

    mean: float
    half_width: float | None
    """Half of the 95% confidence interval; None for a single value."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Runs that differ by seed and place alone."""

    name: str
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class OverSeeds:
    """Settings against the first one along one axis."""

    axis: Axis
    budget: float
    """The largest one that all runs reached."""
    losses: tuple[Estimate | None, ...]
    """Nats per token at the budget; None where a run has no validation that early."""
    differences: tuple[Estimate | None, ...]
    """Those less the first setting's; 0 for the first."""
    costs: tuple[Estimate | None, ...]
    """Spent until the highest final loss of the first setting's runs, which all of them reached, relative to
    their mean cost; None where a run did not reach it."""


def group_by_seed(configs: Sequence[RunConfig], runs: Sequence[Run]) -> list[Setting]:
    """Put runs together whose configurations differ by ``run.dir``, ``run.seed`` and ``data.seed`` alone."""
    groups: dict[RunConfig, list[Run]] = {}
    for config, run in zip(configs, runs, strict=True):
        same = replace(config, run=replace(config.run, dir="", seed=0), data=replace(config.data, seed=0))
        groups.setdefault(same, []).append(run)
    settings = [Setting(_name([run.curve.name for run in group]), tuple(group)) for group in groups.values()]
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        settings = [replace(setting, name=setting.runs[0].curve.name) for setting in settings]
    return settings


def _name(names: Sequence[str]) -> str:
    """The first run's name, without the number of its seed where there are several."""
    return names[0] if len(names) == 1 else re.sub(r"[-_.]*(seed|s)?[-_.]*\d+$", "", names[0]) or names[0]


def over_seeds(settings: Sequence[Setting]) -> tuple[OverSeeds, ...]:
    """Compare settings with the first one along every axis."""
    return tuple(_along(axis, settings) for axis in AXES)


def _along(axis: Axis, settings: Sequence[Setting]) -> OverSeeds:
    budget = common_budget([run.curve for setting in settings for run in setting.runs], axis)
    losses = [_known([run.curve.loss_at(axis, budget) for run in setting.runs]) for setting in settings]
    target = max(run.curve.final.loss for run in settings[0].runs)
    costs = []
    for setting in settings:
        reached = [run.curve.cost_of(axis, target) for run in setting.runs]
        costs.append(_known([None if cost is None else cost.value for cost in reached]))
    base = None if costs[0] is None else sum(costs[0]) / len(costs[0])
    return OverSeeds(
        axis,
        budget,
        tuple(None if values is None else estimate(values) for values in losses),
        tuple(
            None
            if values is None or losses[0] is None
            else difference(values, losses[0])
            if index
            else Estimate(0.0, None)
            for index, values in enumerate(losses)
        ),
        tuple(
            None if values is None or not base else estimate([value / base for value in values])
            for values in costs
        ),
    )


def _known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of at least one value, with Student's interval."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, None)
    return Estimate(mean, _t95(count - 1) * math.sqrt(_variance(values) / count))


def difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean of ``values`` less that of ``baseline``, with Welch's interval; both need two values for one."""
    mean = sum(values) / len(values) - sum(baseline) / len(baseline)
    if min(len(values), len(baseline)) < 2:
        return Estimate(mean, None)
    parts = [(_variance(part) / len(part), len(part) - 1) for part in (values, baseline)]
    total = sum(share for share, _ in parts)
    if total == 0:
        return Estimate(mean, 0.0)
    freedom = total**2 / sum(share**2 / count for share, count in parts)
    return Estimate(mean, _t95(math.floor(freedom)) * math.sqrt(total))


def _variance(values: Sequence[float]) -> float:
    """Unbiased variance of at least two values."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _t95(freedom: int) -> float:
    return _T95[max(freedom, 1) - 1] if freedom <= len(_T95) else 1.96 + 2.5 / freedom
