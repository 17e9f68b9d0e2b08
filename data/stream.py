"""Reading windows of tokens from the tar shards, with webdataset over byte ranges.

A chunk is one tar member, and the bytes of a member with its header are themselves a tar file. So the offsets
in the manifest turn any chunk into a stream for webdataset, without reading the shard up to it.
webdataset passes over many kinds of damage in silence; therefore every chunk is checked against the manifest.

Of webdataset's stages the one that takes members out of a tar file is replaced: it goes through ``tarfile``,
which reads 10 KB at a time and joins the pieces three times, and that was half of the loader's work.
"""

from __future__ import annotations

import logging
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from webdataset.tariterators import group_by_keys

from data.batch import Damage, DamagedRow
from data.label_cache import Labels
from data.manifest import (
    BYTES_PER_TOKEN,
    MANIFEST_NAME,
    TAR_BLOCK,
    Chunk,
    DamagedData,
    DataError,
    Manifest,
    Shard,
    parse_manifest,
)
from data.storage import Storage, new_buffer, read_decoded

logger = logging.getLogger(__name__)

PAYLOAD_KEY = "tokens"

Step = np.ndarray
"""(rows, 3) int64: global row, chunk, window."""


class Windows(NamedTuple):
    """The windows of one step."""

    tokens: np.ndarray
    """(rows, T + 1) uint16 or uint32."""
    targets: np.ndarray | None
    """(rows, T, A) uint16, where labels are read too."""
    damaged: tuple[DamagedRow, ...] = ()
    """Rows of zeros, whose chunk or labels are damaged."""


def read_windows(
    storage: Storage,
    manifest: Manifest,
    split: str,
    seq_len: int,
    steps: Iterable[Step],
    keep_steps: int,
    labels: Labels | None = None,
    on_damage: Literal["raise", "skip"] = "raise",
) -> Iterator[Windows]:
    """Yield the windows of each step.

    Args:
        storage: where the shards lie.
        manifest: theirs.
        split: name of the split.
        seq_len: tokens T of a window.
        steps: which windows, in order; read only as far as needed.
        keep_steps: a chunk stays in memory until it was unused for so many steps.
        labels: stored targets of the same windows.
        on_damage: ``skip`` puts zeros in place of windows that are damaged, and names their rows.

    Raises:
        DamagedData: a chunk that is missing, cut short or changed; names the shard and the offset, or the
            file of labels.
        DataError: a chunk that cannot be had, or a data set that is gone or another one now.
    """
    chunks = manifest.splits[split].chunks
    tokens = OpenChunks(
        max(chunk.member_bytes(manifest.dtype) for _, chunk in chunks),
        lambda number, buffer: window_view(
            read_chunk(storage, manifest.dtype, *chunks[number], buffer), seq_len
        ),
        np.zeros(seq_len + 1, dtype=f"<u{BYTES_PER_TOKEN[manifest.dtype]}"),
        partial(_check_unchanged, storage, manifest) if on_damage == "skip" else None,
    )
    targets = None
    if labels is not None:
        targets = OpenChunks(
            labels.largest_chunk_bytes(split),
            partial(labels.read_chunk, split),
            np.zeros(labels.window_shape, dtype="<u2"),
            labels.check_unchanged if on_damage == "skip" else None,
        )
    both = [tokens, *([] if targets is None else [targets])]
    # Threads start when they are needed: a local folder needs none.
    with ThreadPoolExecutor(storage.connections, "shards") as threads:
        read_all = map if storage.connections == 1 else threads.map
        for step, missing, unused in plan_reads(steps, keep_steps):
            for opened in both:
                opened.open(missing, read_all)
            errors = {number: error for opened in both for number, error in opened.damaged.items()}
            yield Windows(
                tokens.gather(step),
                None if targets is None else targets.gather(step),
                _damaged_rows(split, step, errors) if errors else (),
            )
            for opened in both:
                opened.close(unused)


def _damaged_rows(split: str, step: Step, errors: dict[int, str]) -> tuple[DamagedRow, ...]:
    return tuple(
        DamagedRow(row, Damage(split, chunk, errors[chunk]))
        for row, chunk in enumerate(step[:, 1].tolist())
        if chunk in errors
    )


def _check_unchanged(storage: Storage, manifest: Manifest) -> None:
    """Refuse to call a chunk damaged where the data set is gone (not mounted) or was made anew."""
    names = {f"{folder}/{MANIFEST_NAME}": part for folder, part in manifest.joined.items()}
    for name, opened in (names or {MANIFEST_NAME: manifest}).items():
        if parse_manifest(storage.read(name), f"{storage.place}/{name}") != opened:
            raise DataError(f"{storage.place}/{name}: changed since it was opened")


