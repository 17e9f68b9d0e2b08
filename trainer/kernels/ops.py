"""The fused operations as operators of torch, and the one rule by which each call finds its implementation.

Tensors on a GPU are worked on by Triton's kernels where Triton is installed (``trainer.kernels.triton_rows``
and ``triton_sparse``), everything else by ``trainer.kernels.eager``. Both compute what
``trainer.kernels.reference`` defines; shapes, dtypes and errors are documented here for both.

As operators they have a shape function, so fake tensors and torch.compile go through them without running
them. They know no autograd: the autograd functions of ``concept_head``, ``lm_head`` and ``sparse`` call them.

Legend: n rows (tokens), D width, M columns (concepts or vocabulary), K kept latents, A targets per token.
Logits count with ``bias`` added and as -inf from column ``num_valid`` on. All tensors are made contiguous.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from trainer.kernels import eager


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def triton_serves(tensor: Tensor) -> bool:
    """The rule of dispatch. Tests replace it to compare both implementations on one device."""
    return tensor.is_cuda and has_triton()


def _rows(tensor: Tensor) -> ModuleType:
    if not triton_serves(tensor):
        return eager
    # Not at the top: no CPU run needs Triton, and importing it takes a second.
    from trainer.kernels import triton_rows

    return triton_rows


def _sparse(tensor: Tensor) -> ModuleType:
    if not triton_serves(tensor):
        return eager
    from trainer.kernels import triton_sparse

    return triton_sparse


# Rows of logits


@torch.library.custom_op("cocomix::row_statistics", mutates_args=())
def row_statistics(
    logits: Tensor, bias: Tensor | None, targets: Tensor, top_k: int, num_valid: int, first_column: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each row of logits says, in one pass.

    Args:
        logits: (n, M) of any floating dtype, without the bias.
        bias: (M,) or None.
        targets: (n, A) int64 columns of the whole matrix, negative for none; A may be 0.
        top_k: K, at most M; 0 keeps none.
        num_valid: columns here that are not padding.
        first_column: number of the first column here among those of all ranks.

    Returns:
        Log-sum-exp (n, 1), the targets' logits (n, A), 0 where the target is none of these columns, the
        K largest logits (n, K), largest first, all fp32, and their ids (n, K) int64, counted from 0 here.
        Of equal logits Triton's kernel takes the smaller ids; the eager one any.
    """
    _check_rows(logits, top_k)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _rows(logits).row_statistics(
        logits, bias, targets.contiguous(), top_k, num_valid, first_column
    )
    return found


@torch.library.custom_op("cocomix::row_loss_", mutates_args=("logits",))
def row_loss_(
    logits: Tensor, bias: Tensor | None, targets: Tensor, top_k: int, num_valid: int, first_column: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`row_statistics`, then :func:`row_gradient_` with this log-sum-exp: logits cross the bus once."""
    _check_rows(logits, top_k)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _rows(logits).row_loss_(
        logits, bias, targets.contiguous(), top_k, num_valid, first_column
    )
    return found


@torch.library.custom_op("cocomix::row_gradient_", mutates_args=("logits",))
def row_gradient_(
    logits: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, num_valid: int, first_column: int
) -> None:
    """Replace logits by the gradient of 1/A sum_a CE(row, target_a) over the targets that are not negative.

    Args:
        logits: (n, M), as for :func:`row_statistics`; keeps its dtype.
        bias: (M,) or None.
        targets: (n, A).
        lse: (n, 1) fp32 log-sum-exp over the columns of all ranks.
        num_valid: columns here that are not padding; the others get 0.
        first_column: number of the first column here.
    """
    _check_rows(logits, 0)
    _rows(logits).row_gradient_(logits, bias, targets.contiguous(), lse.contiguous(), num_valid, first_column)


@torch.library.custom_op("cocomix::count_above", mutates_args=())
def count_above(logits: Tensor, bias: Tensor | None, thresholds: Tensor, num_valid: int) -> Tensor:
    """How many of a row's logits lie above each threshold: (n, M), (M,), (n, A) fp32 -> (n, A) int64."""
    _check_rows(logits, 0)
    counts: Tensor = _rows(logits).count_above(logits, bias, thresholds.contiguous(), num_valid)
    return counts


def _check_rows(logits: Tensor, top_k: int) -> None:
    assert logits.is_contiguous(), "a row's logits must lie side by side"
    assert top_k <= logits.shape[1], "more logits are to be kept than there are"


def _row_shapes(
    logits: Tensor, bias: Tensor | None, targets: Tensor, top_k: int, num_valid: int, first_column: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = logits.shape[0]
    return (
        logits.new_empty(num_rows, 1, dtype=torch.float32),
        logits.new_empty(targets.shape, dtype=torch.float32),
        logits.new_empty(num_rows, top_k, dtype=torch.float32),
        logits.new_empty(num_rows, top_k, dtype=torch.int64),
    )


row_statistics.register_fake(_row_shapes)
row_loss_.register_fake(_row_shapes)


@row_gradient_.register_fake
def _(
    logits: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, num_valid: int, first_column: int
) -> None:
    return None


@count_above.register_fake
def _(logits: Tensor, bias: Tensor | None, thresholds: Tensor, num_valid: int) -> Tensor:
    return torch.empty_like(thresholds, dtype=torch.int64, memory_format=torch.contiguous_format)


# Products with K entries per token


@torch.library.custom_op("cocomix::sparse_decode", mutates_args=())
def sparse_decode(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """y_n = sum_k values_nk W[ids_nk], added up in fp32.

    Args:
        values: (n, K) in the weight's dtype.
        ids: (n, K) int64, each a row of the weight.
        weight: (M, D).

    Returns:
        (n, D) in the weight's dtype.
    """
    decoded: Tensor = _sparse(weight).sparse_decode(
        values.contiguous(), ids.contiguous(), weight.contiguous()
    )
    return decoded


@torch.library.custom_op("cocomix::sparse_dots", mutates_args=())
def sparse_dots(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """d_nk = <rows_n, W[ids_nk]>: rows (n, D), ids (n, K) int64, weight (M, D) -> (n, K) in its dtype."""
    dots: Tensor = _sparse(weight).sparse_dots(rows.contiguous(), ids.contiguous(), weight.contiguous())
    return dots


@torch.library.custom_op("cocomix::add_sparse_grads_", mutates_args=("grad", "sums"))
def add_sparse_grads_(
    grad: Tensor, sums: Tensor | None, coefficients: Tensor, ids: Tensor, rows: Tensor
) -> None:
    """grad[ids_nk] += coefficients_nk rows_n and sums[ids_nk] += coefficients_nk, added up in fp32.

    On a GPU without Triton the order of the summands, and so the last bits, differ from call to call.

    Args:
        grad: (M, D) fp32.
        sums: (M,) fp32 or None.
        coefficients: (n, K).
        ids: (n, K) int64; entries outside 0 to M - 1 count nowhere.
        rows: (n, D).
    """
    assert grad.is_contiguous(), "the gradient is added to in place"
    coefficients, ids, rows = coefficients.contiguous(), ids.contiguous(), rows.contiguous()
    _sparse(grad).add_sparse_grads_(grad, sums, coefficients, ids, rows)


@sparse_decode.register_fake
def _(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


@sparse_dots.register_fake
def _(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(ids.shape)


@add_sparse_grads_.register_fake
def _(grad: Tensor, sums: Tensor | None, coefficients: Tensor, ids: Tensor, rows: Tensor) -> None:
    return None
