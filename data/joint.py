"""Several sources read as one: the shards of all in one storage, under one manifest.

The stream below then knows nothing of mixtures. A shard is called ``SOURCE/SHARD`` there, so whatever is
said of a damaged one names its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from data.label_cache import LabelCache, Labels
from data.manifest import DataError, Manifest, Shard, Split
from data.source import Source
from data.storage import Storage


class JointStorage:
    """Storages under one roof; a name begins with that of its storage.

    Args:
        place: what messages call it.
        storages: by name.
    """

    def __init__(self, place: str, storages: Mapping[str, Storage]) -> None:
        self.place = place
        self._storages = dict(storages)

    @property
    def connections(self) -> int:
        """See :class:`data.storage.Storage`; as many as the fastest wants."""
        return max(storage.connections for storage in self._storages.values())

    def read(self, name: str) -> bytes:
        """See :class:`data.storage.Storage`."""
        storage, name = self._find(name)
        return storage.read(name)

    def read_range(self, name: str, offset: int, size: int, buffer: memoryview | None = None) -> memoryview:
        """See :class:`data.storage.Storage`."""
        storage, name = self._find(name)
        return storage.read_range(name, offset, size, buffer)

    def forget(self, name: str, offset: int, size: int) -> None:
        """See :class:`data.storage.Storage`."""
        storage, name = self._find(name)
        storage.forget(name, offset, size)

    def check_size(self, name: str, size: int) -> None:
        """See :class:`data.storage.Storage`."""
        storage, name = self._find(name)
        storage.check_size(name, size)

    def _find(self, name: str) -> tuple[Storage, str]:
        source, _, rest = name.partition("/")
        return self._storages[source], rest


class JointLabels:
    """Stored targets of several sources, their chunks counted on from source to source.

    Args:
        caches: in the order of the sources.
    """

    def __init__(self, caches: Sequence[LabelCache]) -> None:
        self._caches = tuple(caches)

    @property
    def window_shape(self) -> tuple[int, int]:
        """See :class:`data.label_cache.LabelCache`; the same for all."""
        return self._caches[0].window_shape

    def check_unchanged(self) -> None:
        """See :class:`data.label_cache.LabelCache`."""
        for cache in self._caches:
            cache.check_unchanged()

    def largest_chunk_bytes(self, split: str) -> int:
        """See :class:`data.label_cache.LabelCache`."""
        return max(cache.largest_chunk_bytes(split) for cache in self._caches)

    def read_chunk(self, split: str, number: int, buffer: memoryview | None = None) -> np.ndarray:
        """See :class:`data.label_cache.LabelCache`."""
        for cache in self._caches:
            chunks = len(cache.splits[split])
            if number < chunks:
                return cache.read_chunk(split, number, buffer)
            number -= chunks
        raise IndexError(f"split {split!r} has no chunk {number} behind its last one")


def join_sources(place: str, sources: Mapping[str, Source]) -> Source:
    """One source with the chunks of all, in the order of the mapping; a single one as it is.

    Args:
        place: what messages call it.
        sources: by name.

    Raises:
        DataError: their tokens do not go together.
    """
    if len(sources) == 1:
        return next(iter(sources.values()))
    _check_alike(sources)
    storage = JointStorage(place, {name: source.storage for name, source in sources.items()})
    return Source(storage, _join_manifests({name: source.manifest for name, source in sources.items()}))


def join_labels(caches: Sequence[LabelCache]) -> Labels | None:
    """Labels of all chunks of joint sources; ``None`` without any."""
    return caches[0] if len(caches) == 1 else JointLabels(caches) if caches else None


def _check_alike(sources: Mapping[str, Source]) -> None:
    (first, reference), *others = ((name, source.manifest) for name, source in sources.items())
    for name, manifest in others:
        for what, found, wanted in (
            ("tokenizer", manifest.tokenizer.sha256[:12], reference.tokenizer.sha256[:12]),
            ("dtype", manifest.dtype, reference.dtype),
        ):
            if found != wanted:
                raise DataError(
                    f"data.sources: {first} and {name} cannot be mixed: {what} {wanted} and {found}"
                )


def _join_manifests(manifests: Mapping[str, Manifest]) -> Manifest:
    parts = list(manifests.values())
    shared = set.intersection(*(set(part.splits) for part in parts))
    return replace(
        parts[0],
        splits={
            split: Split(
                sum(part.splits[split].documents for part in parts),
                sum(part.splits[split].tokens for part in parts),
                tuple(shard for item in manifests.items() for shard in _renamed(*item, split)),
            )
            for split in sorted(shared)
        },
        recipe={},
        sha256="",
        joined=manifests,
    )


def _renamed(name: str, manifest: Manifest, split: str) -> list[Shard]:
    return [replace(shard, name=f"{name}/{shard.name}") for shard in manifest.splits[split].shards]
