"""The operations of ``trainer.kernels.ops`` in plain torch: what runs on CPUs, and on GPUs without Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.kernels.chunks import row_chunks


def _real_logits_(logits: Tensor, bias: Tensor | None, num_valid: int) -> Tensor:
    """Logits in fp32 with their bias, -inf where there is padding; in place where they are fp32 already."""
    x = logits.float()
    if bias is not None:
        x.add_(bias)
    if num_valid < x.shape[1]:
        x[:, num_valid:] = -torch.inf
    return x


def _real_logits(logits: Tensor, bias: Tensor | None, num_valid: int) -> Tensor:
    return _real_logits_(logits.to(torch.float32, copy=True), bias, num_valid)


def _find(targets: Tensor, first_column: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Column of each target and whether it is here; elsewhere the column is 0."""
    index = targets - first_column
    here = (index >= 0) & (index < num_columns)
    return index.masked_fill(~here, 0), here


def _statistics(x: Tensor, targets: Tensor, top_k: int, first_column: int) -> tuple[Tensor, ...]:
    index, here = _find(targets, first_column, x.shape[1])
    best = x.topk(top_k, dim=-1)
    return x.logsumexp(-1, keepdim=True), x.gather(1, index).masked_fill(~here, 0), *best


def _differentiate_(x: Tensor, targets: Tensor, lse: Tensor, first_column: int) -> None:
    share = (targets >= 0).float() / targets.shape[1]
    x.sub_(lse).exp_().mul_(share.sum(1, keepdim=True))
    index, here = _find(targets, first_column, x.shape[1])
    x.scatter_add_(1, index, -share * here)


def row_statistics(
    logits: Tensor, bias: Tensor | None, targets: Tensor, top_k: int, num_valid: int, first_column: int
) -> tuple[Tensor, ...]:
    """See :func:`trainer.kernels.ops.row_statistics`."""
    return _statistics(_real_logits(logits, bias, num_valid), targets, top_k, first_column)


def row_loss_(
    logits: Tensor, bias: Tensor | None, targets: Tensor, top_k: int, num_valid: int, first_column: int
) -> tuple[Tensor, ...]:
    """See :func:`trainer.kernels.ops.row_loss_`."""
    x = _real_logits_(logits, bias, num_valid)
    found = _statistics(x, targets, top_k, first_column)
    _differentiate_(x, targets, found[0], first_column)
    if x is not logits:
        logits.copy_(x)
    return found


def row_gradient_(
    logits: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, num_valid: int, first_column: int
) -> None:
    """See :func:`trainer.kernels.ops.row_gradient_`."""
    x = _real_logits_(logits, bias, num_valid)
    _differentiate_(x, targets, lse, first_column)
    if x is not logits:
        logits.copy_(x)


def count_above(logits: Tensor, bias: Tensor | None, thresholds: Tensor, num_valid: int) -> Tensor:
    """See :func:`trainer.kernels.ops.count_above`."""
    x = _real_logits(logits, bias, num_valid)
    # One comparison pass per threshold: an (n, A, M) tensor would be A times the logits.
    return torch.stack([(x > column.unsqueeze(1)).sum(1) for column in thresholds.unbind(1)], 1)


def sparse_decode(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """See :func:`trainer.kernels.ops.sparse_decode`."""
    return F.embedding_bag(ids, weight, per_sample_weights=values, mode="sum")


def sparse_dots(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """See :func:`trainer.kernels.ops.sparse_dots`.

    This is the gradient of ``embedding_bag`` with respect to its per-sample weights, whose kernels read
    each row once. An operator runs below autograd, which could be asked for it otherwise.
    """
    num_rows, top_k = ids.shape
    bags = torch.arange(num_rows, device=ids.device)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.to(weight.dtype), weight, ids.view(-1), bags * top_k, bags.repeat_interleave(top_k), 0
    )
    return dots.view_as(ids)


def add_sparse_grads_(
    grad: Tensor, sums: Tensor | None, coefficients: Tensor, ids: Tensor, rows: Tensor
) -> None:
    """See :func:`trainer.kernels.ops.add_sparse_grads_`."""
    num_ids, width = grad.shape
    num_rows, top_k = ids.shape
    here = (ids >= 0) & (ids < num_ids)
    ids, coefficients = ids.masked_fill(~here, 0), coefficients.float() * here
    for part in row_chunks(num_rows, top_k * width, rows.device):
        scaled = coefficients[part, :, None] * rows[part, None, :].float()
        grad.index_add_(0, ids[part].reshape(-1), scaled.view(-1, width))
    if sums is not None:
        sums.index_add_(0, ids.reshape(-1), coefficients.reshape(-1))
