"""A signal asks the run to stop; the run stops when its step is done."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers SIGTERM, SIGINT or SIGUSR1; a context manager that puts the old handlers back.

    A second SIGINT interrupts at once, for somebody at a terminal who does not want to wait.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._old: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal_name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
