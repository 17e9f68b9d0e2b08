"""The layout of ranks on the axes."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.config import ParallelConfig
from parallel.mesh import build_mesh, replica_mesh
from parallel.world import World
from tests.ranks import RankError, run_ranks

ROOT = Path(__file__).parents[2]


def _describe(world: World, config: ParallelConfig) -> tuple[tuple[int, int, int, int], tuple[int, ...], str]:
    log = io.StringIO()
    logging.basicConfig(level=logging.INFO, stream=log, force=True)
    mesh = build_mesh(config, world)
    place = (mesh.dp_rank, mesh.dp_size, mesh.tp_rank, mesh.tp_size)
    return place, tuple(mesh.fsdp.shape), log.getvalue()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world_size", "config", "fsdp_shape"),
    [
        (1, ParallelConfig(), (1,)),
        (2, ParallelConfig(), (2,)),
        (2, ParallelConfig(dp_replicate=2), (2, 1)),
        (4, ParallelConfig(dp_replicate=2), (2, 2)),
        (4, ParallelConfig(dp_shard=4), (4,)),
    ],
    ids=["1", "shard2", "replicate2", "hybrid2x2", "shard4"],
)
def test_ranks_share_the_batch(world_size: int, config: ParallelConfig, fsdp_shape: tuple[int, ...]) -> None:
    """Catches replicas that read the same rows, a missing replicate axis, and library log lines."""
    results = run_ranks(_describe, world_size, config)
    assert [place for place, _, _ in results] == [(rank, world_size, 0, 1) for rank in range(world_size)]
    assert {shape for _, shape, _ in results} == {fsdp_shape}
    assert {log for *_, log in results} == {""}


def _replica(world: World, config: ParallelConfig) -> list[int]:
    ranks: list[int] = replica_mesh(build_mesh(config, world), world).mesh.tolist()
    return ranks


@pytest.mark.dist
@pytest.mark.parametrize(
    ("config", "replicas"),
    [
        (ParallelConfig(), [[0, 1]]),
        (ParallelConfig(dp_replicate=2), [[0], [1]]),
        (ParallelConfig(tp=2), [[0, 1]]),
        (ParallelConfig(tp=2, dp_replicate=2), [[0, 1], [2, 3]]),
        (ParallelConfig(tp=2, dp_shard=2, dp_replicate=2), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
    ids=["shard2", "replicate2", "tp2", "replicate2-tp2", "replicate2-shard2-tp2"],
)
def test_a_replica_is_shards_by_tensor_parallel_ranks(
    config: ParallelConfig, replicas: list[list[int]]
) -> None:
    """Catches frozen weights split over ranks of two replicas, or over one axis only."""
    found = run_ranks(_replica, sum(map(len, replicas)), config)
    assert found == [ranks for ranks in replicas for _ in ranks]


def _build(world: World, config: ParallelConfig) -> None:
    build_mesh(config, world)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ParallelConfig(dp_replicate=3), "dp_replicate=3 x dp_shard=-1 x tp=1 does not fit the 2 processes"),
        (ParallelConfig(dp_shard=1), "dp_replicate=1 x dp_shard=1 x tp=1 does not fit the 2 processes"),
        (ParallelConfig(dp_shard=4), "dp_replicate=1 x dp_shard=4 x tp=1 does not fit the 2 processes"),
    ],
)
def test_axes_that_do_not_fit_are_refused(config: ParallelConfig, message: str) -> None:
    """Catches ranks left idle, and a division to an axis of 0."""
    with pytest.raises(RankError, match=f"ValueError: parallel.{message} of this run"):
        run_ranks(_build, 2, config)


WITHOUT_TORCHTITAN = """
import sys
sys.modules["torchtitan"] = None
import parallel.apply, parallel.collectives, parallel.engine
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh, replica_mesh
from parallel.world import start_world, stop_world
try:
    build_mesh(ParallelConfig(), start_world("cpu", 10))
except ModuleNotFoundError as error:
    print(error)
finally:
    stop_world()
"""


def test_without_torchtitan_only_the_mesh_fails() -> None:
    """Catches an import at the top, which would keep data and analysis tools from starting."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCHTITAN], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "torchtitan is not installed, but every mesh needs it\n"
    assert done.stderr == ""
