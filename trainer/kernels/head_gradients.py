"""The gradients of a linear head whose logits exist for a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.kernels.matmul import matmul
from trainer.kernels.ops import sparse_sums, sparse_weight_grad


class HeadGradients:
    """Gradients of hidden rows (N, D), weight (C, D) and bias (C,), added up over chunks of rows.

    Weight and bias are summed in fp32, because many tokens add up.

    Args:
        hidden, weight: the head's input and weight.
        need_hidden, need_weight, need_bias: which gradients are wanted.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, *, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> None:
        self.hidden = torch.empty_like(hidden) if need_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._need_weight, self._need_bias = need_weight, need_bias

    @staticmethod
    def taken_from(ctx: Any) -> HeadGradients:
        """The gradients that a forward left in ``ctx.grads``, for its one backward to change in place.

        Raises:
            RuntimeError: backward ran before.
        """
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("a head's gradients are gone after its first backward")
        assert isinstance(grads, HeadGradients)
        return grads

    def add(self, rows: slice, dlogits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add what logit gradients (n, C) of a chunk of rows bring; ``hidden`` are its rows (n, D)."""
        if self._need_bias:
            self.bias = _sum(self.bias, dlogits.sum(0, dtype=torch.float32))
        if self.hidden is not None:
            self.hidden[rows] = matmul(dlogits, weight)
        if self._need_weight:
            more = matmul(dlogits.t(), hidden)
            # Added as it is: a copy in fp32 would be as large as the weight once more.
            self.weight = more.float() if self.weight is None else self.weight.add_(more)

    def scale_(self, factor: Tensor) -> None:
        """Multiply all by a scalar."""
        for gradient in (self.hidden, self.weight, self.bias):
            if gradient is not None:
                gradient.mul_(factor)

    def drop(self) -> None:
        """Back to nothing."""
        self.hidden = self.weight = self.bias = None

    def add_values(
        self, grad_values: Tensor, index: Tensor, here: Tensor, hidden: Tensor, weight: Tensor
    ) -> None:
        """Add what gradients of single logits bring, all rows at once: K weight rows per token.

        Args:
            grad_values, index, here: (N, K) gradients, their columns, and whether these are columns here;
                the column of one that is not must exist all the same.
            hidden, weight: the head's input (N, D) and weight.
        """
        self.hidden = _sum(self.hidden, sparse_sums(grad_values.masked_fill(~here, 0), index, weight))
        # Not as zeros of some column: it would have most of all summands, and one program adds them up.
        ids = index.masked_fill(~here, -1)
        more, sums = sparse_weight_grad(grad_values, ids, hidden, len(weight), with_sums=True)
        self.weight, self.bias = _sum(self.weight, more), _sum(self.bias, sums)


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
