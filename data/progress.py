"""Progress of a long command: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

BAR_WIDTH = 24


class Progress:
    """Reports how much of ``total`` is done, the rate, and the time left."""

    def __init__(
        self,
        label: str,
        total: int,
        *,
        unit: str = "MB",
        per_unit: float = 1e6,
        counted: str = "",
        stream: TextIO | None = None,
        plain_every_s: float = 10.0,
    ):
        """Start the clock.

        Args:
            label: what is being done.
            total: amount of work, in bytes or what else is counted.
            unit: unit of the rate, per second.
            per_unit: how many of what is counted are one ``unit``.
            counted: what else is counted, such as tokens; shown in millions.
            stream: where to report; default stderr.
            plain_every_s: seconds between lines when ``stream`` is no terminal.
        """
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every_s = 0.1 if self._terminal else plain_every_s
        self._label, self._total = label, max(total, 1)
        self._unit, self._per_unit, self._counted = unit, per_unit, counted
        self._start = self._last = time.monotonic()
        self._skipped = self._skipped_count = 0
        self._width = 0

    def skip(self, done: int, count: int = 0) -> None:
        """Say what was finished before, of the total and of what else is counted; no rate holds it."""
        self._skipped, self._skipped_count = done, count
        self._start = time.monotonic()

    def update(self, done: int, count: int = 0) -> None:
        """Report what is finished, of the total and of what else is counted, unless the last is recent."""
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            self._write(self._line(done, count, now - self._start))

    def close(self, note: str = "") -> None:
        """Report the end, unless there is nothing to say and nothing was said before."""
        elapsed_s = time.monotonic() - self._start
        if not note and not self._width:
            return
        self._write(f"{self._label}: done in {elapsed_s:.1f} s{', ' if note else ''}{note}")
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def abort(self) -> None:
        """Leave the terminal at the start of a fresh line."""
        if self._terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()

    def _line(self, done: int, count: int, elapsed_s: float) -> str:
        elapsed_s = max(elapsed_s, 1e-9)
        share = min(done / self._total, 1.0)
        rate = max(done - self._skipped, 0) / elapsed_s
        left_s = (self._total - done) / rate if rate > 0 else float("inf")
        eta = "?" if left_s == float("inf") else format_duration(left_s)
        filled = int(share * BAR_WIDTH)
        bar = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] " if self._terminal else ""
        tail = ""
        if self._counted:
            count_rate = max(count - self._skipped_count, 0) / elapsed_s
            tail = f", {count / 1e6:.1f}M {self._counted} at {count_rate / 1e6:.2f}M/s"
        return (
            f"{self._label}: {bar}{share:6.1%}, {rate / self._per_unit:.2f} {self._unit}/s, {eta} left{tail}"
        )

    def _write(self, line: str) -> None:
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._width))
        else:
            self._stream.write(line + "\n")
        self._width = len(line)
        self._stream.flush()


def format_duration(seconds: float) -> str:
    """Return e.g. ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
