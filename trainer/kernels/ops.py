"""The fused operations as operators of torch, and the one rule by which each call finds its implementation.

Tensors on a GPU are worked on by Triton's kernels where Triton is installed (``triton_logits`` and
``triton_sparse``), everything else by plain torch (``logits`` and ``sparse``). Both compute what
``reference`` defines; shapes, dtypes and errors are documented here for both.

As operators they have a shape function, so fake tensors and torch.compile go through them without running
them. They know no autograd: ``concept_head``, ``lm_head`` and ``sparse_decode`` call them inside their own.

Legend: n rows (tokens), D width, C columns (concepts or vocabulary), K kept columns, A targets per token.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from trainer.kernels import logits as eager_logits
from trainer.kernels import sparse as eager_sparse


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def triton_serves(tensor: Tensor) -> bool:
    """The rule of dispatch. Tests and benchmarks replace it to compare both implementations."""
    return tensor.is_cuda and has_triton()


def _for_logits(logits: Tensor) -> ModuleType:
    assert logits.is_contiguous(), "a row's logits must lie side by side"
    if not triton_serves(logits):
        return eager_logits
    # Not at the top: no CPU run needs Triton, and importing it takes a second.
    from trainer.kernels import triton_logits

    return triton_logits


def _for_sparse(table: Tensor) -> ModuleType:
    if not triton_serves(table):
        return eager_sparse
    from trainer.kernels import triton_sparse

    return triton_sparse


# Rows of logits. A row c with targets t_1..t_A of weights w_1..w_A has the loss sum_a w_a (lse(c) - c[t_a]).


@torch.library.custom_op("cocomix::logit_pass_", mutates_args=("logits",))
def logit_pass_(
    logits: Tensor, index: Tensor, weights: Tensor, total: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce rows and replace them by the gradient of their loss, in one pass.

    Args:
        logits: (n, C) of any floating dtype, which the gradient keeps; -inf where there is padding.
        index: (n, A) int64 columns of the targets, each from 0 to C - 1.
        weights: (n, A) fp32 of the targets; 0 where another rank has the column or there is no target.
        total: (n, 1) fp32 sum of a row's weights over all ranks.
        top_k: K from 0 to C.

    Returns:
        fp32 log-sum-exp (n, 1) and weighted sum of the targets' logits (n, 1), the K largest logits
        (n, K) in their dtype, largest first, and their columns (n, K) int64. Of equal logits those with
        the smaller columns are taken and come first, but for -inf, whose columns are any.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _for_logits(logits).logit_pass_(
        logits, index.contiguous(), weights.contiguous(), total.contiguous(), top_k
    )
    return found


@torch.library.custom_op("cocomix::summarise", mutates_args=())
def summarise(
    logits: Tensor, index: Tensor, weights: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`logit_pass_`, and leave the rows as they are; one of -inf alone has the log-sum-exp -inf."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _for_logits(logits).summarise(
        logits, index.contiguous(), weights.contiguous(), top_k
    )
    return found


@torch.library.custom_op("cocomix::logit_gradient_", mutates_args=("logits",))
def logit_gradient_(logits: Tensor, lse: Tensor, index: Tensor, weights: Tensor, total: Tensor) -> None:
    """Replace rows by the gradient of their loss: total softmax(c) - sum_a weights_a e[index_a].

    Args:
        logits: (n, C).
        lse: (n, 1) fp32 log-sum-exp over the columns of all ranks.
        index, weights, total: as for :func:`logit_pass_`.
    """
    _for_logits(logits).logit_gradient_(
        logits, lse.contiguous(), index.contiguous(), weights.contiguous(), total.contiguous()
    )


@torch.library.custom_op("cocomix::top_k", mutates_args=())
def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (n, C), largest first, and their columns: (n, k), (n, k) int64.

    Of equal scores those with the smaller columns are taken and come first, but for -inf, whose columns are
    any. ``k`` is at least 1 and at most C.
    """
    scores = scores.contiguous()
    values, ids = _for_logits(scores).largest(scores, k)
    return values.contiguous(), ids.contiguous()


def _summary(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = logits.shape[0]
    return (
        logits.new_empty(num_rows, 1, dtype=torch.float32),
        logits.new_empty(num_rows, 1, dtype=torch.float32),
        logits.new_empty(num_rows, top_k),
        logits.new_empty(num_rows, top_k, dtype=torch.int64),
    )


@logit_pass_.register_fake
def _(
    logits: Tensor, index: Tensor, weights: Tensor, total: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _summary(logits, top_k)


@summarise.register_fake
def _(logits: Tensor, index: Tensor, weights: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _summary(logits, top_k)


@top_k.register_fake
def _(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return scores.new_empty(len(scores), k), scores.new_empty(len(scores), k, dtype=torch.int64)


@logit_gradient_.register_fake
def _(logits: Tensor, lse: Tensor, index: Tensor, weights: Tensor, total: Tensor) -> None:
    return None


# Products with K entries per token, given as values (n, K) and ids (n, K) of rows of a weight (M, D).


@torch.library.custom_op("cocomix::sparse_sums", mutates_args=())
def sparse_sums(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """y_n = sum_k values_nk W[ids_nk], added up in fp32.

    Args:
        values: (n, K) of any floating dtype.
        ids: (n, K) int64, each a row of the weight.
        weight: (M, D).

    Returns:
        (n, D) in the weight's dtype.
    """
    sums: Tensor = _for_sparse(weight).sparse_sums(values.contiguous(), ids.contiguous(), weight.contiguous())
    return sums


@torch.library.custom_op("cocomix::sparse_dots", mutates_args=())
def sparse_dots(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """d_nk = <rows_n, W[ids_nk]>: rows (n, D), ids (n, K) int64, weight (M, D) -> (n, K) in its dtype."""
    dots: Tensor = _for_sparse(weight).sparse_dots(rows.contiguous(), ids.contiguous(), weight.contiguous())
    return dots


@torch.library.custom_op("cocomix::sparse_weight_grad", mutates_args=())
def sparse_weight_grad(
    coefficients: Tensor, ids: Tensor, rows: Tensor, num_ids: int, with_sums: bool = False
) -> tuple[Tensor, Tensor]:
    """G[m] = sum of coefficients_nk rows_n and s[m] = sum of coefficients_nk, both over ids_nk = m.

    Sums are fp32, because a popular concept collects thousands of summands, and have a fixed order.

    Args:
        coefficients: (n, K).
        ids: (n, K) int64; entries outside 0 to M - 1 count nowhere.
        rows: (n, D).
        num_ids: M.
        with_sums: whether s is wanted.

    Returns:
        G (M, D) and s (M,), or an empty s; both fp32.
    """
    found: tuple[Tensor, Tensor] = _for_sparse(rows).sparse_weight_grad(
        coefficients.contiguous(), ids.contiguous(), rows.contiguous(), num_ids, with_sums
    )
    return found


@sparse_sums.register_fake
def _(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


@sparse_dots.register_fake
def _(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(ids.shape)


@sparse_weight_grad.register_fake
def _(
    coefficients: Tensor, ids: Tensor, rows: Tensor, num_ids: int, with_sums: bool = False
) -> tuple[Tensor, Tensor]:
    sums = rows.new_empty(num_ids if with_sums else 0, dtype=torch.float32)
    return rows.new_empty(num_ids, rows.shape[1], dtype=torch.float32), sums
