"""The manifest of a shard folder: its schema, and reading and writing it safely.

``manifest.json`` is written last, so a folder without it is unfinished. docs/data.md describes every key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import replace_text
from data.seal import seal, unseal

VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
BYTES_PER_TOKEN = {"uint16": 2, "uint32": 4}
TAR_BLOCK = 512

_KEYS = frozenset(("version", "dtype", "chunk_tokens", "tokenizer", "recipe", "splits"))


class DataError(RuntimeError):
    """Data that is missing, damaged or does not fit; the message is one line."""

    def __str__(self) -> str:
        # webdataset appends URLs and streams to the arguments of exceptions that pass through it.
        return str(self.args[0]) if self.args else ""


class DamagedData(DataError):
    """A file of a data set that is missing, or not what its manifest says; the data set is there."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One tar member: consecutive tokens of a split, with the next chunk's first token at the end."""

    offset: int
    """Byte position of the member's tar header in its shard."""
    tokens: int
    """Tokens stored, the overlapping last one included."""
    crc32: int
    """CRC-32 (zlib) of the member's payload."""

    def num_windows(self, seq_len: int) -> int:
        """Return how many windows of ``seq_len`` inputs and as many labels the chunk holds."""
        return (self.tokens - 1) // seq_len

    def member_bytes(self, dtype: str) -> int:
        """Return the length in bytes of the tar header and the padded payload."""
        payload = self.tokens * BYTES_PER_TOKEN[dtype]
        return TAR_BLOCK + -(-payload // TAR_BLOCK) * TAR_BLOCK


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file."""

    name: str
    bytes: int
    sha256: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """The shards of ``train`` or ``val`` in the order of the corpus."""

    documents: int
    tokens: int
    """Tokens without overlaps, each document's end-of-text token included."""
    shards: tuple[Shard, ...]

    @property
    def chunks(self) -> tuple[tuple[Shard, Chunk], ...]:
        """All chunks of the split, in order, each with the shard that holds it."""
        return tuple((shard, chunk) for shard in self.shards for chunk in shard.chunks)


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """Which tokenizer made the tokens."""

    sha256: str
    """SHA-256 of tokenizer.json."""
    vocab_size: int
    """Largest token id plus one."""
    eot_id: int
    """Id that ends every document."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a reader must know about a shard folder."""

    version: int
    dtype: str
    chunk_tokens: int
    tokenizer: TokenizerInfo
    splits: dict[str, Split]
    recipe: dict[str, Any]
    """The arguments and the corpus that the shards were made from (for people and for re-runs)."""
    sha256: str = field(default="", compare=False)
    """SHA-256 of manifest.json itself; empty for a manifest that was not read from a file."""
    joined: Mapping[str, Manifest] = field(default_factory=dict)
    """Manifests that this one was joined from, by the folder of each; empty for one that was read."""


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check ``folder/manifest.json``.

    Raises:
        DataError: no such folder, no manifest (unfinished), or contents that break the schema.
    """
    path = Path(folder) / MANIFEST_NAME
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder; python -m data.prepare writes one")
    if not path.is_file():
        raise DataError(f"{folder}: no {MANIFEST_NAME}, so the folder is unfinished or not a shard folder")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(raw: bytes, place: str) -> Manifest:
    """Check the contents of a manifest.json that was read at ``place``.

    Raises:
        DataError: they break the schema.
    """
    try:
        return _parse(unseal(raw, _KEYS), hashlib.sha256(raw).hexdigest())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: not a valid manifest: {type(error).__name__}: {error}") from error


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` atomically; call it after everything else is on disk."""
    body = {
        "version": manifest.version,
        "dtype": manifest.dtype,
        "chunk_tokens": manifest.chunk_tokens,
        "tokenizer": {
            "sha256": manifest.tokenizer.sha256,
            "vocab_size": manifest.tokenizer.vocab_size,
            "eot_id": manifest.tokenizer.eot_id,
        },
        "recipe": manifest.recipe,
        "splits": {name: _split_to_json(split) for name, split in manifest.splits.items()},
    }
    replace_text(Path(folder) / MANIFEST_NAME, seal(body))


def shard_to_json(shard: Shard) -> dict[str, Any]:
    """Return the manifest's JSON form of a shard; a chunk is ``[offset, tokens, crc32]``."""
    chunks = [[chunk.offset, chunk.tokens, chunk.crc32] for chunk in shard.chunks]
    return {"name": shard.name, "bytes": shard.bytes, "sha256": shard.sha256, "chunks": chunks}


def shard_from_json(body: dict[str, Any], dtype: str) -> Shard:
    """Inverse of :func:`shard_to_json`; raises ValueError for chunks outside the file."""
    chunks = tuple(Chunk(*(_count(number, "chunk") for number in row)) for row in body["chunks"])
    shard = Shard(str(body["name"]), _count(body["bytes"], "bytes"), str(body["sha256"]), chunks)
    if Path(shard.name).name != shard.name:
        raise ValueError(f"shard name {shard.name!r} leaves the folder")
    end = 0
    for chunk in chunks:
        if chunk.tokens < 2 or chunk.offset < end:
            raise ValueError(f"{shard.name}: chunk at offset {chunk.offset} is empty or overlaps another")
        end = chunk.offset + chunk.member_bytes(dtype)
    if end > shard.bytes:
        raise ValueError(f"{shard.name}: chunks end at byte {end}, the shard has {shard.bytes}")
    return shard


def _split_to_json(split: Split) -> dict[str, Any]:
    shards = [shard_to_json(shard) for shard in split.shards]
    return {"documents": split.documents, "tokens": split.tokens, "shards": shards}


def _parse(body: dict[str, Any], sha256: str) -> Manifest:
    if body["version"] != VERSION:
        raise ValueError(f"version={body['version']!r}, this program reads version {VERSION}")
    dtype = body["dtype"]
    if dtype not in BYTES_PER_TOKEN:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(BYTES_PER_TOKEN)}")
    info = body["tokenizer"]
    tokenizer = TokenizerInfo(
        str(info["sha256"]), _count(info["vocab_size"], "vocab_size"), _count(info["eot_id"], "eot_id")
    )
    splits = {name: _parse_split(split, dtype) for name, split in body["splits"].items()}
    chunk_tokens = _count(body["chunk_tokens"], "chunk_tokens")
    recipe = dict(body.get("recipe", {}))
    return Manifest(VERSION, dtype, chunk_tokens, tokenizer, splits, recipe, sha256)


def _parse_split(body: dict[str, Any], dtype: str) -> Split:
    shards = tuple(shard_from_json(shard, dtype) for shard in body["shards"])
    return Split(_count(body["documents"], "documents"), _count(body["tokens"], "tokens"), shards)


def _count(value: Any, key: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{key}={value!r} is not a whole number >= 0")
    return value
