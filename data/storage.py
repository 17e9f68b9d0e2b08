"""Where shards lie: a folder of this machine, or a URL that serves byte ranges."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np

from data.manifest import DamagedData, DataError

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
ATTEMPTS_PER_TIMEOUT = 4

# What trying again cannot change. The rest (refused or dropped connections, time-outs, 5xx) may pass.
_FINAL_STATUS = range(400, 500)
_PASSING_STATUS = frozenset((408, 425, 429))
_DAMAGED_STATUS = frozenset((404, 410, 416))


class Storage(Protocol):
    """Files by name, read whole or by range. Threads may share one."""

    @property
    def place(self) -> str:
        """The folder or URL, for messages."""
        ...

    @property
    def connections(self) -> int:
        """Ranges that are worth reading at one time."""
        ...

    def read(self, name: str) -> bytes:
        """Return a whole file.

        Raises:
            DataError: it is missing, or cannot be had.
        """
        ...

    def read_range(self, name: str, offset: int, size: int, buffer: memoryview | None = None) -> memoryview:
        """Return ``size`` bytes of a file from ``offset`` on.

        Args:
            name: the file's, with folders separated by ``/``.
            offset, size: the range, bytes.
            buffer: memory of ``size`` bytes or more that may be read into, so that none is made.

        Raises:
            DamagedData: the file is missing or shorter.
            DataError: it cannot be had.
        """
        ...

    def forget(self, name: str, offset: int, size: int) -> None:
        """Keep no copy of a range, whose bytes proved to be damaged."""
        ...

    def check_size(self, name: str, size: int) -> None:
        """Refuse a file that is missing or not ``size`` bytes long, where that costs no round trip.

        Raises:
            DamagedData: it is not as it should be.
        """
        ...


class LocalStorage:
    """A folder of this machine, shared file systems included."""

    connections = 1

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    @property
    def place(self) -> str:
        """See :class:`Storage`."""
        return str(self._folder)

    def read(self, name: str) -> bytes:
        """See :class:`Storage`."""
        path = self._folder / name
        with _one_line(path):
            return path.read_bytes()

    def read_range(self, name: str, offset: int, size: int, buffer: memoryview | None = None) -> memoryview:
        """See :class:`Storage`."""
        path = self._folder / name
        data = (new_buffer(size) if buffer is None else buffer)[:size]
        with _one_line(path), open(path, "rb", buffering=0) as file:
            found = _read_at(file.fileno(), data, offset)
        try:
            return _of_size(data[:found], offset, size)
        except _ShortRead as error:
            raise DamagedData(f"{path}: {error}") from error

    def forget(self, name: str, offset: int, size: int) -> None:
        """Nothing: a folder keeps no copies."""

    def check_size(self, name: str, size: int) -> None:
        """See :class:`Storage`."""
        path = self._folder / name
        with _one_line(path):
            found = path.stat().st_size
        if found != size:
            raise DamagedData(f"{path}: file has {found} bytes, the manifest says {size}")


class RemoteStorage:
    """Any URL that fsspec knows: https, s3, gs, ...

    What fails and may pass is tried again with growing pauses, until nothing was read for ``timeout_s``.

    Args:
        url: the folder's.
        timeout_s: seconds without a success after which a read gives up.
        connections: ranges that are read at one time.

    Raises:
        DataError: no such protocol, or its package is not installed.
    """

    def __init__(self, url: str, *, timeout_s: float, connections: int) -> None:
        self._url = url.rstrip("/")
        self.connections = connections
        self._timeout_s = timeout_s
        self._files = _file_system(self._url, timeout_s)

    @property
    def place(self) -> str:
        """See :class:`Storage`."""
        return self._url

    def read(self, name: str) -> bytes:
        """See :class:`Storage`."""
        return self._insist(name, lambda path: bytes(self._files.cat_file(path)))

    def read_range(self, name: str, offset: int, size: int, buffer: memoryview | None = None) -> memoryview:
        """See :class:`Storage`; what the network gives is not copied into ``buffer``."""

        def attempt(path: str) -> memoryview:
            data = memoryview(self._files.cat_file(path, start=offset, end=offset + size))
            if len(data) > size:
                raise _NoRanges
            return _of_size(data, offset, size)

        return self._insist(name, attempt)

    def forget(self, name: str, offset: int, size: int) -> None:
        """Nothing: this is where the bytes come from."""

    def check_size(self, name: str, size: int) -> None:
        """Nothing: hundreds of ranks would ask for hundreds of shards. A read finds what is wrong."""

    def _insist(self, name: str, attempt: Callable[[str], T]) -> T:
        """Try until it works, it cannot work, or time is up."""
        url, where = _file_url(self._url, name), f"{self.place}/{name}"
        started = time.monotonic()
        pause, tries = FIRST_PAUSE_S, 0
        while True:
            tries += 1
            try:
                return attempt(url)
            except Exception as error:  # every protocol's package raises its own
                kind = DamagedData if _is_damage(error) else DataError
                if _is_final(error):
                    raise kind(f"{where}: {_reason(error)}") from error
                spent = time.monotonic() - started
                if spent + pause > self._timeout_s:
                    raise kind(
                        f"{where}: gave up after {spent:.0f} s and {tries} attempts "
                        f"(data.remote_timeout_s={self._timeout_s:g}): {_reason(error)}"
                    ) from error
            # Ranks that failed together must not come back together.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)


class _ShortRead(Exception):
    """Fewer bytes than asked for: a damaged file, or a transfer that broke."""


class _NoRanges(Exception):
    """The server sent the whole file."""


def _file_url(folder: str, name: str) -> str:
    if urlsplit(folder).scheme in ("http", "https"):
        name = quote(name, safe="/")
    return f"{folder}/{name}"


def _file_system(url: str, timeout_s: float) -> Any:
    # Not at the top: only remote shards need it.
    import fsspec

    protocol = urlsplit(url).scheme
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        # A server that answers nothing must leave time for other attempts.
        share = timeout_s / ATTEMPTS_PER_TIMEOUT
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=share, sock_read=share)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        return fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise DataError(f"data.dir={url}: {error}") from error


def _is_final(error: Exception) -> bool:
    """Whether another attempt cannot end otherwise."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in _FINAL_STATUS and status not in _PASSING_STATUS
    return isinstance(error, FileNotFoundError | PermissionError | _NoRanges)


