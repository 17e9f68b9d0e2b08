"""The order is exactly once per epoch, for any number of ranks, and never changes between versions."""

from __future__ import annotations

import numpy as np
import pytest

from data.order import WindowOrder, permutation
from data.stream import plan_reads

COUNTS = [5, 3, 0, 4, 5, 1]


def test_golden_permutations() -> None:
    """Catches any change of the order: runs that resume after an upgrade would repeat or skip data."""
    assert permutation(10, 0, "chunks", 0).tolist() == [0, 4, 6, 3, 2, 1, 9, 7, 5, 8]
    assert permutation(10, 1, "windows", 3, 7).tolist() == [4, 8, 1, 3, 9, 0, 5, 6, 2, 7]


def test_golden_order() -> None:
    """Catches a change of the lanes or of the epochs, by literal windows of a small split."""
    _, lane, chunk, window = WindowOrder(COUNTS, seed=7, lanes=3).locate(np.arange(16, 24))
    assert lane.tolist() == [1, 2, 0, 1, 2, 0, 1, 2]
    assert list(zip(chunk.tolist(), window.tolist(), strict=True)) == [
        (1, 0),
        (5, 0),
        (1, 1),
        (4, 3),
        (0, 1),
        (1, 2),
        (4, 4),
        (5, 0),
    ]


@pytest.mark.parametrize("lanes", [1, 3, 7, 1000])
def test_each_window_once_per_epoch(lanes: int) -> None:
    """Catches lanes that overlap or leave a gap, and chunks without a window."""
    order = WindowOrder(COUNTS, seed=3, lanes=lanes)
    assert order.num_windows == 18
    everything = sorted((chunk, window) for chunk, count in enumerate(COUNTS) for window in range(count))
    orders = []
    for number in range(3):
        epoch, _, chunk, window = order.locate(number * 18 + np.arange(18))
        assert set(epoch.tolist()) == {number}
        orders.append(list(zip(chunk.tolist(), window.tolist(), strict=True)))
        assert sorted(orders[-1]) == everything
    assert orders[0] != orders[1] != orders[2]


def test_locate_does_not_depend_on_history() -> None:
    """Catches caches that return another epoch's permutation."""
    rows = np.arange(0, 2000, 7)
    whole = np.stack(WindowOrder(COUNTS, seed=1, lanes=3).locate(rows))
    warm = WindowOrder(COUNTS, seed=1, lanes=3)
    pieces = [np.stack(warm.locate(rows[i : i + 11])) for i in range(0, len(rows), 11)]
    assert np.array_equal(whole, np.concatenate(pieces, axis=1))


def test_exactly_once_over_changing_world_sizes() -> None:
    """Catches a share of a rank that depends on more than the step's rows: 4, then 2, then 3 ranks."""
    order = WindowOrder([40, 17, 0, 33, 29, 1], seed=0, lanes=8)
    seen: list[tuple[int, int]] = []
    row = 0
    for world_size, rows_per_step, steps in ((4, 12, 3), (2, 8, 4), (3, 3, 17)):
        for _ in range(steps):
            parts = [order.rows_of_rank(row, rows_per_step, rank, world_size) for rank in range(world_size)]
            rows = np.concatenate(parts)
            assert sorted(rows[:, 0].tolist()) == list(range(row, row + rows_per_step))
            seen += [tuple(pair) for pair in rows[:, 1:].tolist()]
            row += rows_per_step
    assert row == 119
    rest = np.stack(order.locate(np.arange(row, order.num_windows))[2:], axis=1)
    seen += [tuple(pair) for pair in rest.tolist()]
    assert len(set(seen)) == len(seen) == order.num_windows == 120


def test_a_rank_reads_few_chunks() -> None:
    """Catches rows dealt out one by one: every rank would read every lane's chunk."""
    order = WindowOrder([64] * 64, seed=0, lanes=64)
    chunks = [len(set(order.rows_of_rank(0, 512, rank, 8)[:, 1].tolist())) for rank in range(8)]
    assert max(chunks) <= 9 + 8  # 8 lanes each, and a lane may cross from one chunk into the next


def test_seed_changes_the_order_and_no_window_is_an_error() -> None:
    """Catches a seed that is ignored."""
    rows = np.arange(18)
    first, second = (np.stack(WindowOrder(COUNTS, seed=seed, lanes=3).locate(rows)) for seed in (0, 1))
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="0 windows"):
        WindowOrder([0, 0], seed=0, lanes=1)


@pytest.mark.parametrize(
    ("world_size", "rows", "lanes"), [(40, 200, 64), (100, 100, 64), (24, 72, 64), (7, 35, 16)]
)
def test_a_rank_keeps_its_lanes_where_they_do_not_divide_the_rows(
    world_size: int, rows: int, lanes: int
) -> None:
    """Catches ranks that go back and forth between lanes and read each chunk again and again."""
    order = WindowOrder([64] * 20 * lanes, seed=0, lanes=lanes)
    assert rows % order.lanes
    steps = order.num_windows // rows
    table = [order.rows_of_step(step * rows, rows) for step in range(steps)]
    share = rows // world_size
    reads = 0
    for rank in range(world_size):
        mine = (step[rank * share : (rank + 1) * share] for step in table)
        reads += sum(len(missing) for _, missing, _ in plan_reads(mine, order.keep_steps(rows, world_size)))
    # Each chunk by the ranks that share its lane, and by those at the lane's borders.
    assert reads <= 1.5 * 20 * (lanes + world_size)
