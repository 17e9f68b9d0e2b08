"""What the token stream needs to know (torch-free)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Literal

MAX_PERIOD = 100_000

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def is_remote(place: str) -> bool:
    """Whether a place is a URL and not a path."""
    return "://" in place


def _check_place(place: str) -> None:
    if is_remote(place) and any(mark in place for mark in "@?#"):
        raise ValueError(
            "dir must be a URL without credentials and query: it is written to logs and checkpoints; "
            "the protocol's own files or environment variables hold those"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One entry of ``data.sources``: a shard folder and its share of the training rows."""

    name: str
    """What metrics and messages call it: letters, digits, ``_`` and ``-``."""

    dir: str
    """As ``data.dir``."""

    weight: float
    """Its share of the rows, relative to the weights of the others."""

    max_epochs: float = 0.0
    """Passes over its training windows that a run may make at most; 0 is no bound."""

    max_tokens: int = 0
    """Tokens of it that a run may train on at most, repeated ones counted again; 0 is no bound."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r} must be letters, digits, _ and -, and begin with no sign: "
                "metrics are named after it"
            )
        if not self.dir:
            raise ValueError("dir='' must name a shard folder")
        _check_place(self.dir)
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} must be above 0")
        for key in ("max_epochs", "max_tokens"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The ``data:`` section: which shards are read and in which order."""

    dir: str = ""
    """Folder written by ``python -m data.prepare`` (manifest.json, tokenizer.json, tar shards), or the URL
    of one that is served with byte ranges: https, s3, gs, whatever fsspec knows. Empty with ``sources``."""

    sources: tuple[SourceConfig, ...] = ()
    """Several folders instead of one, each with its share of the rows; see docs/data.md, Mixtures."""

    mixture_period: int = 1000
    """Rows after which the order of ``sources`` repeats; each has a whole number of them."""

    seq_len: int
    """Tokens per sequence, T. Must divide the manifest's chunk length."""

    mask_documents: bool = False
    """Keep the documents of a sequence apart: attention and positions, of student and teacher, begin anew
    behind each end-of-text token, and that token predicts nothing."""

    seed: int = 0
    """Seed of the order of chunks and windows; another seed is another order of the same windows."""

    lanes: int = 64
    """Number of places in the epoch that are read side by side. More lanes mix a sorted corpus better.
    Several sources share them by their rows."""

    prefetch_steps: int = 2
    """Steps that are read ahead of the training step by a background thread; 0 reads in the step itself."""

    skip: tuple[tuple[int, int], ...] = ()
    """Ranges ``[first, last)`` of global rows that are left out, as a run's ``skip`` events name them."""

    on_damage: Literal["raise", "skip"] = "raise"
    """What a damaged chunk does: end the run, or leave its rows out of the loss, each in its place."""

    cache_dir: str = ""
    """Folder on the node's own disk that keeps what was read from ``dir``; empty keeps nothing."""

    cache_gb: float = 100.0
    """Bound of ``cache_dir`` in GB; the longest unused parts are deleted."""

    remote_timeout_s: float = 120.0
    """Seconds without a successful read of a URL, attempts and pauses included, that end the run."""

    remote_connections: int = 8
    """Parts of shards that one rank reads from a URL at the same time."""

    @property
    def is_remote(self) -> bool:
        """Whether ``dir`` is a URL."""
        return is_remote(self.dir)

    @property
    def by_source(self) -> dict[str, DataConfig]:
        """The section of each source alone, by name; a single ``dir`` is named after its folder."""
        if not self.sources:
            return {PurePath(self.dir).name: self}
        return {source.name: replace(self, dir=source.dir, sources=()) for source in self.sources}

    @property
    def place(self) -> str:
        """The folder, or the names of the sources, for messages."""
        return self.dir or f"data.sources ({', '.join(source.name for source in self.sources)})"

    def __post_init__(self) -> None:
        self._check_sources()
        _check_place(self.dir)
        if self.cache_gb <= 0:
            raise ValueError(f"cache_gb={self.cache_gb} must be above 0")
        if self.remote_timeout_s <= 0:
            raise ValueError(f"remote_timeout_s={self.remote_timeout_s} must be above 0")
        if self.remote_connections < 1:
            raise ValueError(f"remote_connections={self.remote_connections} must be at least 1")
        if self.seq_len < 1:
            raise ValueError(f"seq_len={self.seq_len} must be at least 1")
        last = 0
        for pair in self.skip:
            if not last <= pair[0] < pair[1]:
                raise ValueError(f"skip={self.skip} must be pairs [first, last) in rising order")
            last = pair[1]
        if self.lanes < 1:
            raise ValueError(f"lanes={self.lanes} must be at least 1")
        if self.prefetch_steps < 0:
            raise ValueError(f"prefetch_steps={self.prefetch_steps} must be at least 0")

    def _check_sources(self) -> None:
        if self.dir and self.sources:
            raise ValueError(f"dir={self.dir} must be empty with data.sources: give one of the two")
        if not self.dir and not self.sources:
            raise ValueError("dir='' must name a shard folder, or data.sources several")
        for key in ("name", "dir"):
            values = [getattr(source, key) for source in self.sources]
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"sources must differ: {key}={twice[0]} is given twice")
        if not 1 <= self.mixture_period <= MAX_PERIOD:
            raise ValueError(f"mixture_period={self.mixture_period} must lie in 1 .. {MAX_PERIOD}")
