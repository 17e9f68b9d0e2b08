"""Linear head with cross entropy, in row chunks: no (N, V) logits outlive a chunk.

The gradients of a summed cross entropy do not depend on what follows it but for one scalar, so
they are taken in the forward, while a chunk's probabilities are at hand, and scaled in the backward.
Tensor-parallel ranks hold parts of the vocabulary and exchange three numbers per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.tensor import TensorGroup
from trainer.kernels.chunks import row_chunks
from trainer.kernels.reference import IGNORED_LABEL
from trainer.kernels.vocabulary import LocalColumns, merge_logsumexp


class _LMHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, columns: LocalColumns, with_grad: bool
    ) -> Tensor:
        need_hidden = with_grad and ctx.needs_input_grad[0]
        need_weight = with_grad and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for rows in row_chunks(hidden.shape[0], weight.shape[0], hidden.device):
            part = hidden[rows]
            logits = columns.mask_padding_((part @ weight.t()).float())
            index, here = columns.find(labels[rows].unsqueeze(1))
            picked = logits.gather(1, index).masked_fill(~here, 0)
            lse, (label_logit,) = merge_logsumexp(logits, [picked], columns.tp)
            valid = (labels[rows] != IGNORED_LABEL).unsqueeze(1)
            loss += ((lse - label_logit) * valid).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            probs = logits.sub_(lse).exp_().mul_(valid)
            probs.scatter_add_(1, index, -here.to(probs.dtype))
            probs = probs.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(probs, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += probs.t() @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def lm_head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, tp: TensorGroup | None = None
) -> Tensor:
    """Summed next-token cross entropy in nats over the labels that are not ``IGNORED_LABEL``.

    Args:
        hidden: (N, D), after the final LayerNorm, the same on all tensor-parallel ranks; their
            gradients are partial and have to be summed.
        weight: (V, D), V at least ``vocab_size``, or this rank's rows of it; a frozen weight gets no
            gradient and costs none.
        labels: (N,) int64, below ``vocab_size`` or ``IGNORED_LABEL``.
        vocab_size: rows beyond it are padding without a logit.
        tp: the ranks that hold the other rows.

    Returns:
        fp32 scalar, the same on all ranks of ``tp``; divide by the global number of tokens.
    """
    columns = LocalColumns(vocab_size, weight.shape[0], tp or TensorGroup())
    loss: Tensor = _LMHead.apply(hidden, weight, labels, columns, torch.is_grad_enabled())
    return loss
