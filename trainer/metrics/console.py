"""Log lines: one progress line on a terminal, plain lines elsewhere, a file per rank."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any


class ConsoleHandler(logging.StreamHandler[Any]):
    """Log lines; on a terminal, records with ``extra={"progress": True}`` share one line, rewritten."""

    _CLEAR = "\r\x1b[K"

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._progress = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a progress line is kept below the lines that follow it."""
        if not self.stream.isatty():
            super().emit(record)
            return
        try:
            text = ""
            if getattr(record, "progress", False):
                self._progress = record.getMessage()
            else:
                text = self.format(record) + "\n"
            self.stream.write(self._CLEAR + text + self._progress[: self._columns() - 1])
            self.flush()
        except Exception:  # as logging does: a lost line must not end a run
            self.handleError(record)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except OSError:
            return 80

    def close(self) -> None:
        """End the progress line, so that the shell's prompt starts on its own."""
        if self._progress:
            self.stream.write("\n")
            self.flush()
            self._progress = ""
        super().close()


def setup_logging(run_dir: Path, rank: int) -> None:
    """Send log records from INFO on, and Python's warnings, to ``logs/rank_N.log``; on rank 0 to stderr too.

    Called again, it replaces what it had set up.
    """
    path = run_dir / "logs" / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8")]
    if rank == 0:
        handlers.append(ConsoleHandler())
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.get_name() == __name__]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.set_name(__name__)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
