"""Targets of a microbatch while the student still trains on the one before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from data.batch import Batch


class _Started(NamedTuple):
    tokens: Tensor
    """Of the microbatch; held, so that its memory belongs to no other one."""
    targets: Tensor
    done: torch.cuda.Event | None


class TargetsAhead:
    """Computes targets before they are asked for: on CUDA on a stream of its own, beside the student.

    The teacher's kernels are small and leave room on the GPU that the student's large ones do not fill
    either. What is kept is one microbatch of ids; but while both run, the extraction's temporaries and the
    student's activations are in memory together. On a CPU the same calls compute one after the other.

    A collective must not run in ``compute``: on the side stream its order among the student's collectives
    would differ from rank to rank, and the ranks would wait for each other for ever.

    Args:
        compute: microbatch -> targets (b, T, A) int64.
        device: where both compute.
    """

    def __init__(self, compute: Callable[[Batch], Tensor], device: torch.device) -> None:
        self._compute = compute
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._started: list[_Started] = []

    def start(self, batch: Batch) -> None:
        """Begin with the targets of a microbatch that :meth:`take` will be asked for."""
        if self._stream is None:
            self._started.append(_Started(batch.tokens, self._compute(batch), None))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # the tokens are under way
        with torch.cuda.stream(self._stream):
            targets = self._compute(batch)
            done = self._stream.record_event()
        # If nobody takes them, the tokens' memory must not be used anew before this stream has read it.
        batch.tokens.record_stream(self._stream)
        self._started.append(_Started(batch.tokens, targets, done))

    def take(self, batch: Batch) -> Tensor:
        """Targets of a microbatch, computed now if they were not begun; what was begun before is dropped."""
        for place, started in enumerate(self._started):
            if _same_memory(started.tokens, batch.tokens):
                del self._started[: place + 1]
                return self._hand_over(started)
        return self._compute(batch)

    def _hand_over(self, started: _Started) -> Tensor:
        """The current stream waits for the targets, the host does not."""
        if self._stream is not None and started.done is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_event(started.done)
            # They come from the side stream's memory, which must not use it anew before they are read here.
            started.targets.record_stream(current)
        return started.targets


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape
