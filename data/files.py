"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
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


def make_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Make a folder that appears with all its files or not at all, durably.

    Args:
        path: the folder to appear.
        fill: receives an empty hidden folder beside it and writes the files, without subfolders.

    Raises:
        FileExistsError: there is something at ``path``; it stays as it is.
    """
    if os.path.lexists(path):
        raise FileExistsError(17, "exists already, choose another place or remove it", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir()
        fill(temporary)
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
