"""Products with a row-sparse matrix that has K entries per token, given as (values, ids).

With S (N, M) holding ``values_nk`` at column ``ids_nk``: :func:`sparse_sums` and, differentiable,
:func:`sparse_decode` are S W, :func:`sparse_weight_grad` is S^T X, :func:`sparse_dots` is X W^T at the
entries of S. None of them forms an (N, M) or (N, K, D) tensor. Definitions: ``trainer.kernels.reference``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def sparse_sums(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """y_n = sum_k values_nk W[ids_nk]; values, ids (N, K), weight (M, D) -> (N, D) in the weight's dtype."""
    return F.embedding_bag(ids, weight, per_sample_weights=values.to(weight.dtype), mode="sum")


def sparse_dots(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """d_nk = <rows_n, W[ids_nk]>, not differentiable; rows (N, D), ids (N, K), weight (M, D) -> (N, K).

    This is the gradient of ``embedding_bag`` with respect to its per-sample weights, whose CPU and
    CUDA kernels read each row once; taking it from autograd keeps to the public interface.
    """
    with torch.enable_grad():
        probe = torch.ones(ids.shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        bags = sparse_sums(probe, ids, weight.detach())
        (dots,) = torch.autograd.grad(bags, probe, rows.detach().to(weight.dtype))
    return dots


def sparse_weight_grad(coefficients: Tensor, ids: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """G[m] = sum over (n, k) with ids_nk = m of coefficients_nk rows_n; result (num_rows, D) fp32.

    coefficients and ids are (N, K), rows is (N, D). Sums are fp32, because a popular concept collects
    thousands of summands, and in a fixed order: ids are sorted and every row of G is summed by itself.
    """
    num_bags, top_k = ids.shape
    nothing = ids.new_empty(0)  # what other modes than the sum would ask for
    # Not through autograd, which would want an (M, D) fp32 table to differentiate.
    return torch.ops.aten._embedding_bag_dense_backward(
        rows.float().contiguous(),
        ids.flatten(),
        torch.arange(num_bags, device=ids.device).repeat_interleave(top_k),
        nothing,
        nothing,
        num_rows,
        False,
        0,
        coefficients.float().flatten(),
    )


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, ids, weight)
        return sparse_sums(values, ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, ids, weight = ctx.saved_tensors
        grad_output = grads[0].contiguous()
        grad_values = sparse_dots(grad_output, ids, weight) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = sparse_weight_grad(values, ids, grad_output, len(weight)).to(weight.dtype)
        return grad_values, None, grad_weight


def sparse_decode(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """y_n = sum_k values_nk W[ids_nk]; values (N, K), ids (N, K) int64, weight (M, D) -> (N, D).

    Differentiable in values and weight. ``values`` are cast to the weight's dtype.
    """
    result: Tensor = _SparseDecode.apply(values.to(weight.dtype), ids, weight)
    return result
