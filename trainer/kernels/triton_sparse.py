"""Triton kernels for products with K entries per token, given as (values, ids).

Programs are numbered tokens (or concepts) first and parts of the width second: programs that run together
gather from one slice of the weight, which fits in the L2 cache. Sums are fp32 in one fixed order, also the
weight gradient's: a stable sort puts the entries of a concept side by side, and one program adds them up,
where an ``index_add_`` would add atomically, in the order of the day.

Equal to ``trainer.kernels.reference``; ``trainer.kernels.ops`` chooses between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fixed, not tuned at run time: other sizes add up in another order.
_WIDTH = 256  # numbers of one row per program: 16 bytes of bf16 for each thread of a warp
_UNROLL = 8  # gathers of a token that are under way together
_DOT_TILE = 4096  # products of one token in work, in registers
_ENTRIES = 16  # summands of a concept in work


@triton.jit
def _sums_kernel(
    values,
    ids,
    weight,
    out,
    width,
    top_k: tl.constexpr,
    block: tl.constexpr,
    unroll: tl.constexpr,
):
    """out[n] = sum_k values[n, k] weight[ids[n, k]] for one token and ``block`` columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    total = tl.zeros((block,), tl.float32)
    for first in range(0, top_k, unroll):
        for step in tl.static_range(unroll):
            place = row * top_k + first + step
            there = first + step < top_k
            index = tl.load(ids + place, mask=there, other=0)
            value = tl.load(values + place, mask=there, other=0.0).to(tl.float32)
            entries = tl.load(weight + index * width + columns, mask=inside & there, other=0.0)
            total += value * entries.to(tl.float32)
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dots_kernel(
    rows,
    ids,
    weight,
    out,
    width,
    top_k: tl.constexpr,
    num_places: tl.constexpr,
    block: tl.constexpr,
):
    """out[n, k] = <rows[n], weight[ids[n, k]]> for one token."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, num_places)
    there = place < top_k
    index = tl.load(ids + row * top_k + place, mask=there, other=0)
    products = tl.zeros((num_places, block), tl.float32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        x = tl.load(rows + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        entries = weight + index[:, None] * width + columns[None, :]
        w = tl.load(entries, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        products += w * x[None, :]
    tl.store(out + row * top_k + place, tl.sum(products, 1).to(out.dtype.element_ty), mask=there)


@triton.jit
def _weight_grad_kernel(
    grad,
    sums,
    coefficients,
    rows,
    order,
    starts,
    width,
    top_k: tl.constexpr,
    with_sums: tl.constexpr,
    block: tl.constexpr,
    num_entries: tl.constexpr,
):
    """Add up all summands of one concept, for ``block`` columns of its row of ``grad``."""
    concept = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    last = tl.load(starts + concept + 1)
    total = tl.zeros((num_entries, block), tl.float32)
    counted = tl.zeros((num_entries,), tl.float32)
    for start in range(tl.load(starts + concept), last, num_entries):
        entry = start + tl.arange(0, num_entries)
        there = entry < last
        place = tl.load(order + entry, mask=there, other=0)
        factor = tl.load(coefficients + place, mask=there, other=0.0).to(tl.float32)
        summand = rows + (place // top_k)[:, None] * width + columns[None, :]
        x = tl.load(summand, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += factor[:, None] * x
        counted += factor
    tl.store(grad + concept * width + columns, tl.sum(total, 0), mask=inside)
    if with_sums:
        tl.store(sums + concept, tl.sum(counted, 0), mask=tl.program_id(1) == 0)


def sparse_sums(values: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """See :func:`trainer.kernels.ops.sparse_sums`."""
    num_rows, top_k = ids.shape
    width = weight.shape[1]
    out = weight.new_empty(num_rows, width)
    _sums_kernel[num_rows, triton.cdiv(width, _WIDTH)](
        values, ids, weight, out, width, top_k=top_k, block=_WIDTH, unroll=_UNROLL, num_warps=1
    )
    return out


def sparse_dots(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """See :func:`trainer.kernels.ops.sparse_dots`."""
    num_rows, top_k = ids.shape
    num_places = triton.next_power_of_2(top_k)
    out = weight.new_empty(num_rows, top_k)
    _dots_kernel[(num_rows,)](
        rows,
        ids,
        weight,
        out,
        weight.shape[1],
        top_k=top_k,
        num_places=num_places,
        block=max(_DOT_TILE // num_places, 16),
        num_warps=4,
    )
    return out


def sparse_weight_grad(
    coefficients: Tensor, ids: Tensor, rows: Tensor, num_ids: int, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`trainer.kernels.ops.sparse_weight_grad`."""
    width = rows.shape[1]
    # int32: half the passes of the radix sort.
    sorted_ids, order = torch.sort(ids.view(-1).to(torch.int32), stable=True)
    starts = torch.searchsorted(sorted_ids, torch.arange(num_ids + 1, dtype=torch.int32, device=ids.device))
    grad = rows.new_empty(num_ids, width, dtype=torch.float32)
    sums = grad.new_empty(num_ids if with_sums else 0)
    _weight_grad_kernel[num_ids, triton.cdiv(width, _WIDTH)](
        grad,
        sums,
        coefficients,
        rows,
        order,
        starts,
        width,
        top_k=ids.shape[1],
        with_sums=with_sums,
        block=_WIDTH,
        num_entries=_ENTRIES,
        num_warps=4,
    )
    return grad, sums
