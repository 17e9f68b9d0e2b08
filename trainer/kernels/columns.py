"""Columns of a matrix that is spread over ranks: padding and lookup."""

from __future__ import annotations

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
