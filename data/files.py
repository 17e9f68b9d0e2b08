"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """Where :func:`replace_file` writes before the rename: a hidden file beside ``path``."""
    return path.with_name(f".{path.name}.tmp")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and rename it into place, both made durable.

    A reader sees the old file or the new one. After a crash a hidden temporary file may be left, which
    the next call overwrites.

    Args:
        path: the file to appear; its folder must exist.
        write: receives the temporary path and creates the file there.
    """
    temporary = temporary_path(path)
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_bytes(path: Path, content: bytes) -> None:
    """:func:`replace_file` with bytes."""
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def replace_text(path: Path, text: str) -> None:
    """:func:`replace_file` with UTF-8 text."""
    replace_bytes(path, text.encode())


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
