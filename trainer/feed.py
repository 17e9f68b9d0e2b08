"""Batches of one rank on its device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from data.batch import Batch
from data.loader import TokenLoader


class _Moved(NamedTuple):
    host: Batch
    device: Batch


class Feed:
    """Batches on the device, and a look at the one behind, which the loader's cursor does not count.

    Args:
        loader: this rank's batches.
        device: where the model computes.
        look_ahead: whether :meth:`upcoming` looks; otherwise it is always None.
    """

    def __init__(self, loader: TokenLoader, device: torch.device, *, look_ahead: bool) -> None:
        self._loader = loader
        self._device = device
        self._look_ahead = look_ahead
        self._seen: _Moved | None = None

    def next(self) -> Batch:
        """This step's batch; the same memory that :meth:`upcoming` showed before.

        Raises:
            DataError: a damaged shard.
        """
        host, seen, self._seen = next(self._loader), self._seen, None
        # After a rewind the loader's next batch is another one than was seen.
        if seen is not None and seen.host is host:
            return seen.device
        return host.to(self._device)

    def upcoming(self) -> Batch | None:
        """The next step's batch if it has been read already; nothing is waited for."""
        host = self._loader.peek() if self._look_ahead else None
        self._seen = None if host is None else _Moved(host, host.to(self._device))
        return None if self._seen is None else self._seen.device
