"""Products with a row-sparse matrix that has K entries per token, given as (values, ids).

With S (N, M) holding ``values_nk`` at column ``ids_nk``: :func:`sparse_decode` is S W,
:func:`add_sparse_weight_grad` adds S^T X, :func:`sparse_dots` is X W^T at the entries of S.
None of them forms an (N, M) or (N, K, D) tensor. Definitions: ``trainer.kernels.reference``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.kernels.chunks import row_chunks


def sparse_dots(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """d_nk = <rows_n, W[ids_nk]>, not differentiable; rows (N, D), ids (N, K), weight (M, D) -> (N, K).

    This is the gradient of ``embedding_bag`` with respect to its per-sample weights, whose CPU and
    CUDA kernels read each row once; taking it from autograd keeps to the public interface.
    """
    with torch.enable_grad():
        probe = torch.ones(ids.shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        bags = F.embedding_bag(ids, weight.detach(), per_sample_weights=probe, mode="sum")
        (dots,) = torch.autograd.grad(bags, probe, rows.detach().to(weight.dtype))
    return dots


def add_sparse_weight_grad(grad: Tensor, coefficients: Tensor, ids: Tensor, rows: Tensor) -> None:
    """grad[ids_nk] += coefficients_nk rows_n, in place.

    grad is (M, D) fp32, coefficients and ids are (N, K), rows is (N, D). Sums are fp32: a popular
    concept collects thousands of summands.
    """
    num_rows, top_k = ids.shape
    width = rows.shape[1]
    for part in row_chunks(num_rows, top_k * width, rows.device):
        scaled = coefficients[part, :, None].float() * rows[part, None, :].float()
        grad.index_add_(0, ids[part].reshape(-1), scaled.view(-1, width))


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, ids, weight)
        return F.embedding_bag(ids, weight, per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, ids, weight = ctx.saved_tensors
        grad_output = grads[0].contiguous()
        grad_values = sparse_dots(grad_output, ids, weight) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            add_sparse_weight_grad(grad_weight, values, ids, grad_output)
            grad_weight = grad_weight.to(weight.dtype)
        return grad_values, None, grad_weight


def sparse_decode(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """y_n = sum_k values_nk W[ids_nk]; values (N, K), ids (N, K) int64, weight (M, D) -> (N, D).

    Differentiable in values and weight. ``values`` are cast to the weight's dtype.
    """
    result: Tensor = _SparseDecode.apply(values.to(weight.dtype), ids, weight)
    return result
