"""How a second stream of vectors, one per token or fewer, enters the residual stream.

Legend: B microbatch, T tokens of the sequence or of this rank's part, C of them that a vector belongs to,
S positions of the mixed stream, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.config import Insertion, PauseConfig
from trainer.model.gpt2 import Positions


class Mixing(Protocol):
    """Which tokens have a vector, where it goes, and where the next token is read in the end."""

    @property
    def every(self) -> int:
        """A vector belongs to every so many-th token."""
        ...

    @property
    def positions_per_token(self) -> int:
        """Positions of the mixed stream for a token that has a vector."""
        ...

    def mix(self, h: Tensor, q: Tensor | None) -> Tensor:
        """One stream (B, S, D) of h (B, T, D) and the vectors q (B, C, D); :class:`Leave` needs no q."""
        ...

    def spread(self, x: Tensor) -> Tensor:
        """What belongs to tokens (B, T), at the positions of the mixed stream, (B, S)."""
        ...

    def read(self, num_tokens: int, device: torch.device) -> Positions | None:
        """The position of the mixed stream that predicts each token's next one; ``None`` where S is T."""
        ...


@dataclass(frozen=True, slots=True)
class Interleave:
    """A position of its own behind the token: h_1 .. h_s q_s h_s+1 ..; with s = 1 h_1 q_1 h_2 q_2 ..

    q_t sees h and q up to t, h_t sees q before t. What predicts the next token is the newest position at
    that time: q_t where there is one, else h_t.
    """

    every: int = 1

    @property
    def positions_per_token(self) -> int:
        """See :class:`Mixing`."""
        return 2

    def mix(self, h: Tensor, q: Tensor | None) -> Tensor:
        """See :class:`Mixing`; behind the last vector there may be less than ``every`` tokens."""
        assert q is not None
        if self.every == 1:
            return interleave(h, q)
        covered = q.shape[1] * self.every
        groups = h[:, :covered].unflatten(1, (q.shape[1], self.every))
        stream = torch.cat((groups, q.unsqueeze(2)), dim=2).flatten(1, 2)
        return stream if covered == h.shape[1] else torch.cat((stream, h[:, covered:]), dim=1)

    def spread(self, x: Tensor) -> Tensor:
        """See :class:`Mixing`; a vector has what its token has."""
        return self.mix(x.unsqueeze(2), x[:, self.every - 1 :: self.every].unsqueeze(2)).squeeze(2)

    def read(self, num_tokens: int, device: torch.device) -> Positions:
        """See :class:`Mixing`."""
        if self.every == 1:
            return slice(1, None, 2)
        token = torch.arange(num_tokens, device=device)
        return token + (token + 1) // self.every


@dataclass(frozen=True, slots=True)
class Add:
    """Added to its token's position: h_t + q_t."""

    every: int = 1

    @property
    def positions_per_token(self) -> int:
        """See :class:`Mixing`."""
        return 1

    def mix(self, h: Tensor, q: Tensor | None) -> Tensor:
        """See :class:`Mixing`."""
        assert q is not None
        return h + q

    def spread(self, x: Tensor) -> Tensor:
        """See :class:`Mixing`."""
        return x

    def read(self, num_tokens: int, device: torch.device) -> None:
        """See :class:`Mixing`."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Nowhere: vectors are predicted, and the stream does not see them."""

    every: int = 1

    @property
    def positions_per_token(self) -> int:
        """See :class:`Mixing`."""
        return 1

    def mix(self, h: Tensor, q: Tensor | None) -> Tensor:
        """See :class:`Mixing`."""
        return h

    def spread(self, x: Tensor) -> Tensor:
        """See :class:`Mixing`."""
        return x

    def read(self, num_tokens: int, device: torch.device) -> None:
        """See :class:`Mixing`."""


def interleave(tokens: Tensor, concepts: Tensor) -> Tensor:
    """h_1, q_1, h_2, q_2, ...: two (B, T, D) streams -> (B, 2T, D), token first."""
    return torch.stack((tokens, concepts), dim=2).flatten(1, 2)


def mixing_of(insertion: Insertion) -> Mixing:
    """The mixing that a configuration asks for."""
    if isinstance(insertion, PauseConfig) or insertion.mix == "interleave":
        return Interleave(insertion.every)
    return Add() if insertion.mix == "add" else Leave()
