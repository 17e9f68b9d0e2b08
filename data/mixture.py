"""Which source each training row comes from: a schedule that repeats after a fixed number of rows.

A *period* holds a whole number of rows of each source, apportioned by the weights, in an order that is fixed
by these numbers alone. So the source of a row, and its number within its source, are pure functions of the
global row number, as everything in :mod:`data.order`; each source has its own order and its own epochs there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from data.config import DataConfig
from data.manifest import Manifest
from data.order import RowOrder, WindowOrder
from data.source import windows_per_chunk


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Divide ``total`` by the weights, by largest remainder; equal remainders favour the first."""
    whole = math.fsum(weights)
    shares = [weight / whole * total for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda number: counts[number] - shares[number])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def spread(counts: Sequence[int]) -> np.ndarray:
    """Put the sources of a period in order: after any number of rows each had its share, rounded up or down.

    Earliest deadline first among the sources that would not be a whole row ahead (the chairman assignment
    problem: Tijdeman 1980, Discrete Mathematics 32).

    Args:
        counts: rows of each source, at least 1 each.

    Returns:
        (sum of counts,) int64, the source of each row.
    """
    share, period = np.asarray(counts, dtype=np.int64), int(sum(counts))
    given = np.zeros_like(share)
    order = np.empty(period, dtype=np.int64)
    for row in range(period):
        deadline = -(-(given + 1) * period // share)
        may = given * period < (row + 1) * share
        source = int(np.where(may, deadline, 2 * period).argmin())
        order[row] = source
        given[source] += 1
    return order


class Schedule:
    """Which source each global row comes from."""

    def __init__(self, rows_per_period: Sequence[int]):
        """Lay out a period.

        Args:
            rows_per_period: rows of each source in a period, at least 1 each.
        """
        self.rows_per_period = np.asarray(rows_per_period, dtype=np.int64)
        self.period = int(self.rows_per_period.sum())
        self._source = spread(rows_per_period)
        self._slots = [np.flatnonzero(self._source == number) for number in range(len(rows_per_period))]
        self._rank = np.empty(self.period, dtype=np.int64)
        for slots in self._slots:
            self._rank[slots] = np.arange(len(slots))

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the sources of some rows.

        Args:
            rows: (N,) int64 global row numbers.

        Returns:
            source, and row counted within the source, each (N,) int64.
        """
        period, slot = np.divmod(rows, self.period)
        source = self._source[slot]
        return source, period * self.rows_per_period[source] + self._rank[slot]

    def rows_before(self, row: int) -> np.ndarray:
        """Rows of each source among the first ``row`` global rows, (S,) int64."""
        periods, slot = divmod(row, self.period)
        begun = [np.searchsorted(slots, slot) for slots in self._slots]
        return periods * self.rows_per_period + np.asarray(begun, dtype=np.int64)

    def rows_in(self, ranges: Iterable[tuple[int, int]]) -> np.ndarray:
        """Rows of each source in ranges ``[first, last)`` of global rows, (S,) int64."""
        found = np.zeros_like(self.rows_per_period)
        for first, last in ranges:
            found += self.rows_before(last) - self.rows_before(first)
        return found

    def longest_wait(self, source: int, rows: int) -> int:
        """Most global rows from a row of a source to the one ``rows`` later in it."""
        slots = self._slots[source]
        periods, slot = np.divmod(np.arange(len(slots)) + rows, len(slots))
        return int((periods * self.period + slots[slot] - slots).max())


class MixtureOrder(RowOrder):
    """Which window of which source each global row is."""

    def __init__(self, orders: Sequence[WindowOrder], schedule: Schedule):
        """Combine the orders of the sources.

        Args:
            orders: each source's own.
            schedule: of as many sources.
        """
        self.orders, self.schedule = tuple(orders), schedule
        chunks = [0, *(len(order.windows_per_chunk) for order in orders)]
        self._first_chunk = np.cumsum(chunks)

    def rows_of_step(self, first_row: int, num_rows: int) -> np.ndarray:
        """See :class:`data.order.RowOrder`; rows of a source stand together, chunks are counted over all."""
        rows = first_row + np.arange(num_rows, dtype=np.int64)
        source, own_row = self.schedule.locate(rows)
        epoch, place, chunk, window = (np.empty_like(rows) for _ in range(4))
        for number, order in enumerate(self.orders):
            here = source == number
            epoch[here], lane, chunk[here], window[here] = order.locate(own_row[here])
            place[here] = order.places(lane)
        chunk += self._first_chunk[source]
        by_lane = np.lexsort((rows, place, epoch, source))
        return np.stack([rows, chunk, window], axis=1)[by_lane]

    def keep_steps(self, num_rows: int, world_size: int) -> int:
        """See :class:`data.order.RowOrder`; as many as the source that needs the most."""
        waits = (self.schedule.longest_wait(number, order.lanes) for number, order in enumerate(self.orders))
        every_lane = -(-max(waits) // num_rows)
        if world_size == 1:
            return 1 + every_lane
        period = self.schedule.period
        repeats, lasts = num_rows, 0
        for order, own_rows in zip(self.orders, self.schedule.rows_per_period.tolist(), strict=True):
            repeats = math.lcm(repeats, period * order.lanes // math.gcd(order.lanes, own_rows))
            own_lasts = int(order.windows_per_chunk.max()) * order.lanes
            lasts = max(lasts, -(-own_lasts * period // (own_rows * num_rows)))
        return 1 + max(every_lane, min(repeats // num_rows, lasts))


def open_schedule(config: DataConfig) -> Schedule:
    """The schedule of a run; of a single ``data.dir`` every row is its own.

    Raises:
        ValueError: the period has no row for a source.
    """
    if not config.sources:
        return Schedule([1])
    counts = apportion([source.weight for source in config.sources], config.mixture_period)
    for source, count in zip(config.sources, counts, strict=True):
        if not count:
            raise ValueError(
                f"data.sources: weight={source.weight:g} of {source.name} must give it a row of the "
                f"data.mixture_period={config.mixture_period}: raise one of the two"
            )
    return Schedule(counts)


def open_order(config: DataConfig, manifests: Sequence[Manifest], schedule: Schedule) -> RowOrder:
    """The order of a run's training rows.

    Lanes are shared like the rows, so that the rows of a step come from as many chunks as with one source,
    and as many chunks are open. Source n has the seed ``data.seed + n``: equal folders need not run in step.

    Args:
        config: the data section.
        manifests: those of its sources.
        schedule: of its sources.
    """
    lanes = apportion(schedule.rows_per_period.tolist(), config.lanes)
    orders = [
        WindowOrder(
            windows_per_chunk(manifest, "train", config.seq_len),
            seed=config.seed + number,
            lanes=max(1, lanes[number]),
        )
        for number, manifest in enumerate(manifests)
    ]
    return orders[0] if len(orders) == 1 else MixtureOrder(orders, schedule)
