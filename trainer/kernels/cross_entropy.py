"""Cross entropy of rows of logits whose columns are spread over ranks, and their K largest logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels.columns import LocalColumns
from trainer.kernels.ops import logit_gradient_, logit_pass_, summarise


class RowLosses(NamedTuple):
    """The loss of n rows of logits, and what else is kept of them; the same on all ranks."""

    loss: Tensor
    """() fp32 sum over the rows, nats."""
    values: Tensor
    """(n, K) largest logits, largest first."""
    ids: Tensor
    """(n, K) int64, their global columns."""


def cross_entropy_(
    logits: Tensor, ids: Tensor, weights: Tensor, top_k: int, columns: LocalColumns, *, with_grad: bool
) -> RowLosses:
    """Weighted cross entropies of rows, and their K largest logits.

    Ranks exchange 2 + 2K numbers of fp32 per row in one all-gather: log-sum-exp, the targets' weighted
    logits, values and ids.

    Args:
        logits: (n, local columns); replaced by their gradient if ``with_grad``.
        ids: (n, A) int64 global columns of the targets.
        weights: (n, A) fp32 of the targets, 0 for none.
        top_k: K, also 0.
        columns: which columns these are.
        with_grad: whether the gradient is wanted.
    """
    index, here = columns.find(ids)
    here_weights, total = weights * here, weights.sum(1, keepdim=True)
    if columns.tp.size == 1 and with_grad:
        # Alone, no other rank's columns have to be heard of between the sum and the gradient.
        rows = _RowSummary(*logit_pass_(logits, index, here_weights, total, top_k))
    else:
        own = summarise(logits, index, here_weights, min(top_k, logits.shape[1]))
        rows = _merge(_RowSummary(*own), top_k, columns)
        if with_grad:
            logit_gradient_(logits, rows.lse, index, here_weights, total)
    loss = (rows.lse * total - rows.target_sum).sum()
    return RowLosses(loss, rows.values, rows.ids)


class _RowSummary(NamedTuple):
    lse: Tensor  # (n, 1)
    target_sum: Tensor  # (n, 1)
    values: Tensor  # (n, K)
    ids: Tensor  # (n, K)


def _merge(own: _RowSummary, top_k: int, columns: LocalColumns) -> _RowSummary:
    """Exact log-sum-exp, top-K and sum over all ranks' columns."""
    if columns.tp.size == 1:
        return own
    ids = (own.ids + columns.start).to(torch.int32).view(torch.float32)  # bits, not values
    gathered = columns.tp.all_gather(torch.cat([own.lse, own.target_sum, own.values.float(), ids], dim=-1))
    candidates = gathered[..., 2:].unflatten(-1, (2, -1))  # (tp, n, 2, k)
    values = candidates[:, :, 0].transpose(0, 1).flatten(1)
    all_ids = candidates[:, :, 1].contiguous().view(torch.int32).transpose(0, 1).flatten(1)
    # Stable, not topk: of equal logits those of the first rank have the smaller ids.
    ordered = values.sort(dim=-1, descending=True, stable=True)
    best, places = ordered.values[:, :top_k], ordered.indices[:, :top_k]
    return _RowSummary(
        gathered[..., :1].logsumexp(0),
        gathered[..., 1:2].sum(0),
        best.to(own.values.dtype),
        all_ids.gather(1, places).long(),
    )
