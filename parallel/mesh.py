"""The device mesh: which ranks hold replicas, which hold shards."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.config import ParallelConfig
from parallel.world import World


@dataclass(frozen=True)
class Mesh:
    """This rank's place on the axes ``dp_replicate x dp_shard x tp``."""

    dp_rank: int
    """Number of this rank's share of the batch, 0 to ``dp_size - 1``."""

    dp_size: int
    """Shares of the batch: ``dp_replicate * dp_shard``."""

    tp_rank: int
    """Place in the tensor-parallel group."""

    tp_size: int
    """Ranks that compute one share of the batch together."""

    fsdp: DeviceMesh
    """Mesh of ``fully_shard``: 1-D (shard), or 2-D (replicate, shard) for hybrid sharding."""

    dp_group: dist.ProcessGroup | None
    """Group of all data-parallel ranks; None when there is only one."""

    tp: DeviceMesh | None
    """1-D mesh of the tensor-parallel group; None when it is one rank."""

    ranks_per_node: int = 1
    """Ranks of this machine, whose numbers follow each other."""


def build_mesh(config: ParallelConfig, world: World) -> Mesh:
    """Lay the ranks out on the axes; a collective over all ranks.

    Raises:
        ValueError: The axes do not multiply to the number of processes.
        ModuleNotFoundError: torchtitan is not installed.
    """
    dp_shard = _dp_shard(config, world.size)
    try:
        # Not at the top: configuration, world and collectives must import without torchtitan.
        from parallel.titan import build_parallel_dims
    except ModuleNotFoundError as error:
        package = (error.name or "torchtitan").partition(".")[0]
        raise ModuleNotFoundError(f"{package} is not installed, but every mesh needs it") from error
    dims = build_parallel_dims(
        dp_replicate=config.dp_replicate,
        dp_shard=dp_shard,
        tp=config.tp,
        world_size=world.size,
        device_type=world.device.type,
        timeout_s=world.timeout_s,
    )
    batch = dims.get_optional_mesh("batch")
    tp = dims.get_optional_mesh("tp")
    mesh = Mesh(
        dp_rank=batch.get_local_rank() if batch else 0,
        dp_size=config.dp_replicate * dp_shard,
        tp_rank=tp.get_local_rank() if tp else 0,
        tp_size=config.tp,
        fsdp=dims.get_mesh(["dp_replicate", "fsdp"] if config.dp_replicate > 1 else "fsdp"),
        dp_group=batch.get_group() if batch else None,
        tp=tp,
        ranks_per_node=world.local_size,
    )
    return mesh


def replica_mesh(mesh: Mesh, world: World) -> DeviceMesh:
    """1-D mesh of the ranks that hold one whole model between them, ``dp_shard x tp``.

    Frozen weights that each of these ranks applies to other rows are split over all of them. The
    group of ``dp_shard`` or of ``tp`` serves where the other axis is 1; otherwise a new one is
    made, which is a collective over all ranks.
    """
    names = mesh.fsdp.mesh_dim_names
    assert names is not None, "build_mesh names its axes"
    shards = mesh.fsdp[names[-1]]
    if mesh.tp is None:
        return shards
    if shards.size() == 1:
        return mesh.tp
    # The tp axis varies fastest, so a replica's ranks follow each other.
    size, limit = shards.size() * mesh.tp_size, timedelta(seconds=world.timeout_s)
    group, _ = dist.new_subgroups(size, timeout=limit)
    return DeviceMesh.from_group(group, world.device.type)


def _dp_shard(config: ParallelConfig, world_size: int) -> int:
    others = config.dp_replicate * config.tp
    dp_shard = world_size // others if config.dp_shard == -1 else config.dp_shard
    if others * dp_shard != world_size:
        raise ValueError(
            f"parallel.dp_replicate={config.dp_replicate} x dp_shard={config.dp_shard} x tp={config.tp} "
            f"does not fit the {world_size} processes of this run"
        )
    return dp_shard
