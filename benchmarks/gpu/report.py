"""What a part has found so far, in a file that is whole at every moment."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from data.files import replace_text


class Report:
    """Results by name; each is on disk as soon as it is known, so that a part that dies leaves what it found.

    Args:
        path: JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        """Keep a JSON-able result and show it."""
        self._found[name] = _finite(value)
        replace_text(self._path, json.dumps(self._found, allow_nan=False))
        print(f"{name}: {json.dumps(self._found[name])}", flush=True)


def read_report(path: Path) -> dict[str, Any]:
    """What a part has put, nothing if it put nothing."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _finite(value: Any) -> Any:
    """NaN and infinities as text, which JSON has no numbers for; floats with six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
