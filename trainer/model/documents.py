"""Documents packed into one window: where they begin, and what a position of the stream may attend to.

A document ends with the end-of-text token, which belongs to it. Everything here is made from token ids on
their device with shapes that do not depend on them, so the host never waits and nothing compiles anew.

Legend: B rows, T tokens, S positions of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.kernels.reference import IGNORED_LABEL


class Documents(NamedTuple):
    """The documents in windows of tokens; one that a window cuts begins anew there."""

    positions: Tensor
    """(B, T) int64, tokens before this one in its document."""
    ids: Tensor
    """(B, T) int64, documents that ended before this token in its row."""

    @classmethod
    def ended_by(cls, input_ids: Tensor, end_id: int) -> Self:
        """The documents of input_ids (B, T), each up to and with the token ``end_id``."""
        begins = F.pad((input_ids == end_id)[:, :-1].long(), (1, 0))
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        return cls(column - (begins * column).cummax(1).values, begins.cumsum(1))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The documents of other rows, as ``change`` chooses them from (B, T)."""
        return type(self)(change(self.positions), change(self.ids))

    def totals(self, x: Tensor) -> Tensor:
        """For each token the sum of integers x (B, T) over its document, (B, T)."""
        last = self.ids.shape[1] - 1
        column = torch.arange(last + 1, device=x.device)
        ends = F.pad(self.ids.diff(dim=1), (0, 1), value=1)
        end = torch.where(ends > 0, column, last).flip(1).cummin(1).values.flip(1)
        upto = x.cumsum(1)
        before = upto - x
        return upto.gather(1, end) - before.gather(1, column - self.positions)


def attention_mask(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: 0 for what a position sees, minus infinity for the rest.

    A position sees itself and what stands before it in its document.

    Args:
        ids: (B, S) int64, the document of each position.
        dtype: of the queries; a mask of another one would be converted, and kept, by every block.

    Returns:
        (B, 1, S, S), query by key.
    """
    position = torch.arange(ids.shape[1], device=ids.device)
    hidden = ids.unsqueeze(2) != ids.unsqueeze(1)
    hidden |= position > position.unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=ids.device)
    return mask.masked_fill_(hidden, -math.inf).unsqueeze(1)


class Inputs(NamedTuple):
    """What a model reads of windows, and what it is asked there."""

    input_ids: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64 next tokens, ``IGNORED_LABEL`` where none is asked for."""
    documents: Documents | None
    """``None`` where a window is read as one document."""


def split_windows(tokens: Tensor, end_id: int | None) -> Inputs:
    """Inputs and next tokens of windows (B, T+1) int64.

    Args:
        tokens: consecutive tokens of each row.
        end_id: the token that ends a document, which the next one's first token does not follow then; with
            ``None`` documents follow each other like sentences.
    """
    input_ids, labels = tokens[:, :-1], tokens[:, 1:]
    if end_id is None:
        return Inputs(input_ids, labels, None)
    labels = labels.masked_fill(input_ids == end_id, IGNORED_LABEL)
    return Inputs(input_ids, labels, Documents.ended_by(input_ids, end_id))
