"""What the token stream needs to know (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def is_remote(place: str) -> bool:
    """Whether a place is a URL and not a path."""
    return "://" in place


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The ``data:`` section: which shards are read and in which order."""

    dir: str
    """Folder written by ``python -m data.prepare`` (manifest.json, tokenizer.json, tar shards), or the URL
    of one that is served with byte ranges: https, s3, gs, whatever fsspec knows."""

    seq_len: int
    """Tokens per sequence, T. Must divide the manifest's chunk length."""

    mask_documents: bool = False
    """Keep the documents of a sequence apart: attention and positions, of student and teacher, begin anew
    behind each end-of-text token, and that token predicts nothing."""

    seed: int = 0
    """Seed of the order of chunks and windows; another seed is another order of the same windows."""

    lanes: int = 64
    """Number of places in the epoch that are read side by side. More lanes mix a sorted corpus better."""

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

    def __post_init__(self) -> None:
        if self.is_remote and any(mark in self.dir for mark in "@?#"):
            raise ValueError(
                "dir must be a URL without credentials and query: it is written to logs and checkpoints; "
                "the protocol's own files or environment variables hold those"
            )
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
