"""Reductions and agreements over real gloo ranks."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import Agreement, Flags, min_over_ranks, sum_over_ranks
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh
from parallel.world import World
from tests.ranks import RankError, run_ranks


def _reduce(world: World) -> tuple[list[float], list[int], list[float]]:
    mesh = build_mesh(ParallelConfig(dp_replicate=2 if world.size == 4 else 1), world)
    own = torch.tensor([world.rank + 1.0, -world.rank])
    counts = torch.tensor([[world.rank], [1]], dtype=torch.int64).T
    return (
        sum_over_ranks(own, mesh).tolist(),
        min_over_ranks(counts, mesh).flatten().tolist(),
        own.tolist(),
    )


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_reductions_span_all_data_parallel_ranks(world_size: int) -> None:
    """Catches a sum over the shard axis alone (4 ranks are 2 x 2), and a changed argument."""
    ranks = range(world_size)
    for rank, (total, minimum, own) in enumerate(run_ranks(_reduce, world_size)):
        assert total == [sum(r + 1 for r in ranks), -sum(ranks)]
        assert minimum == [0, 1]
        assert own == [rank + 1.0, -rank]


def _exchange(world: World, raised: dict[tuple[int, int], tuple[bool, bool]]) -> list[Flags]:
    """``raised[rank, step]`` are the flags of one rank at one step."""
    agreement = Agreement(world)
    answers = []
    for step in range(5):
        # Ranks reach the exchange at different moments, as after a signal.
        time.sleep(0.02 * ((world.rank + step) % world.size))
        answers.append(agreement.exchange(*raised.get((world.rank, step), (False, False))))
    return [*answers, agreement.finish(), agreement.finish()]


@pytest.mark.dist
def test_all_ranks_learn_a_flag_at_the_same_step() -> None:
    """Catches a rank that stops one step before the others, which then hang in a collective."""
    raised = {(2, 1): (True, False), (0, 3): (False, True), (1, 4): (True, True)}
    none = Flags(stop=False, save=False)
    expected = [none, none, Flags(True, False), none, Flags(False, True), Flags(True, True), none]
    assert run_ranks(_exchange, 3, raised) == [expected] * 3


@pytest.mark.dist
def test_one_rank_has_the_same_delay() -> None:
    """Catches a single process that acts at another step than several would."""
    (answers,) = run_ranks(_exchange, 1, {(0, 1): (False, True)})
    assert [answer.save for answer in answers] == [False, False, True, False, False, False, False]


def _exchange_while_another_is_late(world: World) -> float:
    agreement = Agreement(world)
    if world.rank == 1:
        time.sleep(1.0)
    start = time.monotonic()
    agreement.exchange(False, False)
    waited = time.monotonic() - start
    agreement.finish()
    return waited


@pytest.mark.dist
def test_an_exchange_does_not_wait_for_the_other_ranks() -> None:
    """Catches a blocking all-reduce, which would add the slowest rank's delay to every step."""
    assert run_ranks(_exchange_while_another_is_late, 2)[0] < 0.5


def _between_other_collectives(world: World) -> list[float]:
    agreement = Agreement(world)
    totals = []
    for step in range(20):
        agreement.exchange(step % 7 == world.rank, False)
        total = torch.tensor(float(step))
        dist.all_reduce(total)
        totals.append(total.item())
    agreement.finish()
    return totals


@pytest.mark.dist
def test_an_exchange_under_way_leaves_other_collectives_alone() -> None:
    """Catches flags that share a group with the run and mix with its sums."""
    assert run_ranks(_between_other_collectives, 2) == [[2.0 * step for step in range(20)]] * 2


def _absent_rank(world: World, kind: str) -> float:
    short = World(world.rank, world.size, world.local_rank, world.device, timeout_s=1.0)
    mesh = build_mesh(ParallelConfig(), short)
    agreement = Agreement(short)
    if world.rank == 1:
        time.sleep(30)
    if kind == "sum":
        sum_over_ranks(torch.ones(1), mesh)
    elif kind == "fsdp":
        dist.all_reduce(torch.ones(1), group=mesh.fsdp.get_group())
    else:
        agreement.exchange(False, False)
        agreement.finish()
    return 0.0


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["sum", "fsdp", "agreement"])
def test_the_time_limit_holds_in_every_group(kind: str) -> None:
    """Catches groups with torch's own limit of 30 minutes, in which a lost rank holds a cluster."""
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 raised(?s:.*)[Tt]imed out"):
        run_ranks(_absent_rank, 2, kind, timeout_s=20)
    assert time.monotonic() - start < 10
