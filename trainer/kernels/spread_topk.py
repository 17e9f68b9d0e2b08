"""The K largest of rows whose columns are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.tensor import TensorGroup
from trainer.kernels.columns import LocalColumns
from trainer.kernels.ops import top_k
from trainer.kernels.topk import TopK


def pick(scores: Tensor, k: int, columns: LocalColumns) -> TopK:
    """The candidates of this rank's columns for the k largest: all columns where there are fewer."""
    values, ids = top_k(scores, min(k, columns.num_local))
    return TopK(values, ids + columns.start)


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
        best, places = top_k(values.flatten(1), count)
        ids = packed.contiguous().view(torch.int32).flatten(1)
        merged.append(TopK(best, ids.gather(1, places).long()))
    return merged
