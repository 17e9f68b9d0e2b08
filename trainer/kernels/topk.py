"""The K largest of every row with a defined order, in plain torch: on CPUs, or without Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_COLUMNS_OF_A_KEY = 2**16


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
    if scores.element_size() == 2 and scores.shape[-1] <= _COLUMNS_OF_A_KEY:
        return by_keys(scores, k)
    best = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    values, ids = best.values[:, :k], best.indices[:, :k]
    return order_ties(scores, best.values, values, ids)


def by_keys(scores: Tensor, k: int) -> TopK:
    """The k largest of rows of bf16 or fp16, which tie in most rows of many columns.

    A score's 16 bits, ordered as integers, and below them its column make a key of 32 bits. Keys are all
    different, and of equal scores that of the smaller column is larger.

    Args:
        scores: (n, m), m at most 2**16.
        k: at most m.
    """
    bits = (scores + 0.0).view(torch.int16)  # zeros of both signs are equal
    # Of negative numbers those with larger magnitudes are smaller.
    ordered = bits ^ ((bits >> 15) & 0x7FFF)
    last = _COLUMNS_OF_A_KEY - 1
    columns = last - torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    keys = ordered.to(torch.int32).mul_(_COLUMNS_OF_A_KEY).add_(columns)
    ids = last - (keys.topk(k, dim=-1).values & last).long()
    return TopK(scores.gather(-1, ids), ids)


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
