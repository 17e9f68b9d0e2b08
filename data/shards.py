"""Writing the shards of one split: tokens in, tar files of chunks out, resumable at any batch."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.files import sync_folder
from data.manifest import (
    BYTES_PER_TOKEN,
    Chunk,
    DataError,
    Shard,
    Split,
    shard_from_json,
    shard_to_json,
)

PART = ".part"
HASH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """How tokens are cut into files."""

    dtype: str
    chunk_tokens: int
    chunks_per_shard: int

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """NumPy's type of a token."""
        return np.dtype(f"<u{BYTES_PER_TOKEN[self.dtype]}")


class SplitWriter:
    """Appends tokens to a split; a shard gets its final name when it is complete and on disk."""

    def __init__(self, folder: Path, split: str, layout: ShardLayout, state: dict[str, Any] | None = None):
        """Start a split, or continue it from what :meth:`checkpoint` returned.

        Raises:
            DataError, OSError: the files do not hold what the state says.
        """
        self._folder, self._split, self._layout = folder, split, layout
        self._documents = self._tokens = self._num_chunks = self._position = 0
        self._shards: list[Shard] = []
        self._chunks: list[Chunk] = []
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        if state is not None:
            self._restore(state)
        self._remove_later_shards()
        self._file = open(self._part_path, "r+b" if self._position else "wb")  # noqa: SIM115
        self._file.truncate(self._position)
        self._file.seek(self._position)

    @property
    def documents(self) -> int:
        """Documents appended so far."""
        return self._documents

    @property
    def tokens(self) -> int:
        """Tokens appended so far."""
        return self._tokens

    def append(self, tokens: np.ndarray, documents: int) -> None:
        """Append whole documents.

        Args:
            tokens: (N,), the documents one after the other, each ended by the end-of-text token.
            documents: how many they are.
        """
        self._documents += documents
        self._tokens += len(tokens)
        self._pending.append(tokens.astype(self._layout.stored_dtype))
        self._num_pending += len(tokens)
        size = self._layout.chunk_tokens
        if self._num_pending <= size:
            return
        pending, start = np.concatenate(self._pending), 0
        while len(pending) - start > size:
            self._write_chunk(pending[start : start + size + 1])
            start += size
        self._pending, self._num_pending = [pending[start:].copy()], len(pending) - start

    def checkpoint(self) -> dict[str, Any]:
        """Make what is written durable and return the state (JSON-able) to continue from here."""
        self._file.flush()
        os.fsync(self._file.fileno())
        pending = b"".join(tokens.tobytes() for tokens in self._pending)
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "num_chunks": self._num_chunks,
            "shards": [shard_to_json(shard) for shard in self._shards],
            "open_shard": shard_to_json(Shard("", self._position, "", tuple(self._chunks))),
            "pending": base64.b64encode(pending).decode("ascii"),
        }

    def finish(self) -> Split:
        """Write the last, shorter chunk, complete the last shard and return the split."""
        if self._num_pending > 1:  # a single token is the overlap of the chunk before
            self._write_chunk(np.concatenate(self._pending))
        if self._chunks:
            self._complete_shard(open_next=False)
        else:
            self.close()
            self._part_path.unlink()
        return Split(self._documents, self._tokens, tuple(self._shards))

    def close(self) -> None:
        """Close the open file and leave everything as it is; what a full disk refuses was never promised."""
        with contextlib.suppress(OSError):
            self._file.close()

    @property
    def _shard_path(self) -> Path:
        return self._folder / f"{self._split}-{len(self._shards):06d}.tar"

    @property
    def _part_path(self) -> Path:
        path = self._shard_path
        return path.with_name(path.name + PART)

    def _write_chunk(self, tokens: np.ndarray) -> None:
        payload = tokens.tobytes()
        chunk = Chunk(self._position, len(tokens), zlib.crc32(payload))
        member = tarfile.TarInfo(f"{self._num_chunks:09d}.tokens")
        member.size = len(payload)
        header = member.tobuf(tarfile.USTAR_FORMAT)
        length = chunk.member_bytes(self._layout.dtype)
        self._file.write(header + payload + bytes(length - len(header) - len(payload)))
        self._position += length
        self._num_chunks += 1
        self._chunks.append(chunk)
        if len(self._chunks) == self._layout.chunks_per_shard:
            self._complete_shard(open_next=True)

    def _complete_shard(self, open_next: bool) -> None:
        end = self._position + 2 * tarfile.BLOCKSIZE
        size = -(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        self._file.write(bytes(size - self._position))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        shard = Shard(self._shard_path.name, size, hash_file(self._part_path), tuple(self._chunks))
        os.replace(self._part_path, self._shard_path)
        sync_folder(self._folder)
        self._shards.append(shard)
        self._chunks, self._position = [], 0
        if open_next:
            self._file = open(self._part_path, "wb")  # noqa: SIM115

    def _restore(self, state: dict[str, Any]) -> None:
        dtype = self._layout.dtype
        self._documents, self._tokens = state["documents"], state["tokens"]
        self._num_chunks = state["num_chunks"]
        self._shards = [shard_from_json(shard, dtype) for shard in state["shards"]]
        open_shard = shard_from_json({**state["open_shard"], "name": "open"}, dtype)
        self._chunks, self._position = list(open_shard.chunks), open_shard.bytes
        self._pending = [np.frombuffer(base64.b64decode(state["pending"]), dtype=self._layout.stored_dtype)]
        self._num_pending = len(self._pending[0])
        for shard in self._shards:
            path = self._folder / shard.name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise DataError(f"{path}: changed since the interrupted run; --overwrite starts again")

    def _remove_later_shards(self) -> None:
        """Drop what was written after the checkpoint; the open shard goes back to being open."""
        if self._position:
            self._reopen()
        keep = {shard.name for shard in self._shards} | {self._part_path.name}
        for path in self._folder.glob(f"{self._split}-*.tar*"):
            if path.name not in keep:
                path.unlink()

    def _reopen(self) -> None:
        """Give the open shard its unfinished name back and check the chunks that it holds already."""
        if not self._part_path.exists() and self._shard_path.exists():
            os.replace(self._shard_path, self._part_path)
        with open(self._part_path, "rb") as file:
            for chunk in self._chunks:
                file.seek(chunk.offset + tarfile.BLOCKSIZE)
                payload = file.read(chunk.tokens * BYTES_PER_TOKEN[self._layout.dtype])
                if zlib.crc32(payload) != chunk.crc32:
                    raise DataError(
                        f"{self._part_path}: changed since the interrupted run; --overwrite starts again"
                    )


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()
