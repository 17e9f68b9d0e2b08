"""What the token stream needs to know (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The ``data:`` section: which shards are read and in which order."""

    dir: str
    """Folder written by ``python -m data.prepare`` (manifest.json, tokenizer.json, tar shards)."""

    seq_len: int
    """Tokens per sequence, T. Must divide the manifest's chunk length."""

    seed: int = 0
    """Seed of the order of chunks and windows; another seed is another order of the same windows."""

    lanes: int = 64
    """Number of places in the epoch that are read side by side. More lanes mix a sorted corpus better."""

    prefetch_steps: int = 2
    """Steps that are read ahead of the training step by a background thread; 0 reads in the step itself."""

    skip: tuple[tuple[int, int], ...] = ()
    """Ranges ``[first, last)`` of global rows that are left out, as a run's ``skip`` events name them."""

    def __post_init__(self) -> None:
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
