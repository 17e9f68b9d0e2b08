"""Products with a row-sparse matrix of K entries per token, in plain torch: on CPUs, or without Triton.

With S (N, M) holding ``values_nk`` at column ``ids_nk``: :func:`sparse_sums` is S W, :func:`sparse_dots` is
X W^T at the entries of S, :func:`sparse_weight_grad` is S^T X. None of them forms an (N, M) or (N, K, D)
tensor. Called through ``trainer.kernels.ops``, which documents them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sparse_sums(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """See :func:`trainer.kernels.ops.sparse_sums`."""
    return F.embedding_bag(ids, weight, per_sample_weights=values.to(weight.dtype), mode="sum")


def sparse_dots(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """See :func:`trainer.kernels.ops.sparse_dots`.

    This is the gradient of ``embedding_bag`` with respect to its per-sample weights, whose kernels read
    each row once. An operator runs below autograd, which could be asked for it otherwise.
    """
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.to(weight.dtype), weight, ids.flatten(), _starts(ids), _bags(ids), 0
    )
    return dots.view_as(ids)


def sparse_weight_grad(
    coefficients: Tensor, ids: Tensor, rows: Tensor, num_ids: int, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`trainer.kernels.ops.sparse_weight_grad`."""
    here = (ids >= 0) & (ids < num_ids)
    index, factors = ids.masked_fill(~here, 0), coefficients.float() * here
    grad = _sums_by_id(factors, index, rows.float(), num_ids)
    if not with_sums:
        return grad, grad.new_empty(0)
    return grad, _sums_by_id(factors, index, grad.new_ones(len(rows), 1), num_ids).squeeze(1)


def _sums_by_id(factors: Tensor, ids: Tensor, rows: Tensor, num_ids: int) -> Tensor:
    """The gradient of ``embedding_bag`` with respect to its table: ids are sorted, each row summed by itself.

    Not through autograd, which would want an (M, D) fp32 table to differentiate.
    """
    nothing = ids.new_empty(0)  # what other modes than the sum would ask for
    sums: Tensor = torch.ops.aten._embedding_bag_dense_backward(
        rows, ids.flatten(), _bags(ids), nothing, nothing, num_ids, False, 0, factors.flatten()
    )
    return sums


def _bags(ids: Tensor) -> Tensor:
    """Token of each entry."""
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])


def _starts(ids: Tensor) -> Tensor:
    """First entry of each token."""
    return torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
