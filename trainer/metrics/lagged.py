"""Device values that the host reads later, without having waited for the device in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LaggedValues:
    """A copy of tensors of one device to the host, started now and read later.

    On CUDA the copy goes to pinned memory behind the work that is queued; :meth:`read` waits for that
    copy alone. On CPU the values are there at once.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._vector = torch.empty(0)
        self._arrived: torch.cuda.Event | None = None
        if not values:
            return
        vector = torch.cat([value.detach().double().flatten() for value in values])
        if vector.device.type != "cuda":
            self._vector = vector
            return
        self._vector = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        self._vector.copy_(vector, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    @property
    def on_cuda(self) -> bool:
        """Whether the values come from a GPU."""
        return self._arrived is not None

    def read(self) -> list[float]:
        """All elements, in order."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._vector.tolist()
        return values
