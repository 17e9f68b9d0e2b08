"""Whether both sides of a comparison computed the same: speed counts only then."""

from __future__ import annotations

from torch import Tensor

from benchmarks.reference_dense import Targets

TIE_TOLERANCE = 1e-5
"""Attributions closer than this share of their token's largest one are equal but for rounding."""
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4


class Disagreement(Exception):
    """Two sides that claim to be equal are not."""


def equal_share(ids: Tensor, expected: Tensor) -> float:
    """Share of the tokens with the same target ids in the same order; both (B, T, A)."""
    return float((ids == expected).all(-1).double().mean())


def check_targets(ids: Tensor, dense: Targets) -> float:
    """Compare targets (B, T, A) with the oracle's; returns the share of tokens where all are the same.

    Where an id differs the oracle itself must find both equally important.

    Raises:
        Disagreement: a target is another one, and not for a tie.
    """
    scale = TIE_TOLERANCE * dense.attribution.abs().amax(-1, keepdim=True)
    ours, theirs = (
        dense.attribution.gather(-1, part.clamp_min(0)) * (part >= 0) for part in (ids, dense.ids)
    )
    wrong = (ids != dense.ids) & ((ours - theirs).abs() > scale)
    if wrong.any():
        raise Disagreement(
            f"{int(wrong.sum())} of {wrong.numel()} target ids differ from the oracle's beyond rounding"
        )
    return equal_share(ids, dense.ids)


def check_close(what: str, value: float, expected: float, tolerance: float) -> None:
    """Compare two numbers.

    Raises:
        Disagreement: they differ by more than ``tolerance`` of the expected one.
    """
    if not abs(value - expected) <= tolerance * abs(expected):
        raise Disagreement(f"{what} is {value:.8g} instead of {expected:.8g}")
