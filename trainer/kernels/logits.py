"""Rows of logits, reduced and overwritten by their gradient, in plain torch: on CPUs, or without Triton.

Logits have the compute precision and are replaced in place; everything that is computed from them is fp32,
for a block of rows at a time. Called through ``trainer.kernels.ops``, which documents it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.kernels import topk
from trainer.kernels.chunks import row_blocks

_Summary = tuple[Tensor, Tensor, Tensor, Tensor]


def logit_pass_(logits: Tensor, index: Tensor, weights: Tensor, total: Tensor, top_k: int) -> _Summary:
    """See :func:`trainer.kernels.ops.logit_pass_`."""
    blocks = row_blocks(logits)
    return _joined(
        [_pass_block_(logits[rows], index[rows], weights[rows], total[rows], top_k) for rows in blocks]
    )


def _pass_block_(logits: Tensor, index: Tensor, weights: Tensor, total: Tensor, top_k: int) -> _Summary:
    values, ids = _largest(logits, top_k)
    target_sum = _target_sum(logits, index, weights)
    highest = values[:, :1] if top_k else logits.amax(-1, keepdim=True)
    probs = logits.softmax(-1, dtype=torch.float32)
    # The largest probability is exp(highest - lse): at least 1/C, so its logarithm loses nothing.
    lse = highest.float() - probs.amax(-1, keepdim=True).log()
    logits.copy_(probs.mul_(total).scatter_add_(1, index, -weights))
    return lse, target_sum, values, ids


def summarise(logits: Tensor, index: Tensor, weights: Tensor, top_k: int) -> _Summary:
    """See :func:`trainer.kernels.ops.summarise`."""
    return _joined(
        [
            (
                logits[rows].float().logsumexp(-1, keepdim=True),
                _target_sum(logits[rows], index[rows], weights[rows]),
                *_largest(logits[rows], top_k),
            )
            for rows in row_blocks(logits)
        ]
    )


def logit_gradient_(logits: Tensor, lse: Tensor, index: Tensor, weights: Tensor, total: Tensor) -> None:
    """See :func:`trainer.kernels.ops.logit_gradient_`."""
    for rows in row_blocks(logits):
        _gradient_block_(logits[rows], lse[rows], index[rows], weights[rows], total[rows])


def _gradient_block_(logits: Tensor, lse: Tensor, index: Tensor, weights: Tensor, total: Tensor) -> None:
    probs = (logits.float() - lse).exp_().mul_(total)
    logits.copy_(probs.scatter_add_(1, index, -weights))


def _target_sum(logits: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    # Not by multiplying with the weight 0: the column that stands in for none may be -inf.
    picked = logits.gather(1, index).float().masked_fill(weights == 0, 0)
    return (picked * weights).sum(1, keepdim=True)


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k == 0:
        return logits[:, :0], logits.new_empty(len(logits), 0, dtype=torch.int64)
    return largest(logits, k)


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`trainer.kernels.ops.top_k`."""
    return topk.top_k(scores, k)


def _joined(blocks: list[_Summary]) -> _Summary:
    lse, target_sum, values, ids = (torch.cat(column) for column in zip(*blocks, strict=True))
    return lse, target_sum, values, ids
