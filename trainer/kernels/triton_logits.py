"""Triton kernels on rows of logits: log-sum-exp, exact top-K, the targets' logits and the gradient.

A program owns one row. Its first sweep reads the row from memory; the sweep for the gradient follows at
once and finds it in the L2 cache, so that the row crosses the memory bus once each way. Every sum has one
fixed order and equal logits are told apart by their ids: the same input gives the same bits.

The K best of M logits are found without sorting a row. The row is cut into groups of ``_GROUP``
neighbours, whose maxima the first sweep keeps. Each of the K best logits lies in one of the K groups with the
best maxima, for otherwise these maxima would be K better ones: sort M / 32 maxima, then 32 K candidates.

Equal to ``trainer.kernels.reference``; ``trainer.kernels.ops`` chooses between them and the eager passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fixed, not tuned at run time: other sizes add up in another order. 16 logits per thread are two 16-byte
# loads in bf16. Many small programs per multiprocessor would have more rows in work than the L2 cache holds;
# two or three of 512 threads, on 132 multiprocessors, have 17 to 40 MB of them in bf16.
_BLOCK = 8192
_NUM_WARPS = 16
# M / 32 maxima and 32 K candidates are equally many at M = 32768 and K = 32.
_GROUP = 32

_LOWEST = tl.constexpr(-(2**63))  # below the key of every logit, NaN included


@triton.jit
def _sweep(
    logits,
    maxima,
    num_columns,
    keep_maxima: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
):
    """Log-sum-exp of a row; stores the largest logit of each group of columns in ``maxima``."""
    highest = -float("inf")
    total = 0.0
    for start in range(0, num_columns, block):
        columns = start + tl.arange(0, block)
        x = tl.load(logits + columns, mask=columns < num_columns, other=-float("inf")).to(tl.float32)
        risen = tl.maximum(highest, tl.max(x, 0))
        shift = tl.where(risen == -float("inf"), 0.0, risen)  # -inf - -inf is NaN
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift), 0)
        highest = risen
        if keep_maxima:
            best = tl.max(tl.reshape(x, (block // group, group)), 1)
            groups = start // group + tl.arange(0, block // group)
            tl.store(maxima + groups, best, mask=groups * group < num_columns)
    return highest + tl.log(total)


@triton.jit
def _key(x, index):
    """Int64 that orders by x, largest first, and among equals by the smaller index."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats grow with smaller bits
    return (ordered.to(tl.int64) << 32) | (index ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _index_of(key):
    """Index in a key of :func:`_key`; the largest int32 for ``_LOWEST``."""
    return (key & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit
def _logit_of(key):
    """Logit in a key of :func:`_key`."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best_keys(
    logits,
    maxima,
    num_columns,
    num_best: tl.constexpr,
    num_groups: tl.constexpr,
    group: tl.constexpr,
):
    """Keys of the ``num_best`` largest logits of a row, largest first."""
    groups = tl.arange(0, num_groups)
    there = groups * group < num_columns
    best = tl.load(maxima + groups, mask=there, other=0.0)
    # Of two groups with the same maximum the first one holds it at the smaller id.
    chosen = tl.topk(tl.where(there, _key(best, groups), _LOWEST), num_best)
    groups = tl.minimum(_index_of(chosen), num_groups)  # where there is no group: beyond the row
    columns = groups[:, None] * group + tl.arange(0, group)[None, :]
    inside = columns < num_columns
    x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
    candidates = tl.where(inside, _key(x, columns), _LOWEST)
    return tl.topk(tl.reshape(candidates, (num_best * group,)), num_best)


@triton.jit
def _write_gradient(
    logits,
    index,
    weights,
    lse,
    total,
    num_columns,
    num_targets: tl.constexpr,
    block: tl.constexpr,
):
    """Put total * softmax(row) - sum_a weights[a] e[index[a]] in the place of a row of logits."""
    for start in range(0, num_columns, block):
        columns = start + tl.arange(0, block)
        inside = columns < num_columns
        x = tl.load(logits + columns, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - lse) * total
        for a in tl.static_range(num_targets):
            target = tl.load(index + a)
            if (target >= start) & (target < start + block):  # most blocks hold no target: no comparisons
                gradient -= tl.where(columns == target, tl.load(weights + a), 0.0)
        tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _pass_kernel(
    logits,
    index,
    weights,
    total,
    lse,
    target_sum,
    values,
    ids,
    maxima,
    num_columns,
    num_targets: tl.constexpr,
    top_k: tl.constexpr,
    num_best: tl.constexpr,
    num_groups: tl.constexpr,
    with_gradient: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
):
    """One row: log-sum-exp, the targets' logits, the ``top_k`` best and, if asked for, the gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_columns
    index += row * num_targets
    weights += row * num_targets
    if top_k > 0:
        maxima += row * tl.cdiv(num_columns, group)
    row_lse = _sweep(logits, maxima, num_columns, top_k > 0, block, group)
    tl.store(lse + row, row_lse)
    targets = 0.0
    for a in tl.static_range(num_targets):
        weight = tl.load(weights + a)
        x = tl.load(logits + tl.load(index + a)).to(tl.float32)
        targets += tl.where(weight == 0.0, 0.0, weight * x)  # 0 * -inf is NaN
    tl.store(target_sum + row, targets)
    if top_k > 0:
        tl.debug_barrier()  # the maxima were stored by other threads
        best = _best_keys(logits, maxima, num_columns, num_best, num_groups, group)
        place = tl.arange(0, num_best)
        kept = _logit_of(best).to(values.dtype.element_ty)
        tl.store(values + row * top_k + place, kept, mask=place < top_k)
        tl.store(ids + row * top_k + place, _index_of(best).to(tl.int64), mask=place < top_k)
    if with_gradient:
        tl.debug_barrier()  # all threads have read what is now overwritten
        row_total = tl.load(total + row)
        _write_gradient(logits, index, weights, row_lse, row_total, num_columns, num_targets, block)


@triton.jit
def _gradient_kernel(
    logits,
    index,
    weights,
    total,
    lse,
    num_columns,
    num_targets: tl.constexpr,
    block: tl.constexpr,
):
    """One row's gradient, from the log-sum-exp over the columns of all ranks."""
    row = tl.program_id(0).to(tl.int64)
    _write_gradient(
        logits + row * num_columns,
        index + row * num_targets,
        weights + row * num_targets,
        tl.load(lse + row),
        tl.load(total + row),
        num_columns,
        num_targets,
        block,
    )


def _pass(
    logits: Tensor, index: Tensor, weights: Tensor, total: Tensor, top_k: int, *, with_gradient: bool
) -> tuple[Tensor, ...]:
    num_rows, num_columns = logits.shape
    lse = logits.new_empty(num_rows, 1, dtype=torch.float32)
    target_sum = torch.empty_like(lse)
    values = logits.new_empty(num_rows, top_k)
    ids = logits.new_empty(num_rows, top_k, dtype=torch.int64)
    num_groups = triton.cdiv(num_columns, _GROUP) if top_k else 0
    maxima = logits.new_empty(num_rows, num_groups, dtype=torch.float32)
    num_best = triton.next_power_of_2(max(top_k, 2))
    _pass_kernel[(num_rows,)](
        logits,
        index,
        weights,
        total,
        lse,
        target_sum,
        values,
        ids,
        maxima,
        num_columns,
        num_targets=index.shape[1],
        top_k=top_k,
        num_best=num_best,
        num_groups=max(triton.next_power_of_2(max(num_groups, 1)), num_best),
        with_gradient=with_gradient,
        block=_BLOCK,
        group=_GROUP,
        num_warps=_NUM_WARPS,
    )
    return lse, target_sum, values, ids


def logit_pass_(
    logits: Tensor, index: Tensor, weights: Tensor, total: Tensor, top_k: int
) -> tuple[Tensor, ...]:
    """See :func:`trainer.kernels.ops.logit_pass_`."""
    return _pass(logits, index, weights, total, top_k, with_gradient=True)


def summarise(logits: Tensor, index: Tensor, weights: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """See :func:`trainer.kernels.ops.summarise`."""
    return _pass(logits, index, weights, weights, top_k, with_gradient=False)


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`trainer.kernels.ops.top_k`."""
    no_weight = scores.new_empty(len(scores), 0, dtype=torch.float32)
    _, _, values, ids = _pass(scores, no_weight.long(), no_weight, no_weight, k, with_gradient=False)
    return values, ids


def logit_gradient_(logits: Tensor, lse: Tensor, index: Tensor, weights: Tensor, total: Tensor) -> None:
    """See :func:`trainer.kernels.ops.logit_gradient_`."""
    num_rows, num_columns = logits.shape
    _gradient_kernel[(num_rows,)](
        logits,
        index,
        weights,
        total,
        lse,
        num_columns,
        num_targets=index.shape[1],
        block=_BLOCK,
        num_warps=_NUM_WARPS,
    )
