"""Append-only files of JSON objects that survive a crash at any byte."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.files import replace_bytes


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
    """An append-only file of JSON objects, each written whole by one system call.

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

    def write(self, value: dict[str, Any]) -> None:
        """Append one object."""
        self._file.write((json.dumps(_json_safe(value), allow_nan=False, default=str) + "\n").encode())
        self.last = value

    def close(self) -> None:
        """Close the file."""
        self._file.close()
