"""What the loader hands to the training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Damage(NamedTuple):
    """Why windows could not be read."""

    split: str
    chunk: int
    """Number of the chunk in its split."""
    error: str
    """One line that names the file."""


class DamagedRow(NamedTuple):
    """A row of a batch that holds zeros in place of its window."""

    row: int
    damage: Damage


class Batch(NamedTuple):
    """Token windows of one rank, with what is stored beside them."""

    tokens: Tensor
    """(R, T+1) uint16, or int32 where the vocabulary needs it."""
    num_rows: int
    """Rows that stand for a window; those behind repeat one so that every rank has the same shape."""
    targets: Tensor | None = None
    """(R, T, A) uint16 stored concept ids, 0xFFFF where there is none."""
    damaged: tuple[DamagedRow, ...] = ()
    """Rows among the first ``num_rows`` whose windows could not be read, in rising order."""

    @property
    def masked_rows(self) -> list[int]:
        """Rows that do not count: neither their labels nor their targets nor their tokens."""
        return [row for row, _ in self.damaged] + list(range(self.num_rows, len(self.tokens)))

    @property
    def num_counted(self) -> int:
        """Rows that count."""
        return self.num_rows - len(self.damaged)

    def counted(self, rows: Tensor) -> Tensor:
        """Those of ``rows`` (R, ...) that count, (num_counted, ...); a view where nothing is damaged."""
        rows = rows[: self.num_rows]
        if not self.damaged:
            return rows
        damaged = {row for row, _ in self.damaged}
        kept = [rows[row] for row in range(len(rows)) if row not in damaged]
        return torch.stack(kept) if kept else rows[:0]

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
        damaged = tuple(
            DamagedRow(row - start, damage) for row, damage in self.damaged if start <= row < stop
        )
        return self._map(lambda tensor: tensor[start:stop])._replace(num_rows=num_rows, damaged=damaged)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        targets = None if self.targets is None else change(self.targets)
        return self._replace(tokens=change(self.tokens), targets=targets)
