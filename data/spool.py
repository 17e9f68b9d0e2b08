"""Validation documents on disk until all are known, because their order need not be the corpus's."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import DataError

READ_BYTES = 1 << 20
SPOOL_NAME = "val.spool"
HEADER = np.dtype([("place", "<i8"), ("tokens", "<i8")])


class DocumentSpool:
    """Appends documents with their places to a file and returns them sorted by place; resumable."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], state: dict[str, int] | None = None):
        """Start, or continue from what :meth:`checkpoint` returned.

        Args:
            folder: where ``val.spool`` is written.
            dtype: of the tokens.

        Raises:
            DataError: the file does not hold what the state says.
        """
        self._path, self._dtype = folder / SPOOL_NAME, dtype
        self._position = self._crc32 = self.documents = self.tokens = 0
        if state is not None:
            self._restore(state)
        self._file = open(self._path, "r+b" if self._position else "wb")  # noqa: SIM115
        self._file.truncate(self._position)
        self._file.seek(self._position)

    def append(self, place: int, tokens: np.ndarray) -> None:
        """Append one document, (N,) tokens with its end-of-text token."""
        record = np.array((place, len(tokens)), dtype=HEADER).tobytes() + tokens.tobytes()
        self._position += self._file.write(record)
        self._crc32 = zlib.crc32(record, self._crc32)
        self.documents += 1
        self.tokens += len(tokens)

    def checkpoint(self) -> dict[str, int]:
        """Make what was appended durable and return the state (JSON-able) to continue from here."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {
            "bytes": self._position,
            "crc32": self._crc32,
            "documents": self.documents,
            "tokens": self.tokens,
        }

    def in_order(self) -> Iterator[np.ndarray]:
        """Yield the documents' tokens by rising place."""
        self._file.flush()
        if not self.documents:
            return
        content = np.memmap(self._path, np.uint8, "r", shape=(self._position,))
        found, offset = [], 0
        for _ in range(self.documents):
            place, size = content[offset : offset + HEADER.itemsize].view(HEADER)[0].item()
            offset += HEADER.itemsize
            found.append((place, offset, size))
            offset += size * self._dtype.itemsize
        for _, offset, size in sorted(found):
            yield content[offset : offset + size * self._dtype.itemsize].view(self._dtype)

    def close(self) -> None:
        """Close the file and leave it; what a full disk refuses was never promised."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _restore(self, state: dict[str, int]) -> None:
        self._position, self.documents, self.tokens = state["bytes"], state["documents"], state["tokens"]
        left = self._position
        if left:
            with open(self._path, "rb") as file:
                while left and (piece := file.read(min(left, READ_BYTES))):
                    self._crc32 = zlib.crc32(piece, self._crc32)
                    left -= len(piece)
        if left or self._crc32 != state["crc32"]:
            raise DataError(f"{self._path}: changed since the interrupted run; --overwrite starts again")
