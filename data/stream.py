"""Reading windows of tokens from the tar shards, with webdataset over byte ranges.

A chunk is one tar member, and the bytes of a member with its header are themselves a tar file. So the offsets
in the manifest turn any chunk into a stream for webdataset, without reading the shard up to it.
webdataset passes over many kinds of damage in silence; therefore every chunk is checked against the manifest.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.manifest import BYTES_PER_TOKEN, Chunk, DataError, Manifest, Shard
from data.storage import Storage

PAYLOAD_KEY = "tokens"

Step = np.ndarray
"""(rows, 3) int64: global row, chunk, window."""


def read_windows(
    storage: Storage, manifest: Manifest, split: str, seq_len: int, steps: Iterable[Step], keep_steps: int
) -> Iterator[np.ndarray]:
    """Yield the tokens of each step.

    Args:
        storage: where the shards lie.
        steps: which windows, in order; read only as far as needed.
        keep_steps: a decoded chunk stays in memory until it was unused for so many steps.

    Yields:
        (rows, seq_len + 1) uint16 or uint32.

    Raises:
        DataError: a chunk that is missing, cut short or changed; names the shard and the offset.
    """
    chunks = manifest.splits[split].chunks
    cache: dict[int, np.ndarray] = {}

    def read(number: int) -> np.ndarray:
        return read_chunk(storage, manifest.dtype, *chunks[number])

    # Threads start when they are needed: a local folder needs none.
    with ThreadPoolExecutor(storage.connections, "shards") as threads:
        read_all = map if storage.connections == 1 else threads.map
        for step, missing, unused in _plan(steps, keep_steps):
            cache.update(zip(missing, read_all(read, missing), strict=True))
            yield np.stack([_window(cache[chunk], window, seq_len) for _, chunk, window in step.tolist()])
            for number in unused:
                del cache[number]


def read_chunk(storage: Storage, dtype: str, shard: Shard, chunk: Chunk) -> np.ndarray:
    """Return the tokens of one chunk, (tokens,) uint16 or uint32.

    Raises:
        DataError: see :func:`read_windows`.
    """
    place = f"{storage.place}/{shard.name} at offset {chunk.offset}"
    member = io.BytesIO(storage.read_range(shard.name, chunk.offset, chunk.member_bytes(dtype)))
    # One stream per chunk: over several, webdataset would pass over an empty member and read on.
    try:
        samples = list(group_by_keys(tar_file_expander([{"url": place, "stream": member}])))
    except tarfile.TarError as error:
        raise DataError(f"{place}: damaged tar header") from error
    if len(samples) != 1:
        raise DataError(f"{place}: no tar member there")
    return _decode(samples[0], dtype, chunk, place)


def _plan(steps: Iterable[Step], keep_steps: int) -> Iterator[tuple[Step, list[int], list[int]]]:
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


def _window(chunk: np.ndarray, window: int, seq_len: int) -> np.ndarray:
    return chunk[window * seq_len : (window + 1) * seq_len + 1]


def _decode(sample: dict[str, Any], dtype: str, chunk: Chunk, place: str) -> np.ndarray:
    payload: bytes = sample.get(PAYLOAD_KEY, b"")
    size = chunk.tokens * BYTES_PER_TOKEN[dtype]
    if len(payload) != size:
        raise DataError(f"{place}: chunk has {len(payload)} bytes, the manifest says {size}")
    if zlib.crc32(payload) != chunk.crc32:
        raise DataError(f"{place}: chunk is damaged: its CRC-32 is not the manifest's")
    return np.frombuffer(payload, dtype=f"<u{BYTES_PER_TOKEN[dtype]}")
