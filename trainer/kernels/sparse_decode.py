"""The product with K entries per token that training differentiates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.kernels.ops import sparse_dots, sparse_sums, sparse_weight_grad


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, ids, weight)
        return sparse_sums(values, ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, ids, weight = ctx.saved_tensors
        rows = grads[0].contiguous()
        grad_values = sparse_dots(rows, ids, weight) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = sparse_weight_grad(values, ids, rows, len(weight))[0].to(weight.dtype)
        return grad_values, None, grad_weight


def sparse_decode(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """y_n = sum_k values_nk W[ids_nk]; values (N, K), ids (N, K) int64, weight (M, D) -> (N, D).

    Differentiable in values and weight. ``values`` are cast to the weight's dtype.
    """
    result: Tensor = _SparseDecode.apply(values.to(weight.dtype), ids, weight)
    return result
