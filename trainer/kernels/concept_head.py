"""Concept logits that are never kept: loss, top-K and the targets' ranks in one pass over row chunks.

Forward takes the gradients of the summed loss chunk by chunk, as ``trainer.kernels.lm_head`` does;
backward adds what arrives through the K kept values, which is sparse. Three dense matmuls in all.
Tensor-parallel ranks hold parts of the dictionary and exchange 2 + 2K numbers per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.tensor import TensorGroup
from trainer.kernels.chunks import row_blocks, row_chunks
from trainer.kernels.columns import LocalColumns
from trainer.kernels.cross_entropy import cross_entropy_
from trainer.kernels.head_gradients import HeadGradients
from trainer.kernels.matmul import linear
from trainer.kernels.reference import MASKED_TARGET


class ConceptHeadOutput(NamedTuple):
    """What the concept head says about N tokens."""

    loss: Tensor
    """() fp32: sum over tokens of the mean over A targets of the cross entropy, in nats."""
    values: Tensor
    """(N, K) largest logits, largest first, in the dtype of the input."""
    ids: Tensor
    """(N, K) int64, the concepts of ``values``."""
    rank_sum: Tensor
    """() fp32: sum of the targets' ranks among the M logits, 1 is best; 0 when not asked for."""


def _sum_of_ranks(logits: Tensor, targets: Tensor, columns: LocalColumns) -> Tensor:
    """Sum of the targets' ranks; logits (n, local columns), targets (n, A)."""
    index, here = columns.find(targets)
    target_logits = columns.tp.sum(logits.gather(1, index).float().masked_fill(~here, 0))
    blocks = row_blocks(logits)
    above = torch.cat([_count_above(logits[rows], target_logits[rows]) for rows in blocks])
    return ((columns.tp.sum(above) + 1) * (targets != MASKED_TARGET)).sum()


def _count_above(logits: Tensor, bounds: Tensor) -> Tensor:
    """Logits of a row (n, C) above each of its bounds (n, A): (n, A)."""
    # One comparison pass per bound: an (n, A, C) tensor would be A times the logits.
    return torch.stack([(logits > bound.unsqueeze(1)).sum(1) for bound in bounds.unbind(1)], dim=1)


class _ConceptHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor | None,
        top_k: int,
        columns: LocalColumns,
        with_ranks: bool,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_rows = hidden.shape[0]
        with_grad = with_grad and targets is not None
        grads = HeadGradients(
            hidden, weight, need_hidden=with_grad, need_weight=with_grad, need_bias=with_grad
        )
        if targets is None:
            targets = torch.full((num_rows, 1), MASKED_TARGET, device=hidden.device)
        shares = (targets != MASKED_TARGET).float() / targets.shape[1]
        loss = hidden.new_zeros((), dtype=torch.float32)
        rank_sum = hidden.new_zeros((), dtype=torch.float32)
        values = hidden.new_empty(num_rows, top_k)
        ids = torch.empty(num_rows, top_k, dtype=torch.int64, device=hidden.device)
        for rows in row_chunks(num_rows, weight.shape[0], hidden.device):
            part = hidden[rows]
            logits = columns.mask_padding_(linear(part, weight, bias))
            if with_ranks:
                rank_sum += _sum_of_ranks(logits, targets[rows], columns)
            found = cross_entropy_(logits, targets[rows], shares[rows], top_k, columns, with_grad=with_grad)
            loss += found.loss
            values[rows], ids[rows] = found.values, found.ids
            if with_grad:
                grads.add(rows, logits, part, weight)
            del logits  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, ids)
        ctx.grads, ctx.columns, ctx.bias_dtype = grads, columns, bias.dtype
        ctx.mark_non_differentiable(ids, rank_sum)
        ctx.set_materialize_grads(False)
        return loss, values, ids, rank_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensors
        grad_loss, grad_values = grads[0], grads[1]
        found = HeadGradients.taken_from(ctx)
        if grad_loss is None:
            found.drop()
        else:
            found.scale_(grad_loss)
        if grad_values is not None:
            columns: LocalColumns = ctx.columns
            # Each rank read its own columns of the compress weight: their gradients add up.
            summed = columns.tp.sum(grad_values)
            index, here = columns.find(ids)
            found.add_values(summed, index, here, hidden, weight)
        grad_weight = None if found.weight is None else found.weight.to(weight.dtype)
        grad_bias = None if found.bias is None else found.bias.to(ctx.bias_dtype)
        return found.hidden, grad_weight, grad_bias, None, None, None, None, None


def concept_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor | None,
    top_k: int,
    *,
    num_concepts: int | None = None,
    tp: TensorGroup | None = None,
    with_ranks: bool = False,
) -> ConceptHeadOutput:
    """Concept logits c = hidden W^T + b, reduced to their loss and their K largest entries.

    Args:
        hidden: (N, D), the same on all tensor-parallel ranks; their gradients are partial and have to
            be summed.
        weight: (M, D), or this rank's rows of it.
        bias: (M,), or this rank's part.
        targets: (N, A) int64 concept ids, ``MASKED_TARGET`` for none; no loss when ``None``.
        top_k: K.
        num_concepts: rows of the whole weight that are not padding; all by default.
        tp: the ranks that hold the other rows.
        with_ranks: also rank the targets among all M logits (A more passes over them).

    Returns:
        The same on all ranks of ``tp``; it can be differentiated once.
    """
    tp = tp or TensorGroup()
    columns = LocalColumns(num_concepts or weight.shape[0] * tp.size, weight.shape[0], tp)
    return ConceptHeadOutput(
        *_ConceptHead.apply(
            hidden, weight, bias, targets, top_k, columns, with_ranks, torch.is_grad_enabled()
        )
    )
