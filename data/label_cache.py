"""Stored concept targets: a folder with one file of ids for each chunk of a shard folder.

docs/data.md describes the format. ``labels.json`` is written last, so a folder without it is unfinished.
A file's name holds the digest of its content: what has such a name is whole, whoever wrote it and however
that ended, and nothing else needs to be remembered while a folder is being filled. (XXH3 instead of the
tokens' CRC-32, because ids are several times the tokens' bytes and CRC-32 would be most of their reading.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import numpy as np
import xxhash

from data.files import replace_text
from data.manifest import DamagedData, DataError
from data.seal import seal, unseal
from data.storage import LocalStorage, Storage, read_decoded

VERSION = 1
LABELS_NAME = "labels.json"
DEFAULT_FOLDER = "labels"
"""Where a shard folder's labels are unless a configuration says otherwise."""
BYTES_PER_ID = 2
MASKED_ID = 0xFFFF
FILES_PER_FOLDER = 1000

_KEYS = frozenset(("version", "settings", "splits"))
_FILE = re.compile(r"(\d{9})\.([0-9a-f]{16})\.u16\Z")
_SHOWN_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSettings:
    """What decides the stored ids."""

    data: str
    """SHA-256 of the shard folder's manifest.json."""
    teacher: str | None
    """Digest of the teacher's weights and sizes; ``None`` where they are not at hand."""
    sae: str | None
    """Digest of the autoencoder's files; ``None`` where they are not at hand."""
    seq_len: int
    """Tokens T of a window."""
    num_targets: int
    """Ids A per token."""
    num_concepts: int
    """Dictionary size M: ids are below it."""
    sae_layer: int
    targets: str
    """Which active latents are targets."""
    attribution: str
    mask_non_positive: bool
    mask_documents: bool
    """Whether the teacher read each document as if it were alone."""
    precision: str
    arithmetic: int
    """Version of the computation; another one gives other ids from the same inputs."""
    rows_per_pass: int | None
    """Windows of one pass of the teacher, whose kernels round by the shape, so that it can decide near ties;
    ``None`` where that does not matter."""

    @property
    def window_shape(self) -> tuple[int, int]:
        """(T, A)."""
        return self.seq_len, self.num_targets

    @property
    def window_bytes(self) -> int:
        """Bytes of the ids of one window."""
        return self.seq_len * self.num_targets * BYTES_PER_ID


def differences(found: LabelSettings, wanted: LabelSettings) -> str:
    """What labels were made with and what is wanted instead, on one line; empty where they fit.

    Args:
        found: what the labels were made with.
        wanted: what they are needed for; ``None`` there is not compared.
    """
    pairs = ((field.name, getattr(found, field.name), getattr(wanted, field.name)) for field in fields(found))
    return ", ".join(
        f"{name} was {_show(old)} and is {_show(new)}" for name, old, new in pairs if new not in (None, old)
    )


def _show(value: object) -> str:
    return f"{value[:_SHOWN_DIGITS]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


@dataclass(frozen=True, slots=True)
class ChunkLabels:
    """The ids of one chunk."""

    windows: int
    digest: str
    """Of the file's content, see :func:`digest_of`."""


Splits = Mapping[str, Sequence[ChunkLabels]]


class Labels(Protocol):
    """Stored targets by chunk, as the stream reads them."""

    @property
    def window_shape(self) -> tuple[int, int]:
        """(T, A)."""
        ...

    def check_unchanged(self) -> None:
        """See :class:`LabelCache`."""
        ...

    def largest_chunk_bytes(self, split: str) -> int:
        """See :class:`LabelCache`."""
        ...

    def read_chunk(self, split: str, number: int, buffer: memoryview | None = None) -> np.ndarray:
        """See :class:`LabelCache`."""
        ...


