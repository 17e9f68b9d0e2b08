"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and rename it into place, both made durable.

    A reader sees the old file or the new one; after a crash a hidden ``.NAME.tmp`` may be left, which
    the next call overwrites.

    Args:
        path: the file to appear; its folder must exist.
        write: receives the temporary path and creates the file there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """:func:`replace_file` with UTF-8 text."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