def _is_damage(error: Exception) -> bool:
    """Whether a server that works says so of the file: it is missing, or ends before the range."""
    status = getattr(error, "status", None)
    return status in _DAMAGED_STATUS or isinstance(error, FileNotFoundError | _ShortRead)


def _reason(error: Exception) -> str:
    """What happened, in a few words: the packages' own messages repeat the URL."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, _NoRanges):
        return "the server does not serve byte ranges"
    if isinstance(error, _ShortRead):
        return str(error)
    status = getattr(error, "status", None)
    return type(error).__name__ + (f" {status}" if isinstance(status, int) else "")


def read_decoded(
    storage: Storage,
    name: str,
    offset: int,
    size: int,
    buffer: memoryview | None,
    decode: Callable[[memoryview], T],
) -> T:
    """Read a range and check it; what fails the check is read anew once, past any cache.

    Args:
        storage, name, offset, size, buffer: as for :meth:`Storage.read_range`.
        decode: raises :class:`DamagedData` for bytes that are not as they should be.

    Raises:
        DamagedData, DataError: as ``read_range`` and ``decode``.
    """
    data = storage.read_range(name, offset, size, buffer)
    try:
        return decode(data)
    except DamagedData:
        storage.forget(name, offset, size)
    return decode(storage.read_range(name, offset, size, buffer))


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Errors of the operating system in the words of this package."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedData(f"{path}: file is missing") from error
    except OSError as error:
        # A disk or a file server that fails, or a right that is missing: nothing is said about the bytes.
        raise DataError(f"{path}: {error.strerror}") from error


def new_buffer(size: int) -> memoryview:
    """Memory to read into; not even set to 0, for that would cost as much as reading."""
    return np.empty(size, dtype=np.uint8).data


def _read_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Fill ``data`` from a place of a file and return how many bytes there were."""
    found = 0
    while found < len(data) and (count := os.preadv(descriptor, [data[found:]], offset + found)):
        found += count
    return found


def _of_size(data: memoryview, offset: int, size: int) -> memoryview:
    if len(data) != size:
        raise _ShortRead(f"file is cut short: {len(data)} of {size} bytes at offset {offset}")
    return data