class OpenChunks:
    """Chunks that are in use. Memory of closed ones is used again: fresh pages cost more than reading."""

    def __init__(
        self,
        size: int,
        read: Callable[[int, memoryview], np.ndarray],
        blank: np.ndarray,
        check_unchanged: Callable[[], None] | None,
    ):
        """Start with none.

        Args:
            size: bytes of the largest chunk.
            read: returns a chunk's windows, (windows, ...); may read into the bytes that it is given.
            blank: stands for every window of a damaged chunk.
            check_unchanged: called before a chunk counts as damaged; ``None`` to raise instead.
        """
        self._size, self._read = size, read
        self._blank, self._check_unchanged = blank, check_unchanged
        self._windows: dict[int, np.ndarray] = {}
        self._buffers: dict[int, memoryview] = {}
        self._free: list[memoryview] = []
        self.damaged: dict[int, str] = {}
        """Those of the open chunks that are damaged, and how."""

    def open(self, numbers: Sequence[int], read_all: Callable[..., Iterable[np.ndarray]]) -> None:
        """Read chunks with ``read_all``, which is ``map`` or does as ``map`` does."""
        buffers = [self._free.pop() if self._free else new_buffer(self._size) for _ in numbers]
        self._buffers.update(zip(numbers, buffers, strict=True))
        self._windows.update(zip(numbers, read_all(self._read_or_blank, numbers, buffers), strict=True))

    def _read_or_blank(self, number: int, buffer: memoryview) -> np.ndarray:
        try:
            return self._read(number, buffer)
        except DamagedData as error:
            if self._check_unchanged is None:
                raise
            self._check_unchanged()
            logger.warning("%s; its rows are skipped (data.on_damage=skip)", error)
            self.damaged[number] = str(error)
        # No chunk has so many windows; a broadcast array takes no memory.
        return np.broadcast_to(self._blank, (2**40, *self._blank.shape))

    def close(self, numbers: Iterable[int]) -> None:
        """Forget chunks."""
        for number in numbers:
            del self._windows[number]
            self.damaged.pop(number, None)
            self._free.append(self._buffers.pop(number))

    def gather(self, step: Step) -> np.ndarray:
        """Copy the windows of a step out of open chunks, (rows, ...) of their dtype."""
        out = np.empty((len(step), *self._blank.shape), dtype=self._blank.dtype)
        for row, (_, chunk, window) in enumerate(step.tolist()):
            out[row] = self._windows[chunk][window]
        return out


def window_view(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """The windows of a chunk's tokens without a copy, (windows, T + 1); neighbours share a token."""
    shape = ((len(tokens) - 1) // seq_len, seq_len + 1)
    strides = (seq_len * tokens.itemsize, tokens.itemsize)
    return np.lib.stride_tricks.as_strided(tokens, shape, strides, writeable=False)


def read_chunk(
    storage: Storage, dtype: str, shard: Shard, chunk: Chunk, buffer: memoryview | None = None
) -> np.ndarray:
    """Return the tokens of one chunk, (tokens,) uint16 or uint32.

    Args:
        storage: where the shards lie.
        dtype: the manifest's.
        shard, chunk: as the manifest describes them.
        buffer: at least ``chunk.member_bytes(dtype)`` bytes that may be read into.

    Raises:
        DataError: see :func:`read_windows`.
    """
    place = f"{storage.place}/{shard.name} at offset {chunk.offset}"
    size = chunk.member_bytes(dtype)
    decode = partial(_decode, dtype, chunk, place)
    return read_decoded(storage, shard.name, chunk.offset, size, buffer, decode)


def expand_member(place: str, data: memoryview) -> Iterator[dict[str, Any]]:
    """Webdataset's stage from tar files to their members, for one that has a single member; copies nothing.

    Args:
        place: what webdataset calls the file.
        data: header and padded payload.

    Yields:
        Name and payload of the member; nothing for a header of zeros, which ends a tar file, or for what
        is no regular file.

    Raises:
        tarfile.TarError: the header's checksum is wrong.
    """
    try:
        header = tarfile.TarInfo.frombuf(bytes(data[:TAR_BLOCK]), "utf-8", "strict")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed does not have it
        return
    if header.isreg():
        payload = data[TAR_BLOCK : TAR_BLOCK + header.size]
        yield {"fname": header.name, "data": payload, "__url__": place}


def plan_reads(steps: Iterable[Step], keep_steps: int) -> Iterator[tuple[Step, list[int], list[int]]]:
    """Yield each step with the chunks to read before it and those to forget after it."""
    last_used: dict[int, int] = {}
    for now, step in enumerate(steps):
        needed = list(dict.fromkeys(step[:, 1].tolist()))
        missing = [chunk for chunk in needed if chunk not in last_used]
        last_used.update((chunk, now) for chunk in needed)
        unused = [chunk for chunk, used in last_used.items() if used <= now - keep_steps]
        for chunk in unused:
            del last_used[chunk]
        yield step, missing, unused


def _decode(dtype: str, chunk: Chunk, place: str, member: memoryview) -> np.ndarray:
    # One stream per chunk: over several, webdataset would pass over an empty member and read on.
    try:
        samples = list(group_by_keys(expand_member(place, member)))
    except tarfile.TarError as error:
        raise DamagedData(f"{place}: damaged tar header") from error
    if len(samples) != 1:
        raise DamagedData(f"{place}: no tar member there")
    payload: memoryview | bytes = samples[0].get(PAYLOAD_KEY, b"")
    size = chunk.tokens * BYTES_PER_TOKEN[dtype]
    if len(payload) != size:
        raise DamagedData(f"{place}: chunk has {len(payload)} bytes, the manifest says {size}")
    if zlib.crc32(payload) != chunk.crc32:
        raise DamagedData(f"{place}: chunk is damaged: its CRC-32 is not the manifest's")
    return np.frombuffer(payload, dtype=f"<u{BYTES_PER_TOKEN[dtype]}")
