"""Matrix products in fp32 on the CPU by oneDNN, everywhere else by torch's own.

Torch gives fp32 products on the CPU to MKL, whose kernels for processors of other makers than Intel stop
at AVX2; oneDNN's use what the processor has (2.0 to 2.3 times as fast on an AMD Zen 5, docs/performance.md).
Both compute in fp32; ``torch.backends.mkldnn.enabled = False`` turns this off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST = 2**20
"""Multiplications from which a product pays for oneDNN's preparation of it."""


def _by_onednn(rows: Tensor, num_columns: int) -> bool:
    """Whether a product of ``rows`` (..., k) with ``num_columns`` columns goes to oneDNN."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and rows.numel() * num_columns >= _SMALLEST
        and not torch.compiler.is_compiling()  # which has no such operation for weights that change
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _dense(x: Tensor) -> Tensor:
    """The matrix x (n, k) in rows or columns without gaps: with gaps oneDNN takes its reference loops."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, not differentiable; left (n, k), right (k, m) of any strides -> (n, m)."""
    if not _by_onednn(left, right.shape[1]):
        return left @ right
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right.t()), None, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As torch's own linear does: a frozen weight's input need not live until backward.
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), _dense(weight), bias, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grads[0].flatten(0, -2)
        grad_x = None if weight is None else matmul(rows, weight).view(*grads[0].shape[:-1], -1)
        grad_weight = None if x is None else matmul(rows.t(), x.flatten(0, -2))
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` as ``torch.nn.functional.linear``, differentiable once.

    Args:
        x: (..., k).
        weight: (m, k).
        bias: (m,) or none.

    Returns:
        (..., m).
    """
    if not _by_onednn(x, weight.shape[0]):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out
