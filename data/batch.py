"""What the loader hands to the training step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Token windows of one rank, with what is stored beside them."""

    tokens: Tensor
    """(R, T+1) uint16, or int32 where the vocabulary needs it."""
    num_rows: int
    """Rows that count; those behind repeat a window so that every rank has the same shape."""

    def to(self, device: torch.device) -> Batch:
        """On another device, asynchronously from pinned memory."""
        return self._replace(tokens=self.tokens.to(device, non_blocking=True))

    def microbatches(self, size: int) -> list[Batch]:
        """Views of ``size`` rows each, the last one perhaps shorter."""
        starts = range(0, len(self.tokens), size)
        return [
            Batch(self.tokens[start : start + size], min(max(self.num_rows - start, 0), size))
            for start in starts
        ]
