"""What the loader hands to the training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Token windows of one rank, with what is stored beside them."""

    tokens: Tensor
    """(R, T+1) uint16, or int32 where the vocabulary needs it."""
    num_rows: int
    """Rows that count; those behind repeat a window so that every rank has the same shape."""
    targets: Tensor | None = None
    """(R, T, A) uint16 stored concept ids, 0xFFFF where there is none."""

    def to(self, device: torch.device) -> Batch:
        """On another device, asynchronously from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In page-locked memory, for asynchronous copies to a CUDA device."""
        return self._map(Tensor.pin_memory)

    def microbatches(self, size: int) -> list[Batch]:
        """Views of ``size`` rows each, the last one perhaps shorter."""
        return [self._rows(start, start + size) for start in range(0, len(self.tokens), size)]

    def _rows(self, start: int, stop: int) -> Batch:
        num_rows = min(max(self.num_rows - start, 0), stop - start)
        return self._map(lambda tensor: tensor[start:stop])._replace(num_rows=num_rows)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        targets = None if self.targets is None else change(self.targets)
        return self._replace(tokens=change(self.tokens), targets=targets)
