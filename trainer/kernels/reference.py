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


def distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy, and temperature^2 * summed KL(teacher || student) at a temperature, nats.

    Rows without a label count in neither; hidden (N, D), weight (V, D), teacher_hidden (N, D_t),
    teacher_weight (V, D_t), labels (N,).
    """
    logits = (hidden @ weight.t()).float()
    log_student = (logits / temperature).log_softmax(-1)
    log_teacher = ((teacher_hidden @ teacher_weight.t()).float() / temperature).log_softmax(-1)
    rows = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    divergence = temperature**2 * rows[labels != IGNORED_LABEL].sum()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum"), divergence


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


def summarise(
    logits: Tensor, index: Tensor, weights: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp (n, 1), weighted sum of the targets' logits (n, 1), K largest logits with their columns.

    Targets are the columns ``index`` (n, A); those of weight 0 are none. Of equal logits of a row (n, C) the
    one with the smaller column comes first.
    """
    c = logits.float()
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    by_column = _weights_by_column(index, weights, c)
    target_sum = torch.where(by_column == 0, 0, by_column * c).sum(-1, keepdim=True)
    lse = c.logsumexp(-1, keepdim=True)
    return lse, target_sum, ordered.values[:, :top_k], ordered.indices[:, :top_k]


def logit_gradient(logits: Tensor, lse: Tensor, index: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Rows c (n, C) -> total softmax(c) - sum_a weights_a e[index_a], (n, C) fp32."""
    c = logits.float()
    return (c - lse).exp() * total - _weights_by_column(index, weights, c)


def _weights_by_column(index: Tensor, weights: Tensor, c: Tensor) -> Tensor:
    """Sum of a row's target weights at each column, (n, C)."""
    one_hot = index.unsqueeze(-1) == torch.arange(c.shape[1], device=c.device)
    return (one_hot * weights.unsqueeze(-1)).sum(1)


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
