"""Concept logits that are never kept: loss, top-K and the targets' ranks in one pass over row chunks.

Forward takes the gradients of the summed loss chunk by chunk, as ``trainer.kernels.lm_head`` does;
backward adds what arrives through the K kept values, which is sparse. Three dense matmuls in all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.kernels.chunks import row_chunks
from trainer.kernels.reference import MASKED_TARGET
from trainer.kernels.sparse import add_sparse_weight_grad


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


def _sum_of_ranks(logits: Tensor, target_logits: Tensor, valid: Tensor) -> Tensor:
    # One comparison pass per target: an (N, A, M) tensor would be A times the logits.
    above = [(logits > column.unsqueeze(1)).sum(1) for column in target_logits.unbind(1)]
    return ((torch.stack(above, 1) + 1) * valid).sum()


class _ConceptHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor | None,
        top_k: int,
        with_ranks: bool,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_rows = hidden.shape[0]
        loss = hidden.new_zeros((), dtype=torch.float32)
        rank_sum = hidden.new_zeros((), dtype=torch.float32)
        values = hidden.new_empty(num_rows, top_k)
        ids = torch.empty(num_rows, top_k, dtype=torch.int64, device=hidden.device)
        grad_hidden = grad_weight = grad_bias = None
        if with_grad and targets is not None:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        for rows in row_chunks(num_rows, weight.shape[0], hidden.device):
            part = hidden[rows]
            logits = (part @ weight.t()).float() + bias.float()
            top = logits.topk(top_k, dim=-1)
            values[rows], ids[rows] = top.values.to(values.dtype), top.indices
            if targets is None:
                continue
            valid = targets[rows] != MASKED_TARGET
            index = targets[rows].clamp_min(0)
            share = valid.float() / targets.shape[1]
            lse = logits.logsumexp(-1, keepdim=True)
            target_logits = logits.gather(1, index)
            loss += ((lse - target_logits) * share).sum()
            if with_ranks:
                rank_sum += _sum_of_ranks(logits, target_logits, valid)
            if grad_hidden is None or grad_weight is None or grad_bias is None:
                continue
            dlogits = logits.sub_(lse).exp_().mul_(share.sum(1, keepdim=True))
            dlogits.scatter_add_(1, index, -share)
            grad_bias += dlogits.sum(0)
            dlogits = dlogits.to(hidden.dtype)
            torch.mm(dlogits, weight, out=grad_hidden[rows])
            grad_weight += dlogits.t() @ part
        ctx.save_for_backward(hidden, weight, ids, grad_hidden, grad_weight, grad_bias)
        ctx.bias_dtype = bias.dtype
        ctx.mark_non_differentiable(ids, rank_sum)
        ctx.set_materialize_grads(False)
        return loss, values, ids, rank_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        grad_loss, grad_values = grads[0], grads[1]
        if grad_loss is not None and grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
            grad_weight, grad_bias = grad_weight * grad_loss, grad_bias * grad_loss
        else:
            grad_hidden = torch.zeros_like(hidden)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        if grad_values is not None:
            grad_values = grad_values.contiguous()
            grad_hidden += F.embedding_bag(
                ids, weight, per_sample_weights=grad_values.to(weight.dtype), mode="sum"
            )
            add_sparse_weight_grad(grad_weight, grad_values, ids, hidden)
            grad_bias.index_add_(0, ids.reshape(-1), grad_values.reshape(-1).float())
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            grad_bias.to(ctx.bias_dtype),
            None,
            None,
            None,
            None,
        )


def concept_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor | None,
    top_k: int,
    *,
    with_ranks: bool = False,
) -> ConceptHeadOutput:
    """Concept logits c = hidden W^T + b, reduced to their loss and their K largest entries.

    Args:
        hidden: (N, D).
        weight: (M, D).
        bias: (M,).
        targets: (N, A) int64 concept ids, ``MASKED_TARGET`` for none; no loss when ``None``.
        top_k: K.
        with_ranks: also rank the targets among all M logits (A more passes over them).
    """
    return ConceptHeadOutput(
        *_ConceptHead.apply(hidden, weight, bias, targets, top_k, with_ranks, torch.is_grad_enabled())
    )
