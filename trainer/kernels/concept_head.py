"""Concept logits that are never kept: loss, top-K and the targets' ranks in one pass over row chunks.

Forward takes the gradients of the summed loss chunk by chunk, as ``trainer.kernels.lm_head`` does;
backward adds what arrives through the K kept values, which is sparse. Three dense matmuls in all.
Tensor-parallel ranks hold parts of the dictionary and exchange 3 + 2K numbers per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.tensor import TensorGroup
from trainer.kernels.chunks import row_chunks
from trainer.kernels.reference import MASKED_TARGET
from trainer.kernels.sparse import add_sparse_weight_grad
from trainer.kernels.vocabulary import LocalColumns


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


class _Best(NamedTuple):
    """What all columns say about n rows."""

    lse: Tensor  # (n, 1)
    values: Tensor  # (n, K)
    ids: Tensor  # (n, K), global
    target_sum: Tensor  # (n, 1) logits of the targets, weighted


def _merge(logits: Tensor, weighted_targets: Tensor, top_k: int, columns: LocalColumns) -> _Best:
    """Exact log-sum-exp and top-K over all ranks' columns: one all-gather of 3 + 2K numbers per row."""
    own = logits.topk(min(top_k, logits.shape[1]), dim=-1)
    tp = columns.tp
    if tp.size == 1:
        return _Best(logits.logsumexp(-1, keepdim=True), own.values, own.indices, weighted_targets)
    highest = own.values[:, :1]
    # A rank whose columns are all padding has no finite maximum; it adds nothing.
    total = (logits - highest.clamp_min(torch.finfo(logits.dtype).min)).exp().sum(-1, keepdim=True)
    ids = (own.indices + columns.start).to(torch.int32).view(torch.float32)  # bits, not values
    packed = torch.cat([highest, total, weighted_targets, own.values, ids], dim=-1)
    gathered = tp.all_gather(packed)
    top = gathered[..., :1].amax(0)
    lse = top + (gathered[..., 1:2] * (gathered[..., :1] - top).exp()).sum(0).log()
    candidates = gathered[..., 3:].unflatten(-1, (2, -1))  # (tp, n, 2, k)
    values = candidates[:, :, 0].transpose(0, 1).flatten(1)
    all_ids = candidates[:, :, 1].contiguous().view(torch.int32).transpose(0, 1).flatten(1)
    best = values.topk(top_k, dim=-1)
    return _Best(lse, best.values, all_ids.gather(1, best.indices).long(), gathered[..., 2:3].sum(0))


def _sum_of_ranks(logits: Tensor, picked: Tensor, valid: Tensor, tp: TensorGroup) -> Tensor:
    """Sum of the targets' ranks; ``picked`` (n, A) holds their logits on the rank that has them, else 0."""
    target_logits = tp.sum(picked)
    # One comparison pass per target: an (n, A, M) tensor would be A times the logits.
    above = torch.stack([(logits > column.unsqueeze(1)).sum(1) for column in target_logits.unbind(1)], 1)
    return ((tp.sum(above) + 1) * valid).sum()


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
        loss = hidden.new_zeros((), dtype=torch.float32)
        rank_sum = hidden.new_zeros((), dtype=torch.float32)
        values = hidden.new_empty(num_rows, top_k)
        ids = torch.empty(num_rows, top_k, dtype=torch.int64, device=hidden.device)
        grads = _LossGradients.like(hidden, weight, bias) if with_grad and targets is not None else None
        for rows in row_chunks(num_rows, weight.shape[0], hidden.device):
            part = hidden[rows]
            logits = columns.mask_padding_((part @ weight.t()).float() + bias.float())
            if targets is None:
                best = _merge(logits, logits.new_zeros(len(part), 1), top_k, columns)
            else:
                index, here = columns.find(targets[rows])
                valid = targets[rows] != MASKED_TARGET
                share = valid.float() / targets.shape[1]
                picked = logits.gather(1, index).masked_fill(~here, 0)
                best = _merge(logits, (picked * share).sum(1, keepdim=True), top_k, columns)
                loss += (best.lse * share.sum(1, keepdim=True) - best.target_sum).sum()
                if with_ranks:
                    rank_sum += _sum_of_ranks(logits, picked, valid, columns.tp)
            values[rows], ids[rows] = best.values.to(values.dtype), best.ids
            if grads is not None and targets is not None:
                dlogits = logits.sub_(best.lse).exp_().mul_(share.sum(1, keepdim=True))
                dlogits.scatter_add_(1, index, -share * here)
                grads.add(rows, dlogits, part, weight)
        ctx.save_for_backward(hidden, weight, ids, *(grads or (None, None, None)))
        ctx.columns, ctx.bias_dtype = columns, bias.dtype
        ctx.mark_non_differentiable(ids, rank_sum)
        ctx.set_materialize_grads(False)
        return loss, values, ids, rank_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, *saved = ctx.saved_tensors
        grad_loss, grad_values = grads[0], grads[1]
        if grad_loss is not None and saved[0] is not None:
            total = _LossGradients(*saved).scaled(grad_loss)
        else:
            total = _LossGradients.like(hidden, weight, hidden.new_zeros(weight.shape[0])).zeroed()
        if grad_values is not None:
            columns: LocalColumns = ctx.columns
            # Each rank read its own columns of the compress weight: their gradients add up.
            summed = columns.tp.sum(grad_values)
            index, here = columns.find(ids)
            total.add_values(summed.masked_fill(~here, 0), index, hidden, weight)
        return (
            total.hidden,
            total.weight.to(weight.dtype),
            total.bias.to(ctx.bias_dtype),
            None,
            None,
            None,
            None,
            None,
        )


class _LossGradients(NamedTuple):
    """Gradients of hidden rows (N, D), weight (M, D) fp32 and bias (M,) fp32."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def like(cls, hidden: Tensor, weight: Tensor, bias: Tensor) -> _LossGradients:
        """Uninitialised rows; weight and bias at 0, in fp32 because many tokens add up."""
        zeros = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (weight, bias))
        return cls(torch.empty_like(hidden), *zeros)

    def zeroed(self) -> _LossGradients:
        """With rows at 0."""
        self.hidden.zero_()
        return self

    def scaled(self, factor: Tensor) -> _LossGradients:
        """All gradients times a scalar."""
        return _LossGradients(
            self.hidden * factor.to(self.hidden.dtype), self.weight * factor, self.bias * factor
        )

    def add(self, rows: slice, dlogits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add what dense logit gradients (n, M) of a chunk of rows bring."""
        self.bias.add_(dlogits.sum(0))
        dlogits = dlogits.to(hidden.dtype)
        torch.mm(dlogits, weight, out=self.hidden[rows])
        self.weight.add_(dlogits.t() @ hidden)

    def add_values(self, grad_values: Tensor, ids: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add what gradients (N, K) of the kept logits bring: K rows per token."""
        self.hidden.add_(
            F.embedding_bag(ids, weight, per_sample_weights=grad_values.to(weight.dtype), mode="sum")
        )
        add_sparse_weight_grad(self.weight, grad_values, ids, hidden)
        self.bias.index_add_(0, ids.reshape(-1), grad_values.reshape(-1).float())


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
        The same on all ranks of ``tp``.
    """
    tp = tp or TensorGroup()
    columns = LocalColumns(num_concepts or weight.shape[0] * tp.size, weight.shape[0], tp)
    return ConceptHeadOutput(
        *_ConceptHead.apply(
            hidden, weight, bias, targets, top_k, columns, with_ranks, torch.is_grad_enabled()
        )
    )
