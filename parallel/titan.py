"""The only importer of torchtitan: device meshes and gradient clipping."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import timedelta

import torch

# Registers what init_device_mesh needs to build FSDP axes; torchtitan expects it to be imported first.
import torch.distributed.fsdp
import torchtitan.distributed.parallel_dims as titan_dims
from torch.distributed.distributed_c10d import _set_pg_timeout
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_ as titan_clip_grad_norm_


def build_parallel_dims(
    *, dp_replicate: int, dp_shard: int, tp: int, world_size: int, device_type: str, timeout_s: float
) -> ParallelDims:
    """Build torchtitan's device meshes; a collective over all ranks.

    Args:
        dp_replicate: Replicas of the sharded model.
        dp_shard: Ranks over which a replica is sharded.
        tp: Tensor-parallel ranks.
        world_size: Product of the three.
        device_type: ``cpu`` or ``cuda``.
        timeout_s: Seconds that a collective of an axis may take.
    """
    # torchtitan takes the first accelerator of the machine, also for a run on its CPUs, and falls
    # back to "cuda" where there is none.
    titan_dims.device_type = device_type
    # It logs through the root logger, once per rank.
    titan_dims.logger = logging.getLogger("torchtitan")
    titan_dims.logger.setLevel(logging.WARNING)
    dims = ParallelDims(
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        cp=1,
        tp=tp,
        pp=1,
        ep=1,
        world_size=world_size,
        spmd_backend="partial_dtensor",
    )
    dims.build_mesh()
    _limit_time(dims, timeout_s)
    return dims


def _limit_time(dims: ParallelDims, timeout_s: float) -> None:
    """Give every axis' group a time limit.

    A new group takes torch's default of 10 (nccl) or 30 minutes (gloo), not that of the world's
    group, and torch 2.13 has no public setter for an existing group.
    """
    for axis in ("batch", "dp_replicate", "fsdp", "tp"):
        submesh = dims.get_optional_mesh(axis)
        if submesh is not None:
            _set_pg_timeout(timedelta(seconds=timeout_s), submesh.get_group())


def clip_grad_norm_(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients to a global 2-norm of at most ``max_norm`` and return the norm before.

    Args:
        parameters: Parameters, also sharded ones, whose ``grad`` may be None.
        max_norm: Bound; infinity leaves the gradients as they are.

    Returns:
        The norm over all ranks, a scalar on the parameters' device. Nothing waits for the device.
    """
    norm: torch.Tensor = titan_clip_grad_norm_(parameters, max_norm)
    return norm
