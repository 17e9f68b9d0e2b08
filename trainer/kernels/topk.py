"""The K largest of every row with a defined order, also of rows whose columns are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.tensor import TensorGroup
from trainer.kernels.columns import LocalColumns


class TopK(NamedTuple):
    """Largest entries of n rows, largest first; equal ones by their id, smallest first."""

    values: Tensor
    """(n, K)."""
    ids: Tensor
    """(n, K) int64 columns."""


def top_k(scores: Tensor, k: int) -> TopK:
    """The k largest of each row of scores (n, m), not differentiable.

    ``torch.topk`` leaves open which of equal values it takes and how it orders them, so that the same
    rows cut into other columns could choose other ids. Minus infinity means none: its ids are arbitrary.
    """
    if scores.device.type == "cuda":
        # Its selection takes equal values by their column; only the order of the k is left open.
        return sorted_by_id(*scores.topk(k, dim=-1))
    best = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    values, ids = best.values[:, :k], best.indices[:, :k]
    return order_ties(scores, best.values, values, ids)


def order_ties(scores: Tensor, more: Tensor, values: Tensor, ids: Tensor) -> TopK:
    """Select again, by a stable sort, in the rows where one of the k largest equals the next one.

    Args:
        scores: (n, m) on the CPU, where looking for such rows is no wait for a device.
        more: (n, k+1) largest scores, or k where m is k.
        values, ids: (n, k) of them.
    """
    tied = ((more[:, 1:] == more[:, :-1]) & more[:, 1:].isfinite()).any(-1)
    if tied.any():
        again = scores[tied].sort(dim=-1, descending=True, stable=True)
        k = values.shape[-1]
        values[tied], ids[tied] = again.values[:, :k], again.indices[:, :k]
    return TopK(values, ids)


def sorted_by_id(values: Tensor, ids: Tensor) -> TopK:
    """The same entries (n, k), largest first and equal ones by their id."""
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return TopK(values, ids.gather(-1, order))


def pick(scores: Tensor, k: int, columns: LocalColumns) -> TopK:
    """The candidates of this rank's columns for the k largest: all columns where there are fewer."""
    best = top_k(scores, min(k, columns.num_local))
    return TopK(best.values, best.ids + columns.start)


def join(chunks: Sequence[TopK]) -> TopK:
    """Rows chunk after chunk."""
    return TopK(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def merge_top_k(picks: Sequence[TopK], counts: Sequence[int], tp: TensorGroup) -> list[TopK]:
    """Exact top-K of rows whose columns are spread over ranks; one all-gather of 2 numbers per entry.

    Args:
        picks: of each selection what :func:`pick` found here, fp32 with ids below 2**31.
        counts: K of each selection.
        tp: the ranks.

    Returns:
        The same on all ranks, bit by bit.
    """
    if tp.size == 1:
        return list(picks)
    bits = [pick.ids.to(torch.int32).view(torch.float32) for pick in picks]  # bits, not values
    widths = [pick.ids.shape[1] for pick in picks]
    gathered = tp.all_gather(torch.cat([pick.values for pick in picks] + bits, dim=-1))
    columns = gathered.transpose(0, 1).split([*widths, *widths], dim=-1)  # each (n, tp, k)
    merged = []
    for values, packed, count in zip(columns[: len(picks)], columns[len(picks) :], counts, strict=True):
        # Candidates stand by rank, and equal ones of a rank by their id: places order ties as ids do.
        best = top_k(values.flatten(1), count)
        ids = packed.contiguous().view(torch.int32).flatten(1)
        merged.append(TopK(best.values, ids.gather(1, best.ids).long()))
    return merged
