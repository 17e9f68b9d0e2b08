"""Eager definitions of the fused operations: short, dense, and the meaning of their fast twins.

Used by tests and as documentation; the training path calls the fused modules beside this one.
Legend: N rows (tokens), D width, V vocabulary, M concepts, K kept latents, A targets per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_LABEL = -100
"""Label of a position that has no next token; it adds nothing to the loss."""

MASKED_TARGET = -1
"""Concept target that adds nothing to the loss (its attribution was not positive)."""


def lm_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy of a linear head in nats; hidden (N, D), weight (V, D), labels (N,)."""
    logits = (hidden @ weight.t()).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")


def concept_head(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Concept logits' summed loss, and their K largest values with ids.

    The loss is sum_n 1/A sum_a CE(c_n, target_na) in nats over the targets that are not masked,
    c = hidden W^T + b; hidden (N, D), weight (M, D), bias (M,), targets (N, A).
    Returns loss (), values (N, K), ids (N, K), largest first.
    """
    logits = (hidden @ weight.t()).float() + bias.float()
    log_probs = logits.log_softmax(-1)
    picked = log_probs.gather(1, targets.clamp_min(0))
    loss = -picked.masked_fill(targets == MASKED_TARGET, 0).sum() / targets.shape[1]
    values, ids = logits.topk(top_k, dim=-1)
    return loss, values.to(hidden.dtype), ids


def row_statistics(
    logits: Tensor, bias: Tensor | None, targets: Tensor, top_k: int, num_valid: int, first_column: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp (n, 1), targets' logits (n, A), K largest logits and their ids of rows of logits (n, M).

    A row's logits are c = logits + bias, -inf from ``num_valid`` on. ``targets`` (n, A) count from
    ``-first_column``; the logit of a target that is none of these columns is 0. Of equal logits the one with
    the smaller id comes first.
    """
    c = _real_logits(logits, bias, num_valid)
    ordered = c.sort(dim=-1, descending=True, stable=True)
    one_hot = _one_hot(targets - first_column, c.shape[1])
    target_logits = torch.where(one_hot, c.unsqueeze(1), 0).sum(-1)
    lse = c.logsumexp(-1, keepdim=True)
    return lse, target_logits, ordered.values[:, :top_k], ordered.indices[:, :top_k]


def row_gradient(
    logits: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, num_valid: int, first_column: int
) -> Tensor:
    """d/dc of 1/A sum_a (lse - c[target_a]) over the targets that are not negative; (n, M) fp32."""
    c = _real_logits(logits, bias, num_valid)
    share = (targets >= 0).float() / targets.shape[1]
    at_targets = (_one_hot(targets - first_column, c.shape[1]) * share.unsqueeze(-1)).sum(1)
    return (c - lse).exp() * share.sum(-1, keepdim=True) - at_targets


def _real_logits(logits: Tensor, bias: Tensor | None, num_valid: int) -> Tensor:
    c = logits.float() if bias is None else logits.float() + bias.float()
    return c.masked_fill(torch.arange(c.shape[1], device=c.device) >= num_valid, -torch.inf)


def _one_hot(columns: Tensor, num_columns: int) -> Tensor:
    return columns.unsqueeze(-1) == torch.arange(num_columns, device=columns.device)


def sparse_decode(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """y_n = sum_k values_nk W[ids_nk]; values, ids (N, K), weight (M, D), result (N, D)."""
    return torch.einsum("nk,nkd->nd", values, weight[ids])


def sparse_dots(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """d_nk = <rows_n, W[ids_nk]>; rows (N, D), ids (N, K), weight (M, D), result (N, K)."""
    return torch.einsum("nd,nkd->nk", rows, weight[ids])


def sparse_weight_grad(coefficients: Tensor, ids: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """G[m] = sum over (n, k) with ids_nk = m of coefficients_nk rows_n; result (num_rows, D)."""
    dense = rows.new_zeros(rows.shape[0], num_rows).scatter_add_(1, ids, coefficients)
    return dense.t() @ rows
