"""Byte ranges of shards kept on a node's own disk, shared by its processes, bounded in size."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from data.storage import Storage, new_buffer

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
RECOUNT_SHARE = 0.01
"""A process looks at the whole folder again when it has added this share of the bound."""
SPARED_SHARE = 0.9
"""Share of the bound that is left after the longest unused files were deleted."""
ABANDONED_AFTER_S = 3600.0
"""A temporary file of this age has nobody who writes it."""
LOCK_NAME = ".lock"


class CachedStorage:
    """Another storage behind a folder of hashed names.

    A file holds one range and the XXH3 digest of its bytes, and appears by rename: processes that miss
    together write the same bytes, and a damaged file counts as missing. Whole files are not kept, because
    a manifest may change under its name.

    Args:
        inner: where ranges come from.
        folder: made when missing; several data sets and jobs may share it.
        max_bytes: bound of all files together. Each process may go beyond it by ``RECOUNT_SHARE``.
        version: identity of the contents (the manifest's hash): changed shards have other names here.
    """

    def __init__(self, inner: Storage, folder: str | Path, *, max_bytes: int, version: str) -> None:
        self._inner = inner
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._version = version
        self._folder.mkdir(parents=True, exist_ok=True)
        self._added = max_bytes  # the first file counts what is there

    @property
    def place(self) -> str:
        """That of the storage behind."""
        return self._inner.place

    @property
    def connections(self) -> int:
        """That of the storage behind."""
        return self._inner.connections

    def read(self, name: str) -> bytes:
        """Return a whole file, from the storage behind."""
        return self._inner.read(name)

    def check_size(self, name: str, size: int) -> None:
        """As the storage behind does."""
        self._inner.check_size(name, size)

    def forget(self, name: str, offset: int, size: int) -> None:
        """Delete a range that was damaged before it came here, of which its own digest knows nothing."""
        (self._folder / self._name(name, offset, size)).unlink(missing_ok=True)
        self._inner.forget(name, offset, size)

    def read_range(self, name: str, offset: int, size: int, buffer: memoryview | None = None) -> memoryview:
        """Return ``size`` bytes from ``offset`` on, from the folder if they are there."""
        path = self._folder / self._name(name, offset, size)
        data = _read_checked(path, size, buffer)
        if data is None:
            data = self._inner.read_range(name, offset, size, buffer)
            try:
                self._keep(path, data)
            except OSError as error:
                # A full or broken local disk costs speed, not the run.
                logger.warning("%s: not kept in the cache: %s", path, error.strerror)
        return data

    def _name(self, name: str, offset: int, size: int) -> str:
        key = "\n".join((self._version, name, str(offset), str(size)))
        return hashlib.sha256(key.encode()).hexdigest()

    def _keep(self, path: Path, data: memoryview) -> None:
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self._folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.write(xxhash.xxh3_128_digest(data))
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._added += len(data) + DIGEST_BYTES
        if self._added > RECOUNT_SHARE * self._max_bytes:
            self._added = 0
            self._shrink()

    def _shrink(self) -> None:
        """Delete the longest unused files if there are too many bytes; one process at a time."""
        with suppress(Timeout), FileLock(self._folder / LOCK_NAME, timeout=0):
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            if total <= self._max_bytes:
                return
            for _, size, path in files:
                if total <= SPARED_SHARE * self._max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, bytes and path of each file, those that killed processes left included."""
        found = []
        abandoned = time.time() - ABANDONED_AFTER_S
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    facts = entry.stat()
                    in_work = entry.name.startswith(".") and facts.st_mtime > abandoned
                    if not in_work and entry.name != LOCK_NAME:
                        found.append((facts.st_mtime, facts.st_size, Path(entry.path)))
        return found


def _read_checked(path: Path, size: int, buffer: memoryview | None) -> memoryview | None:
    """Return a file's range and mark it as used; ``None`` if it is missing, cut short or damaged."""
    data = (new_buffer(size) if buffer is None else buffer)[:size]
    try:
        with open(path, "rb", buffering=0) as file:
            found = file.readinto(data)
            digest = file.read(DIGEST_BYTES + 1)
    except FileNotFoundError:
        return None
    if found != size or digest != xxhash.xxh3_128_digest(data):
        logger.warning("%s: damaged cache file, read again from its source", path)
        path.unlink(missing_ok=True)
        return None
    with suppress(OSError):
        os.utime(path)
    return data
