"""Linear head with cross entropy, in row chunks: no (N, V) logits outlive a chunk.

The gradients of a summed cross entropy do not depend on what follows it but for one scalar, so
they are taken in the forward, while a chunk's probabilities are at hand, and scaled in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.kernels.chunks import row_chunks
from trainer.kernels.reference import IGNORED_LABEL


class _LMHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, with_grad: bool) -> Tensor:
        need_hidden = with_grad and ctx.needs_input_grad[0]
        need_weight = with_grad and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for rows in row_chunks(hidden.shape[0], weight.shape[0], hidden.device):
            part = hidden[rows]
            logits = (part @ weight.t()).float()
            lse = logits.logsumexp(-1, keepdim=True)
            valid = (labels[rows] != IGNORED_LABEL).unsqueeze(1)
            index = labels[rows].clamp_min(0).unsqueeze(1)
            loss += ((lse - logits.gather(1, index)) * valid).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            probs = logits.sub_(lse).exp_().mul_(valid)
            probs.scatter_add_(1, index, -valid.to(probs.dtype))
            probs = probs.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(probs, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += probs.t() @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype),
            None,
            None,
        )


def lm_head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross entropy in nats over the labels that are not ``IGNORED_LABEL``.

    Args:
        hidden: (N, D), after the final LayerNorm.
        weight: (V, D); a frozen weight gets no gradient and costs none.
        labels: (N,) int64, below V or ``IGNORED_LABEL``.

    Returns:
        fp32 scalar; divide by the global number of tokens.
    """
    loss: Tensor = _LMHead.apply(hidden, weight, labels, torch.is_grad_enabled())
    return loss
