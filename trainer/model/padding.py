"""Rows that make a vocabulary or a dictionary divisible."""

from __future__ import annotations

PADDING = 64
"""Vocabulary and dictionary have a multiple of so many rows: tensor cores like it, and any number of
tensor-parallel ranks that divides it can share them. Padded rows are zero, have no logit and get no
gradient; published files do not hold them."""


def padded(size: int) -> int:
    """``size`` rounded up to a multiple of :data:`PADDING`."""
    return -(-size // PADDING) * PADDING
