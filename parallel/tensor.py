"""Tensor parallelism: the ranks that compute one share of the batch together.

Between the sublayers every rank holds its part of the sequence; a sublayer gathers the sequence, works
on its part of the weights and sums the partial results back into sequence parts (Megatron-LM sequence
parallelism, Korthikanti et al. 2022, arXiv 2205.05198). Without tensor parallelism every function
returns its input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


class TensorGroup:
    """One rank's place among the ranks that share a batch; by default it is alone.

    Args:
        group: their process group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.name = "" if group is None else group.group_name

    def split(self, total: int) -> slice:
        """This rank's equal part of ``total`` rows, columns or tokens.

        Raises:
            ValueError: the ranks do not divide it.
        """
        if total % self.size:
            raise ValueError(f"{total} cannot be split evenly over {self.size} tensor-parallel ranks")
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def gather_sequence(self, x: Tensor) -> Tensor:
        """(B, T/tp, ...) parts -> the whole (B, T, ...); backward sums what every rank sends back."""
        return x if self.size == 1 else _GatherSequence.apply(x, self)

    def sum_to_sequence(self, x: Tensor) -> Tensor:
        """Partial (B, T, ...) of every rank -> this rank's part (B, T/tp, ...) of their sum."""
        return x if self.size == 1 else _SumToSequence.apply(x, self)

    def columns_to_sequence(self, x: Tensor) -> Tensor:
        """(B, T, D/tp) columns of every rank -> this rank's part of the sequence, (B, T/tp, D)."""
        return x if self.size == 1 else _ColumnsToSequence.apply(x, self)

    def sum_parts(self, x: Tensor) -> Tensor:
        """Partial x of every rank -> their sum, whole on every rank.

        For what each rank goes on with in the same way: backward hands the gradient of the sum to
        every part and communicates nothing.
        """
        return x if self.size == 1 else _SumParts.apply(x, self)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, not differentiable."""
        if self.size == 1:
            return x
        out = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self.group)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        """(...) of every rank -> (tp, ...), not differentiable."""
        if self.size == 1:
            return x.unsqueeze(0)
        return all_gather(x.reshape(-1), self.size, self.name).view(self.size, *x.shape)

    def share_rows(self, x: Tensor) -> Tensor:
        """This rank's share of the rows of x (R, ...), equally many on every rank.

        Where the ranks do not divide R, the last row is repeated.
        """
        num_rows = x.shape[0]
        share = -(-num_rows // self.size)
        if share * self.size == num_rows:
            return x[self.rank * share : (self.rank + 1) * share]
        rows = torch.arange(self.rank * share, (self.rank + 1) * share, device=x.device)
        return x[rows.clamp_max(num_rows - 1)]

    def gather_rows(self, x: Tensor, num_rows: int) -> Tensor:
        """Inverse of :meth:`share_rows`, not differentiable; num_rows is R."""
        if self.size == 1 or num_rows == 0:
            return x
        return self.all_gather(x).flatten(0, 1)[:num_rows]


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank computes with.

    A parameter that every rank holds whole is used on another part of the sequence by each of them,
    so its gradient is declared partial; a sharded one's gradient is complete.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    placements = [Partial() if placement == Replicate() else placement for placement in parameter.placements]
    return parameter.to_local(grad_placements=placements)


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """Tensors x (n, ...) of the ``size`` ranks of the group with that name -> (size * n, ...)."""
    # As an operation that returns its result, not one that fills a buffer: only that can be compiled,
    # and kept while what surrounds it is recomputed.
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x, size, group)
    out: Tensor = torch.ops._c10d_functional.wait_tensor(gathered)
    return out


def _gather(x: Tensor, tp: TensorGroup) -> Tensor:
    return tp.all_gather(x).transpose(0, 1).flatten(1, 2)


def _sum_scatter(x: Tensor, tp: TensorGroup) -> Tensor:
    parts = x.unflatten(1, (tp.size, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    summed = torch.ops._c10d_functional.reduce_scatter_tensor(parts, "sum", tp.size, tp.name)
    out: Tensor = torch.ops._c10d_functional.wait_tensor(summed)
    return out


def _exchange(parts: Tensor, tp: TensorGroup) -> Tensor:
    """Part i of every rank goes to rank i; parts (tp, ...) -> (tp, ...)."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received.view(-1), parts.view(-1), group=tp.group)
    return received


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp = tp
        return _gather(x, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_scatter(grads[0], ctx.tp), None


class _SumToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp = tp
        return _sum_scatter(x, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.tp), None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        return tp.sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ColumnsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp = tp
        by_sequence = x.unflatten(1, (tp.size, -1)).transpose(0, 1)  # (tp, B, T/tp, D/tp)
        return _exchange(by_sequence, tp).movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        tp = ctx.tp
        by_column = grads[0].unflatten(-1, (tp.size, -1)).movedim(-2, 0)  # (tp, B, T/tp, D/tp)
        return _exchange(by_column, tp).transpose(0, 1).flatten(1, 2), None