class LabelCache:
    """Finished labels, open for reading.

    Args:
        storage: where they lie.
        settings: what they were made with.
        splits: the ids of each chunk, by split.
    """

    def __init__(self, storage: Storage, settings: LabelSettings, splits: Splits) -> None:
        self.storage = storage
        self.settings = settings
        self.splits = splits

    @property
    def window_shape(self) -> tuple[int, int]:
        """See :class:`LabelSettings`."""
        return self.settings.window_shape

    @property
    def place(self) -> str:
        """The folder or URL, for messages."""
        return self.storage.place

    def chunk_bytes(self, split: str, number: int) -> int:
        """Bytes of the file of one chunk."""
        return self.splits[split][number].windows * self.settings.window_bytes

    def largest_chunk_bytes(self, split: str) -> int:
        """Bytes of the largest file of a split."""
        return max(self.chunk_bytes(split, number) for number in range(len(self.splits[split])))

    def read_chunk(self, split: str, number: int, buffer: memoryview | None = None) -> np.ndarray:
        """Return the ids of one chunk, (windows, T, A) uint16, ``MASKED_ID`` where there is no target.

        Args:
            split: name of the split.
            number: the chunk, counted over the split.
            buffer: at least the file's bytes that may be read into.

        Raises:
            DamagedData: the file is missing, of another size or damaged.
            DataError: it cannot be had.
        """
        name, size = self._name(split, number), self.chunk_bytes(split, number)
        self.storage.check_size(name, size)

        def ids(data: memoryview) -> np.ndarray:
            if digest_of(data) != self.splits[split][number].digest:
                raise DamagedData(f"{self.place}/{name}: damaged: its XXH3 is not the one in its name")
            return np.frombuffer(data, dtype="<u2").reshape(-1, *self.settings.window_shape)

        return read_decoded(self.storage, name, 0, size, buffer, ids)

    def check_unchanged(self) -> None:
        """Refuse to call anything damaged where ``labels.json`` is gone or another one now.

        Raises:
            DataError: it is.
        """
        raw = self.storage.read(LABELS_NAME)
        if parse_labels(raw, f"{self.place}/{LABELS_NAME}") != (self.settings, self.splits):
            raise DataError(f"{self.place}/{LABELS_NAME}: changed since it was opened")

    def check(self, wanted: LabelSettings) -> None:
        """Refuse labels that were made from something else.

        Args:
            wanted: what they are for.

        Raises:
            DataError: one line that names everything that differs.
        """
        different = differences(self.settings, wanted)
        if different:
            raise DataError(
                f"{self.place}: these labels do not fit, {different}; "
                "python -m trainer.concepts.label makes others, concepts.labels says where"
            )

    def files(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of each file."""
        for split, chunks in self.splits.items():
            for number, chunk in enumerate(chunks):
                if chunk.windows:
                    yield self._name(split, number), self.chunk_bytes(split, number)

    def _name(self, split: str, number: int) -> str:
        return chunk_name(split, number, self.splits[split][number].digest)


def read_labels(folder: Path) -> LabelCache:
    """Open finished labels of this machine without a look at their files.

    Raises:
        DataError: they are not finished, or ``labels.json`` breaks the schema.
    """
    if not (folder / LABELS_NAME).is_file():
        raise DataError(
            f"{folder}: no {LABELS_NAME}, so there are no finished labels; "
            "python -m trainer.concepts.label writes them"
        )
    storage = LocalStorage(folder)
    return LabelCache(storage, *parse_labels(storage.read(LABELS_NAME), f"{folder / LABELS_NAME}"))


def parse_labels(raw: bytes, place: str) -> tuple[LabelSettings, Splits]:
    """Check the contents of a labels.json that was read at ``place``.

    Raises:
        DataError: they break the schema.
    """
    try:
        body = unseal(raw, _KEYS)
        if body["version"] != VERSION:
            raise ValueError(f"version={body['version']!r}, this program reads version {VERSION}")
        splits = {
            str(name): tuple(ChunkLabels(int(windows), str(digest)) for windows, digest in chunks)
            for name, chunks in body["splits"].items()
        }
        return settings_from_json(body["settings"]), splits
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: not a valid manifest: {type(error).__name__}: {error}") from error


def write_labels(folder: Path, settings: LabelSettings, splits: Splits) -> None:
    """Write ``labels.json`` atomically; call it when every file that it names is on disk."""
    rows = {name: [[chunk.windows, chunk.digest] for chunk in chunks] for name, chunks in splits.items()}
    body = {"version": VERSION, "settings": asdict(settings), "splits": rows}
    replace_text(folder / LABELS_NAME, seal(body))


def settings_from_json(body: Mapping[str, Any]) -> LabelSettings:
    """Inverse of ``asdict``; raises KeyError or TypeError for anything else."""
    kinds = get_type_hints(LabelSettings)
    body = {"mask_documents": False, **body}  # labels that were made before there was a choice
    for name, kind in kinds.items():
        if not isinstance(body[name], kind):
            raise TypeError(f"{name}={body[name]!r} is not a setting of labels")
    return LabelSettings(**{name: body[name] for name in kinds})


def digest_of(content: bytes | memoryview) -> str:
    """XXH3, 64 bits, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(content)


def chunk_name(split: str, number: int, digest: str) -> str:
    """The file of one chunk, relative to the folder of the labels."""
    return f"{group_name(split, number)}/{number:09d}.{digest}.u16"


def group_name(split: str, number: int) -> str:
    """The folder of a chunk's file: few files in each, so that listing one stays cheap."""
    return f"{split}/{number // FILES_PER_FOLDER:06d}"


def found_chunks(folder: Path, split: str, number: int | None = None) -> dict[int, set[str]]:
    """Which chunks of a split have files, with the digests in their names.

    Args:
        folder: of the labels.
        split: name of the split.
        number: list only the files beside this chunk's.
    """
    groups = (folder / split).glob("*/") if number is None else [folder / group_name(split, number)]
    found: dict[int, set[str]] = {}
    for group in groups:
        for path in group.iterdir() if group.is_dir() else ():
            match = _FILE.match(path.name)
            if match:
                found.setdefault(int(match[1]), set()).add(match[2])
    return found
