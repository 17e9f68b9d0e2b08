"""Seconds of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch


class Stopwatch:
    """Marks points of a device's work, and tells the seconds between them once all is done.

    Args:
        device: events on a CUDA device's current stream, the host's clock on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        """Note this point of the work; the host waits for nothing."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between neighbouring marks, which are forgotten; waits for the device."""
        drain(self._device)
        marks, self._marks = self._marks, []
        found = []
        for first, second in pairwise(marks):
            if isinstance(first, float):
                assert isinstance(second, float)
                found.append(second - first)
            else:
                assert isinstance(second, torch.cuda.Event)
                found.append(first.elapsed_time(second) / 1e3)
        return found


def drain(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of ``run``, after two calls that do not count.

    The kernels measured here take a millisecond and more on a GPU, so that launching them is not what
    is timed; each is launched while the one before it computes.
    """
    for _ in range(2):
        run()
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(repeats):
        run()
        watch.mark()
    return median(watch.seconds())
