"""Opening a shard folder for reading, wherever it lies, with all checks that are cheap."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data.config import DataConfig, is_remote
from data.label_cache import LABELS_NAME, LabelCache, LabelSettings, parse_labels, read_labels
from data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    DamagedData,
    DataError,
    Manifest,
    parse_manifest,
    read_manifest,
)
from data.shard_cache import CachedStorage
from data.storage import LocalStorage, RemoteStorage, Storage
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

GIGABYTE = 10**9


class Source(NamedTuple):
    """One shard folder."""

    storage: Storage
    manifest: Manifest


def open_source(config: DataConfig) -> Source:
    """Read the manifest and check whatever is cheap, so that a run fails at its start.

    Args:
        config: the data section of one source.

    Raises:
        DataError: a shard that is missing or of another size, another tokenizer, ``seq_len`` that does not
            divide the chunks, a split without a single window, or a URL that does not answer.
    """
    storage, manifest = _open(config)
    if manifest.chunk_tokens % config.seq_len:
        raise DataError(
            f"data.seq_len={config.seq_len} does not divide chunk_tokens={manifest.chunk_tokens} "
            f"of {config.dir}"
        )
    _check_tokenizer(storage, manifest)
    for name, split in manifest.splits.items():
        _check_sizes(config, storage, ((shard.name, shard.bytes) for shard in split.shards))
        _check_windows(config, manifest, name)
    return Source(storage, manifest)


def open_manifest(config: DataConfig) -> Manifest:
    """The manifest of one source alone, without a look at the shards; DataError as :func:`open_source`."""
    return _open(config).manifest


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that made the tokens, those of all sources.

    Raises:
        DataError: it is missing or not a tokenizer.
    """
    storage, _ = _open(next(iter(config.by_source.values())))
    return Tokenizer(storage.read(TOKENIZER_NAME), f"{storage.place}/{TOKENIZER_NAME}")


def windows_per_chunk(manifest: Manifest, split: str, seq_len: int) -> list[int]:
    """Return the number of windows of each chunk of a split; DataError if there is no such split."""
    if split not in manifest.splits:
        raise DataError(f"the manifest has no split {split!r}, only {', '.join(sorted(manifest.splits))}")
    return [chunk.num_windows(seq_len) for _, chunk in manifest.splits[split].chunks]


def open_label_cache(config: DataConfig, place: str, wanted: LabelSettings) -> LabelCache:
    """Open stored targets and check whatever is cheap.

    Args:
        config: the data section.
        place: folder or URL of the labels.
        wanted: what the labels are for.

    Raises:
        DataError: they are unfinished, made for something else, or have files missing.
    """
    if not is_remote(place):
        read_labels(Path(place))  # says what to do where there is none
    storage = _storage(config, place)
    raw = storage.read(LABELS_NAME)
    cache = LabelCache(
        _cached(config, storage, hashlib.sha256(raw).hexdigest()),
        *parse_labels(raw, f"{storage.place}/{LABELS_NAME}"),
    )
    cache.check(wanted)
    _check_sizes(config, cache.storage, cache.files())
    return cache


def _open(config: DataConfig) -> Source:
    assert not config.sources, "sources are opened one by one"
    storage = _storage(config, config.dir)
    if config.is_remote:
        manifest = parse_manifest(storage.read(MANIFEST_NAME), f"{storage.place}/{MANIFEST_NAME}")
    else:
        manifest = read_manifest(config.dir)
    return Source(_cached(config, storage, manifest.sha256), manifest)


def _storage(config: DataConfig, place: str) -> Storage:
    if not is_remote(place):
        return LocalStorage(place)
    return RemoteStorage(place, timeout_s=config.remote_timeout_s, connections=config.remote_connections)


def _cached(config: DataConfig, storage: Storage, version: str) -> Storage:
    if not config.cache_dir:
        return storage
    return CachedStorage(
        storage, config.cache_dir, max_bytes=int(config.cache_gb * GIGABYTE), version=version
    )


def _check_sizes(config: DataConfig, storage: Storage, files: Iterable[tuple[str, int]]) -> None:
    """Files that are missing or of another size end the run, or are named where damage is skipped."""
    for name, size in files:
        try:
            storage.check_size(name, size)
        except DamagedData as error:
            if config.on_damage == "raise":
                raise
            logger.warning("%s; rows of it that cannot be read are skipped (data.on_damage=skip)", error)


def _check_windows(config: DataConfig, manifest: Manifest, split: str) -> None:
    if not sum(windows_per_chunk(manifest, split, config.seq_len)):
        longest = max((chunk.tokens - 1 for _, chunk in manifest.splits[split].chunks), default=0)
        raise DataError(
            f"{config.dir}: split {split!r} has 0 windows of data.seq_len={config.seq_len}: "
            f"its longest chunk has room for {longest} tokens"
        )


def _check_tokenizer(storage: Storage, manifest: Manifest) -> None:
    found = hashlib.sha256(storage.read(TOKENIZER_NAME)).hexdigest()
    if found != manifest.tokenizer.sha256:
        raise DataError(
            f"{storage.place}/{TOKENIZER_NAME}: SHA-256 {found[:12]}... is not the manifest's "
            f"{manifest.tokenizer.sha256[:12]}...: the tokens were made by another tokenizer"
        )
