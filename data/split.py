"""Which documents are for validation: pure functions of a document's number."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np

SPLITS = ("hash", "huggingface")


class DocumentSplit(Protocol):
    """Divides a corpus into training and validation documents."""

    def place(self, row: int, document: int) -> int | None:
        """Return where a document stands in the validation split, ``None`` if it is for training.

        Args:
            row: its number in the corpus, blank ones counted.
            document: its number without the blank ones.
        """


class HashSplit:
    """The default: a document's number alone decides, so that the corpus may grow at its end.

    SHA-256 of ``"{seed}/{document}"``, its first 8 bytes as a little-endian number u: validation if
    u / 2**64 < fraction, in the order of the corpus.
    """

    def __init__(self, seed: int, fraction: float):
        self._seed, self._limit = seed, fraction * 2.0**64

    def place(self, row: int, document: int) -> int | None:
        digest = hashlib.sha256(f"{self._seed}/{document}".encode()).digest()
        return document if int.from_bytes(digest[:8], "little") < self._limit else None


class HuggingFaceSplit:
    """The documents that ``datasets.Dataset.train_test_split(test_size=fraction, seed=seed)`` takes.

    The first ceil(fraction * rows) entries of ``numpy.random.default_rng(seed).permutation(rows)``, in the
    order of this permutation. NumPy may change it in a later release (NEP 19); literals in the tests hold it.
    """

    def __init__(self, seed: int, fraction: float, num_rows: int):
        chosen = np.random.default_rng(seed).permutation(num_rows)[: math.ceil(fraction * num_rows)]
        self._places = {int(row): place for place, row in enumerate(chosen)}

    def place(self, row: int, document: int) -> int | None:
        return self._places.get(row)
