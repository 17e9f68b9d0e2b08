"""How much a run trains on each source, and that it is not more than the source's limits."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.config import DataConfig, SourceConfig
from data.manifest import Manifest
from data.mixture import Schedule, apportion, open_schedule
from data.order import after_skips
from data.source import windows_per_chunk

_WEIGHT_DIGITS = 4


@dataclass(frozen=True, slots=True)
class SourceUse:
    """What of a source is trained on."""

    name: str
    tokens: int
    epochs: float
    """Passes over its training windows."""


def source_use(config: DataConfig, manifests: Sequence[Manifest], rows: Sequence[int]) -> list[SourceUse]:
    """Rows of each source as tokens and epochs."""
    windows = _num_windows(config, manifests)
    return [
        SourceUse(name, count * config.seq_len, count / num_windows)
        for name, count, num_windows in zip(config.by_source, rows, windows, strict=True)
    ]


def planned_use(
    config: DataConfig, manifests: Sequence[Manifest], rows_per_step: int, steps: int
) -> list[SourceUse]:
    """What a run of ``steps`` steps trains on; exact, but for rows that a rewind will leave out.

    Args:
        config: the data section.
        manifests: those of its sources.
        rows_per_step: sequences per optimizer step, over all ranks.
        steps: optimizer steps.

    Raises:
        ValueError: more than a source's limits allow; the message says what would fit.
    """
    plan = _Plan(config, manifests, rows_per_step)
    rows = plan.rows(plan.schedule, steps)
    if np.any(rows > plan.limits):
        raise ValueError(plan.refusal(rows, steps))
    return source_use(config, manifests, rows.tolist())


def trained_ranges(
    skip: Sequence[tuple[int, int]], rows_per_step: int, steps: int
) -> Iterator[tuple[int, int]]:
    """Yield the ranges ``[first, last)`` of global rows that ``steps`` steps train on."""
    row = 0
    for first, _ in skip:
        row = after_skips(row, skip)
        before = min(steps, max(0, -(-(first - row) // rows_per_step)))
        yield row, row + before * rows_per_step
        row, steps = row + before * rows_per_step, steps - before
    row = after_skips(row, skip)
    yield row, row + steps * rows_per_step


class _Plan:
    """A run's rows by source, and the limits on them."""

    def __init__(self, config: DataConfig, manifests: Sequence[Manifest], rows_per_step: int) -> None:
        self._config, self._manifests, self._rows_per_step = config, manifests, rows_per_step
        self.schedule = open_schedule(config)
        windows = _num_windows(config, manifests)
        self.limits = np.asarray(
            [_limit(*item, config.seq_len) for item in zip(config.sources, windows, strict=True)]
            if config.sources
            else [math.inf]
        )

    def rows(self, schedule: Schedule, steps: int) -> np.ndarray:
        return schedule.rows_in(trained_ranges(self._config.skip, self._rows_per_step, steps))

    def refusal(self, rows: np.ndarray, steps: int) -> str:
        """One line for a run that is beyond a limit."""
        number = int(np.flatnonzero(rows > self.limits)[0])
        source = self._config.sources[number]
        use = source_use(self._config, self._manifests, rows.tolist())[number]
        windows = _num_windows(self._config, self._manifests)[number]
        text = (
            f"data.sources: {source.name}: train.steps={steps} would train on {use.tokens:,} tokens of it, "
            f"{use.epochs:.2f} epochs, but {_bounds(source)} of its {windows * self._config.seq_len:,} "
            f"allows {int(self.limits[number]) * self._config.seq_len:,}; at most "
            f"train.steps={self._most_steps(steps)} fits"
        )
        weight = self._most_weight(number, steps)
        return text if weight is None else f"{text}, or weight={weight:g}"

    def _fits(self, schedule: Schedule, steps: int) -> bool:
        return bool(np.all(self.rows(schedule, steps) <= self.limits))

    def _most_steps(self, steps: int) -> int:
        too_many = bisect_left(range(steps), True, key=lambda fewer: not self._fits(self.schedule, fewer))
        return too_many - 1

    def _most_weight(self, number: int, steps: int) -> float | None:
        """The largest weight of one source, to a few digits, with which the same steps fit."""
        weights = [source.weight for source in self._config.sources]
        period = self._config.mixture_period
        others = math.fsum(weights) - weights[number]
        rows = int(self.limits[number]) * period // (steps * self._rows_per_step)
        if not rows or not others:
            return None
        weights[number] = _rounded_down(rows / (period - rows) * others)
        counts = apportion(weights, period)
        fits = min(counts) > 0 and self._fits(Schedule(counts), steps)
        return weights[number] if fits else None


def _num_windows(config: DataConfig, manifests: Sequence[Manifest]) -> list[int]:
    return [sum(windows_per_chunk(manifest, "train", config.seq_len)) for manifest in manifests]


def _limit(source: SourceConfig, windows: int, seq_len: int) -> float:
    """Most rows of a source."""
    epochs = math.floor(source.max_epochs * windows) if source.max_epochs else math.inf
    tokens = source.max_tokens // seq_len if source.max_tokens else math.inf
    return min(epochs, tokens)


def _bounds(source: SourceConfig) -> str:
    given = (("max_epochs", source.max_epochs), ("max_tokens", source.max_tokens))
    return " and ".join(f"{key}={value:g}" for key, value in given if value)


def _rounded_down(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - _WEIGHT_DIGITS)
    return float(f"{math.floor(value / unit) * unit:.{_WEIGHT_DIGITS}g}")
