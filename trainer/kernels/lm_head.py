"""Linear head with cross entropy, in row chunks: no (N, V) logits outlive a chunk.

The gradients of a summed cross entropy do not depend on what follows it but for one scalar, so
they are taken in the forward, while a chunk's probabilities are at hand, and scaled in the backward.
Tensor-parallel ranks hold parts of the vocabulary and exchange two numbers per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.tensor import TensorGroup
from trainer.kernels.chunks import row_chunks
from trainer.kernels.columns import LocalColumns
from trainer.kernels.cross_entropy import cross_entropy_
from trainer.kernels.head_gradients import HeadGradients
from trainer.kernels.matmul import matmul
from trainer.kernels.reference import IGNORED_LABEL


class _LMHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, columns: LocalColumns, with_grad: bool
    ) -> Tensor:
        need_hidden, need_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        grads = HeadGradients(
            hidden, weight, need_hidden=need_hidden, need_weight=need_weight, need_bias=False
        )
        loss = hidden.new_zeros((), dtype=torch.float32)
        valid = (labels != IGNORED_LABEL).float().unsqueeze(1)
        for rows in row_chunks(hidden.shape[0], weight.shape[0], hidden.device):
            part = hidden[rows]
            logits = columns.mask_padding_(matmul(part, weight.t()))
            found = cross_entropy_(
                logits,
                labels[rows].unsqueeze(1),
                valid[rows],
                0,
                columns,
                with_grad=need_hidden or need_weight,
            )
            loss += found.loss
            if need_hidden or need_weight:
                grads.add(rows, logits, part, weight)
            del logits  # before the next chunk's are made
        ctx.grads, ctx.weight_dtype = grads, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        found = HeadGradients.taken_from(ctx)
        found.scale_(grads[0])
        grad_weight = None if found.weight is None else found.weight.to(ctx.weight_dtype)
        return found.hidden, grad_weight, None, None, None


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
        fp32 scalar, the same on all ranks of ``tp``; divide by the global number of tokens. It can be
        differentiated once.
    """
    columns = LocalColumns(vocab_size, weight.shape[0], tp or TensorGroup())
    loss: Tensor = _LMHead.apply(hidden, weight, labels, columns, torch.is_grad_enabled())
    return loss
