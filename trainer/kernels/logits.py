"""Rows of logits, reduced and overwritten by their gradient: the passes that both heads share.

A row of n logits c with targets t_1..t_A of weights w_1..w_A has the loss

    sum_a w_a (lse(c) - c[t_a])      and the gradient      (sum_a w_a) softmax(c) - sum_a w_a e[t_a]

:func:`logit_pass_` computes both at once; tensor-parallel ranks, which see a part of the columns, exchange
what :func:`summarise` says of them before :func:`gradient_`. Logits have the compute precision and are
replaced in place; everything that is computed from them is fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels.chunks import row_blocks


class Targets(NamedTuple):
    """The columns of n rows that a loss looks at."""

    columns: Tensor
    """(n, A) int64; any where the weight is 0."""
    weights: Tensor
    """(n, A) fp32; 0 where the column is another rank's or there is no target."""
    total: Tensor
    """(n, 1) fp32 sum of a row's weights over all ranks."""

    def rows(self, rows: slice) -> Targets:
        """Those of some rows."""
        return Targets(*(part[rows] for part in self))


class RowSummary(NamedTuple):
    """What is kept of n rows of logits."""

    lse: Tensor
    """(n, 1) fp32 log-sum-exp."""
    values: Tensor
    """(n, K) the K largest in the logits' dtype, largest first."""
    ids: Tensor
    """(n, K) int64, their columns."""


def logit_pass_(logits: Tensor, targets: Targets, top_k: int) -> RowSummary:
    """Reduce rows (n, C) and replace them by the gradient of their loss."""
    blocks = row_blocks(logits)
    return _joined([_pass_block_(logits[rows], targets.rows(rows), top_k) for rows in blocks])


def _pass_block_(logits: Tensor, targets: Targets, top_k: int) -> RowSummary:
    values, ids = _largest(logits, top_k)
    highest = values[:, :1] if top_k else logits.amax(-1, keepdim=True)
    probs = logits.softmax(-1, dtype=torch.float32)
    # The largest probability is exp(highest - lse): at least 1/C, so its logarithm loses nothing.
    lse = highest.float() - probs.amax(-1, keepdim=True).log()
    logits.copy_(probs.mul_(targets.total).scatter_add_(1, targets.columns, -targets.weights))
    return RowSummary(lse, values, ids)


def summarise(logits: Tensor, top_k: int) -> RowSummary:
    """Reduce rows (n, C) and leave them as they are; a row of -inf alone has the log-sum-exp -inf."""
    return _joined(
        [
            RowSummary(logits[rows].float().logsumexp(-1, keepdim=True), *_largest(logits[rows], top_k))
            for rows in row_blocks(logits)
        ]
    )


def gradient_(logits: Tensor, lse: Tensor, targets: Targets) -> None:
    """Replace rows (n, C) by the gradient of their loss; lse (n, 1) is that of all ranks' columns."""
    for rows in row_blocks(logits):
        _gradient_block_(logits[rows], lse[rows], targets.rows(rows))


def _gradient_block_(logits: Tensor, lse: Tensor, targets: Targets) -> None:
    probs = (logits.float() - lse).exp_().mul_(targets.total)
    logits.copy_(probs.scatter_add_(1, targets.columns, -targets.weights))


def _largest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if top_k == 0:
        return logits[:, :0], logits.new_empty(len(logits), 0, dtype=torch.int64)
    values, ids = logits.topk(top_k, dim=-1)
    return values, ids


def _joined(blocks: list[RowSummary]) -> RowSummary:
    return RowSummary(*(torch.cat(column) for column in zip(*blocks, strict=True)))
