"""Validation curves of runs, and reading them at a budget or at a loss (no torch).

A curve is only ever interpolated: a question outside of what was measured is answered by ``None`` or
by a bound, never by a guess.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

Axis = Literal["tokens", "flops", "seconds"]
"""What a run spends: tokens seen, model FLOPs, and seconds of training."""

AXES: tuple[Axis, ...] = get_args(Axis)

LOSS_KEY = "val_loss_ntp"


@dataclass(frozen=True, slots=True)
class Point:
    """One validation."""

    step: int
    tokens: float
    flops: float
    seconds: float
    loss: float
    """Mean next-token cross entropy, nats."""


class Cost(NamedTuple):
    """What it took to reach a loss."""

    value: float
    is_upper_bound: bool
    """The first validation was there already, so the true cost is ``value`` or less."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A run's validations in the order of training; at least one."""

    name: str
    points: tuple[Point, ...]

    @property
    def final(self) -> Point:
        """The newest validation."""
        return self.points[-1]

    def spent(self, axis: Axis) -> list[float]:
        """Tokens, FLOPs or seconds at each point."""
        return [getattr(point, axis) for point in self.points]

    def loss_at(self, axis: Axis, budget: float) -> float | None:
        """Loss once ``budget`` is spent, linear between validations; None outside of the curve."""
        xs = self.spent(axis)
        if not xs[0] <= budget <= xs[-1]:
            return None
        after = bisect_left(xs, budget)
        if xs[after] == budget:
            return self.points[after].loss
        before, here = self.points[after - 1], self.points[after]
        share = (budget - xs[after - 1]) / (xs[after] - xs[after - 1])
        return before.loss + share * (here.loss - before.loss)

    def cost_of(self, axis: Axis, loss: float) -> Cost | None:
        """What it took to reach ``loss`` for the first time, linear between validations; None if never."""
        xs = self.spent(axis)
        for index, point in enumerate(self.points):
            if point.loss > loss:
                continue
            if index == 0:
                return Cost(xs[0], is_upper_bound=point.loss < loss)
            above = self.points[index - 1].loss
            share = (above - loss) / (above - point.loss)
            return Cost(xs[index - 1] + share * (xs[index] - xs[index - 1]), is_upper_bound=False)
        return None


def common_budget(curves: Sequence[Curve], axis: Axis) -> float:
    """The largest budget that all curves reached."""
    return min(curve.spent(axis)[-1] for curve in curves)


def read_curve(name: str, records: Iterable[Mapping[str, Any]], source: str) -> Curve:
    """Validations among the records of a run.

    A record takes the place of the earlier ones of its step and of later steps: a process that died
    may have left records of steps which a resumed one did again.

    Args:
        name: what tables call the run.
        records: objects of ``metrics.jsonl`` in the order of the file.
        source: the file, named in errors.

    Raises:
        ValueError: there is no validation, one lacks a key, or a loss is not finite.
    """
    points: list[Point] = []
    for record in records:
        if LOSS_KEY in record:
            point = _point(record, source)
            while points and points[-1].step >= point.step:
                points.pop()
            points.append(point)
    if not points:
        raise ValueError(f"{source}: no validation points ({LOSS_KEY}), there is nothing to compare")
    return Curve(name, tuple(points))


def _point(record: Mapping[str, Any], source: str) -> Point:
    keys = ("step", *AXES, LOSS_KEY)
    for key in keys:
        value = record.get(key)
        if not isinstance(value, int | float):  # a NaN or an infinity is stored as null
            raise ValueError(f"{source}: {key}={value} at step {record.get('step')} must be a finite number")
    step, tokens, flops, seconds, loss = (record[key] for key in keys)
    return Point(step, tokens, flops, seconds, loss)
