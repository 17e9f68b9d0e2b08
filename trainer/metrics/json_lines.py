"""Append-only files of JSON objects that survive a crash at any byte."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.files import replace_bytes

logger = logging.getLogger(__name__)


def _json_safe(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return value


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except ValueError:  # torn in a text or in the middle of a character
            continue
        if isinstance(value, dict):
            yield line, value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file without lines that a crash tore; [] when there is no file."""
    return [value for _, value in _whole_lines(path)]


class JsonLines:
    """An append-only file of JSON objects.

    A line that finds no room on the disk waits for the next write, so that a full disk costs nothing
    but time; what is still waiting at the end is reported.

    Args:
        path: The file; its torn lines and the objects that ``keep`` refuses are dropped first, atomically.
        keep: Predicate on an object.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda _: True) -> None:
        kept = [(line, value) for line, value in _whole_lines(path) if keep(value)]
        self.last = kept[-1][1] if kept else None
        """Newest object in the file."""
        content = b"".join(line + b"\n" for line, _ in kept)
        if path.exists() and content != path.read_bytes():
            replace_bytes(path, content)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, value: dict[str, Any]) -> None:
        """Append one object."""
        had_room = not self._waiting
        self._waiting += (json.dumps(_json_safe(value), allow_nan=False, default=str) + "\n").encode()
        self.last = value
        error = self._drain()
        if error is not None and had_room:
            logger.error("%s: cannot be written, lines wait: %s", self._file.name, error)

    def _drain(self) -> OSError | None:
        """Write what is waiting; a line that was cut short goes on where it stopped."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Close the file."""
        error = self._drain()
        if error is not None:
            lines = self._waiting.count(b"\n")
            logger.error("%s: %d lines are lost: %s", self._file.name, lines, error)
        self._file.close()
