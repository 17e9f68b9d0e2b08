"""Sums and extrema over ranks, and flags that all ranks agree on."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.world import World

T = TypeVar("T")


def sum_over_ranks(tensor: Tensor, mesh: Mesh) -> Tensor:
    """Return the sum of ``tensor`` over the data-parallel ranks.

    Args:
        tensor: Any shape, on the run's device, the same shape and dtype on every rank; unchanged.
        mesh: The run's mesh.

    Returns:
        A new tensor, equal on all ranks. On CUDA the host does not wait for it.
    """
    return _reduce(tensor, mesh, dist.ReduceOp.SUM)


def min_over_ranks(tensor: Tensor, mesh: Mesh) -> Tensor:
    """Return the elementwise minimum over the data-parallel ranks; see :func:`sum_over_ranks`."""
    return _reduce(tensor, mesh, dist.ReduceOp.MIN)


def _reduce(tensor: Tensor, mesh: Mesh, op: dist.ReduceOp.RedOpType) -> Tensor:
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    if mesh.dp_group is not None:
        dist.all_reduce(result, op=op, group=mesh.dp_group)
    return result


class Flags(NamedTuple):
    """What at least one rank asked for."""

    stop: bool
    """End the run after this step."""

    save: bool
    """Write a checkpoint after this step."""


class Agreement:
    """Flags that every rank learns at the same step, without a wait in the step.

    A signal reaches the ranks at different moments, and a rank that stops alone leaves the others
    in a collective. So the ranks exchange their flags once per step (all-reduce, maximum) and act
    on the result one step later, when it has long arrived. The tensor stays on the CPU and in a
    gloo group of its own: no device is synchronised, and no other collective can come between.
    """

    def __init__(self, world: World) -> None:
        """Build the group; a collective over all ranks."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=world.timeout_s))
        self._flags = torch.zeros(len(Flags._fields), dtype=torch.uint8)
        self._work: dist.Work | None = None

    def exchange(self, stop: bool, save: bool) -> Flags:
        """Send this rank's flags and return those agreed from the previous call.

        Every rank calls this at every step. The first call returns no flag.

        Raises:
            RuntimeError: A rank did not take part within the world's time limit.
        """
        agreed = self.finish()
        self._flags = torch.tensor((stop, save), dtype=torch.uint8)
        self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def gather(self, value: T) -> list[T]:
        """Return every rank's ``value``, any small object, by rank; every rank calls this and waits.

        Raises:
            RuntimeError: A rank did not take part within the world's time limit.
        """
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def finish(self) -> Flags:
        """Wait for the last exchange and return what it agreed on, once; no flag if there is none."""
        if self._work is None:
            return Flags(stop=False, save=False)
        self._work.wait()
        self._work = None
        return Flags(*map(bool, self._flags.tolist()))
