"""Steering: one concept made stronger, weaker or its opposite while text is generated.

A student mixes in its K kept concept logits; a teacher's residual holds its K active latents. Steering
changes single coordinates of that sparse vector, after the selection, at every position: ``scale``
multiplies what is kept (what is not kept stays 0), ``set`` puts a value there in any case
(docs/equations.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from trainer.concepts.sae import TopKSae

SteerMode = Literal["scale", "set"]

_MAX_STRENGTHS = 1000


class SteerRequest(NamedTuple):
    """One concept and the strengths to try."""

    concept: int
    strengths: tuple[float, ...]


def parse_steer(text: str) -> SteerRequest:
    """``ID=VALUE``, or ``ID=START:STOP:STEP`` for several values, STOP included where a step meets it.

    Raises:
        ValueError: it is neither.
    """
    concept, _, values = text.partition("=")
    try:
        numbers = [float(part) for part in values.split(":")]
        if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
            raise ValueError
        request = SteerRequest(int(concept), tuple(numbers) if len(numbers) == 1 else _range(*numbers))
    except ValueError:
        raise ValueError(f"--steer {text} must be ID=VALUE or ID=START:STOP:STEP, as 123=-10:10:5") from None
    return request


def _range(start: float, stop: float, step: float) -> tuple[float, ...]:
    if step <= 0 or stop < start or (stop - start) / step >= _MAX_STRENGTHS:
        raise ValueError
    # From whole multiples, not by adding up: 0.1 ten times is not 1.
    return tuple(start + index * step for index in range(int((stop - start) / step + 1e-9) + 1))


def check_concepts(requests: Sequence[SteerRequest], num_concepts: int) -> None:
    """Refuse ids outside the dictionary, one id given twice, and more than one range.

    Raises:
        ValueError: the first of these.
    """
    seen: set[int] = set()
    for request in requests:
        if not 0 <= request.concept < num_concepts:
            raise ValueError(
                f"--steer {request.concept}: concept id must be from 0 to {num_concepts - 1}, "
                f"the dictionary has {num_concepts} concepts"
            )
        if request.concept in seen:
            raise ValueError(f"--steer {request.concept}: the concept is given more than once")
        seen.add(request.concept)
    ranges = [request.concept for request in requests if len(request.strengths) > 1]
    if len(ranges) > 1:
        raise ValueError(f"--steer {ranges[1]}: only one concept can have a range, {ranges[0]} has one")


def combinations(requests: Sequence[SteerRequest]) -> list[dict[int, float]]:
    """Strength by concept id, once for each value of the range; one empty dict without requests."""
    ids = [request.concept for request in requests]
    return [
        dict(zip(ids, values, strict=True))
        for values in product(*(request.strengths for request in requests))
    ]


@dataclass(frozen=True, slots=True)
class Strengths:
    """How strongly each row of a batch is steered.

    With z the sparse vector of a token and a the strength of concept m, z_m becomes a z_m (``scale``) or a
    (``set``); every other coordinate stays.
    """

    concepts: Tensor
    """(S,) int64 concept ids."""
    values: Tensor
    """(B, S) fp32 strengths."""
    mode: SteerMode

    @classmethod
    def of(cls, rows: Sequence[dict[int, float]], mode: SteerMode, device: torch.device) -> Strengths:
        """From the strengths of each row by concept id; all rows name the same concepts."""
        concepts = torch.tensor(list(rows[0]), dtype=torch.int64, device=device)
        values = torch.tensor([list(row.values()) for row in rows], dtype=torch.float32, device=device)
        return cls(concepts, values, mode)

    def change(self, values: Tensor, ids: Tensor) -> Tensor:
        """What has to be added to the coordinates of the concepts.

        Args:
            values: (B, T, K) non-zero coordinates of each token.
            ids: (B, T, K) int64, their concepts.

        Returns:
            (B, T, S) in the dtype of ``values``.
        """
        found = ids.unsqueeze(-1) == self.concepts
        before = (values.float().unsqueeze(-1) * found).sum(-2)
        strengths = self.values.unsqueeze(1)
        after = strengths * before if self.mode == "scale" else strengths
        return (after - before).to(values.dtype)

    def select(self, rows: Tensor) -> Strengths:
        """Those of some rows."""
        return replace(self, values=self.values[rows])


@dataclass(frozen=True, slots=True)
class SteerKept:
    """Steers a CoCoMix student: the logits that it keeps and mixes in."""

    strengths: Strengths

    def __call__(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Append the changes to the kept concepts; values and ids (B*T, K) -> (B*T, K+S)."""
        rows = len(self.strengths.values)
        change = self.strengths.change(values.unflatten(0, (rows, -1)), ids.unflatten(0, (rows, -1)))
        change = change.flatten(0, 1)
        return torch.cat([values, change], -1), torch.cat(
            [ids, self.strengths.concepts.expand_as(change)], -1
        )

    def select(self, rows: Tensor) -> Self:
        """For some rows."""
        return replace(self, strengths=self.strengths.select(rows))


@dataclass(frozen=True, slots=True)
class SteerResidual:
    """Steers a teacher through its autoencoder: x + (z'_m - z_m) W_dec[m] std, all else of x untouched."""

    sae: TopKSae
    layer: int
    strengths: Strengths

    def __call__(self, x: Tensor) -> Tensor:
        """Residuals (B, T, D_t) after block ``layer`` to steered ones."""
        change = self.strengths.change(*self.sae.encode(x))
        _, _, std = self.sae.standardize(x)
        directions = self.sae.decoder[self.strengths.concepts].float()
        return (x.float() + std * (change @ directions)).to(x.dtype)

    def select(self, rows: Tensor) -> Self:
        """For some rows."""
        return replace(self, strengths=self.strengths.select(rows))
