"""Reading tar files as a stream, where a truncated or damaged one is an error.

Python's tarfile takes a damaged header, and the end of the data at a header, for the end of the archive.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO

from data.manifest import TAR_BLOCK, DataError

SKIP_BYTES = 1 << 20
MAX_NAME_BYTES = 1 << 16
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


def read_members(stream: IO[bytes], where: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of the regular members with one of the suffixes, in the order of the archive.

    Args:
        stream: read from its position to the archive's end, never backward.
        where: the archive's name for error messages.
        suffixes: in lower case.

    Raises:
        DataError: truncated, damaged, or no tar file.
    """
    name = None
    while (header := _read_header(stream, where)) is not None:
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = _read(stream, header, where)[: header.size].rstrip(b"\0").decode("utf-8", "replace")
        elif header.type == tarfile.XHDTYPE:
            name = _pax_path(_read(stream, header, where)) or name
        else:
            name = name or header.name
            if header.type in REGULAR and name.lower().endswith(suffixes):
                yield name, _read(stream, header, where)
            else:
                _skip(stream, header, where)
            name = None


def _read_header(stream: IO[bytes], where: str) -> tarfile.TarInfo | None:
    block = stream.read(TAR_BLOCK)
    if len(block) < TAR_BLOCK:
        raise DataError(f"{where}: damaged tar file: truncated")
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError as error:
        raise DataError(f"{where}: not a tar file, or a damaged one: {error}") from error


def _read(stream: IO[bytes], header: tarfile.TarInfo, where: str) -> bytes:
    if header.type not in REGULAR and header.size > MAX_NAME_BYTES:
        raise DataError(f"{where}: damaged tar file: a name of {header.size} bytes")
    data = stream.read(header.size)
    padding = stream.read(-header.size % TAR_BLOCK)
    if len(data) + len(padding) < header.size + -header.size % TAR_BLOCK:
        raise DataError(f"{where}: damaged tar file: truncated in {header.name}")
    return data


def _skip(stream: IO[bytes], header: tarfile.TarInfo, where: str) -> None:
    left = -(-header.size // TAR_BLOCK) * TAR_BLOCK
    while left:
        piece = stream.read(min(left, SKIP_BYTES))
        if not piece:
            raise DataError(f"{where}: damaged tar file: truncated in {header.name}")
        left -= len(piece)


def _pax_path(data: bytes) -> str | None:
    """Return the value of ``path`` among the records, lines of ``LENGTH KEY=VALUE``."""
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            return None
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "replace")
        data = data[int(length) :]
    return None
