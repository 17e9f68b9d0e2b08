"""Rows of logits of which a rank holds some columns: padding, lookup and a sum over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.tensor import TensorGroup


class LocalColumns:
    """The columns of a (N, num_valid) matrix of logits that this rank computes.

    Args:
        num_valid: real columns over all ranks; those behind them are padding.
        num_local: columns on this rank, equally many on each.
        tp: the ranks, in the order of their columns.
    """

    def __init__(self, num_valid: int, num_local: int, tp: TensorGroup) -> None:
        self.tp = tp
        self.start = tp.rank * num_local
        self.num_local = num_local
        self.num_valid = min(max(num_valid - self.start, 0), num_local)

    def mask_padding_(self, logits: Tensor) -> Tensor:
        """Set the logits of padding to -inf, in place."""
        if self.num_valid < self.num_local:
            logits[:, self.num_valid :] = -torch.inf
        return logits

    def part_of(self, whole: Tensor) -> Tensor:
        """This rank's part (num_local) of a vector over all real columns; 0 for padding."""
        part = whole[self.start : self.start + self.num_local]
        return torch.nn.functional.pad(part, (0, self.num_local - part.shape[0]))

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of each global id, and whether it is on this rank; elsewhere the column is 0."""
        index = ids - self.start
        here = (index >= 0) & (index < self.num_local)
        return index.masked_fill(~here, 0), here


def merge_logsumexp(logits: Tensor, sums: Sequence[Tensor], tp: TensorGroup) -> tuple[Tensor, list[Tensor]]:
    """Log-sum-exp of rows whose columns are spread over ranks, and sums of further columns.

    One all-gather of 2 + the columns of ``sums`` fp32 numbers per row.

    Args:
        logits: (n, local columns) fp32; a rank may have -inf only.
        sums: (n, k) fp32 tensors to be added up over the ranks.
        tp: the ranks.

    Returns:
        (n, 1) fp32 and the sums, the same on all ranks.
    """
    if tp.size == 1:
        return logits.logsumexp(-1, keepdim=True), list(sums)
    highest = logits.amax(-1, keepdim=True)
    # A rank whose columns are all padding has no finite maximum; it adds nothing.
    total = (logits - highest.clamp_min(torch.finfo(logits.dtype).min)).exp().sum(-1, keepdim=True)
    gathered = tp.all_gather(torch.cat([highest, total, *sums], dim=-1))
    top = gathered[..., :1].amax(0)
    summed = (gathered[..., 1:2] * (gathered[..., :1] - top).exp()).sum(0)
    widths = [part.shape[-1] for part in sums]
    return top + summed.log(), list(gathered[..., 2:].sum(0).split(widths, dim=-1))
