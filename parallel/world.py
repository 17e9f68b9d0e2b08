"""The process group: who this process is, which device it computes on, start and end."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

# Its functions take the default group of the moment of their import as a default argument. If some
# library imports it after the start, they keep that group, and its threads, beyond the end.
import torch.distributed.nn.functional
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    """Number of this process, 0 to ``size - 1``."""

    size: int
    """Number of processes."""

    local_rank: int
    """Number of this process on its machine; its CUDA device."""

    device: torch.device
    """Where this process computes."""

    timeout_s: float = 600.0
    """Seconds after which a collective of any of the run's groups fails."""

    local_size: int = 1
    """Number of processes on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes logs."""
        return self.rank == 0


def start_world(device: Literal["auto", "cpu", "cuda"], timeout_s: float) -> World:
    """Join the run's process group and choose the device.

    Under torchrun its environment says who this process is; without it the run is one process
    and needs no port. CPU runs use gloo. CUDA runs use nccl for device tensors and gloo for CPU
    tensors, so that small host-side agreements never wait for the device. A group that exists
    already is used as it is.

    Args:
        device: ``auto`` takes CUDA where it is present.
        timeout_s: Seconds that a collective may take before it raises.

    Raises:
        ValueError: The launcher's environment is incomplete or contradicts itself, or the device
            is not there.
    """
    rank, size, local_rank = _identity()
    chosen = choose_device(device, local_rank)
    if not dist.is_initialized():
        # A one-process store in memory: a plain `python -m` run must neither need nor open a port.
        store = None if _launched() else dist.HashStore()
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        device=chosen,
        timeout_s=timeout_s,
        local_size=_environment_int("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else size,
    )


def use_deterministic_algorithms() -> None:
    """Have every operation of this process give the same bits each time, also on a GPU.

    There attention would otherwise add up the gradient of the queries in the order in which its blocks end.
    An operation that cannot do it raises.
    """
    # cuBLAS wants workspaces of a fixed size for that, and reads it at its first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # No operation here reads memory before it is written; filling it would cost a pass each time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def stop_world() -> None:
    """Leave the process group; does nothing when there is none.

    Call this when model, engine and mesh have gone out of scope: a group that one of them still
    holds keeps its gloo threads. Such a thread may drop the last reference to a tensor while the
    interpreter ends, and then aborts the process after all its work was done well
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    if dist.is_initialized():
        # Models hold themselves, and with them their groups, in cycles.
        gc.collect()
        dist.destroy_process_group()
        _release_meshes()


def _release_meshes() -> None:
    """Make every mesh let go of its groups; torch's caches of DTensor layouts keep meshes for good."""
    for candidate in gc.get_objects():
        if type(candidate) is DeviceMesh:
            (candidate._root_mesh or candidate)._pg_registry.clear()


def _launched() -> bool:
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def _identity() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) from the group, the launcher or for a single process."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
    if not _launched():
        return 0, 1, 0
    rank, size, local_rank = (_environment_int(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= size:
        raise ValueError(f"RANK={rank} must be below WORLD_SIZE={size}")
    if not os.environ.get("MASTER_ADDR"):
        raise ValueError("MASTER_ADDR is not set although RANK and WORLD_SIZE are: start with torchrun")
    _environment_int("MASTER_PORT")
    return rank, size, local_rank


def _environment_int(name: str) -> int:
    text = os.environ.get(name)
    if text is None:
        raise ValueError(f"{name} is not set although RANK or WORLD_SIZE is: start with torchrun")
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} in the environment must be a whole number of at least 0")
    return int(text)


def choose_device(device: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """The device of one process; a CUDA device becomes its current one.

    Raises:
        ValueError: The device is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ValueError("run.device=cuda, but this machine has no CUDA device that torch can use")
    if local_rank >= count:
        raise ValueError(f"LOCAL_RANK={local_rank} must be below the number of CUDA devices, {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
