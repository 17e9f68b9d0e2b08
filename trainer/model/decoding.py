"""Decoding with cached keys and values: each position of a growing sequence is computed once.

Blocks below the insertion of a student hold one position per token, those above it two where vectors are
interleaved. Where only some tokens have a vector, the others' places are absent, since it depends on the
row which tokens these are. Rows may start with prompts of different length: short ones are padded on the
left. Nothing ever sees what is absent, so a row's logits are those that it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.cocomix import CoCoMix, MixingGPT2
from trainer.model.gpt2 import GPT2, Positions
from trainer.model.mixing import interleave

_LAST = slice(-1, None)  # the position that predicts the next token, where nothing is absent
_LAST_TWO = slice(-2, None)


class PerRow(Protocol):
    """Something that treats each row of a batch in its own way."""

    def select(self, rows: Tensor) -> Self:
        """The same for a batch made of these rows (N,) int64."""
        ...


class EditKept(PerRow, Protocol):
    """An intervention in the concepts that a student mixes in."""

    def __call__(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A ``trainer.model.concept_head.KeptEdit``."""
        ...


class EditResidual(PerRow, Protocol):
    """An intervention in the residual stream of a plain GPT-2."""

    @property
    def layer(self) -> int:
        """Block after which it acts."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """New residuals (B, T, D) of those positions."""
        ...


@dataclass(frozen=True, slots=True)
class _BlockPast:
    """What one block remembers; see :class:`trainer.model.gpt2.Past`."""

    keys: Tensor  # (B, H, C, D/H), of which the first ``start`` are filled
    values: Tensor
    start: int
    mask: Tensor | None  # (B or 1, 1, R, start + R); None: plainly causal, nothing hidden

    def attend(self, query: Tensor, key: Tensor, value: Tensor, read: Positions | None) -> Tensor:
        stop = self.start + key.shape[2]
        self.keys[:, :, self.start : stop] = key
        self.values[:, :, self.start : stop] = value
        mask = self.mask
        if mask is not None and read is not None:
            mask = mask[:, :, read]
        # Without a mask there is nothing before the new positions, or one query at the end of all.
        is_causal = mask is None and query.shape[2] > 1
        return F.scaled_dot_product_attention(
            query, self.keys[:, :, :stop], self.values[:, :, :stop], attn_mask=mask, is_causal=is_causal
        )


class PositionCache:
    """Keys and values of blocks that work on the same positions; all memory is taken at the start.

    Args:
        num_blocks: blocks that share the positions.
        shape: rows B, heads H, capacity C in positions, features D/H of a head.
        like: a tensor of the dtype and on the device of the keys.
    """

    def __init__(self, num_blocks: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys = like.new_empty((num_blocks, *shape))
        self.values = torch.empty_like(self.keys)
        self.present = torch.ones(shape[0], shape[2], dtype=torch.bool, device=like.device)
        self.hides = False
        self.length = 0

    def extend(self, num_new: int, present: Tensor | None) -> list[_BlockPast]:
        """Make room for new positions and say what each of them sees: itself, and what is present before.

        Args:
            num_new: R.
            present: (B, R) bool, positions that exist; ``None`` when all do.
        """
        start, stop = self.length, self.length + num_new
        assert stop <= self.present.shape[1]
        self.length = stop
        if present is not None:
            self.present[:, start:stop] = present
            self.hides = True
        mask = self._mask(start, stop)
        return [_BlockPast(*block, start, mask) for block in zip(self.keys, self.values, strict=True)]

    def _mask(self, start: int, stop: int) -> Tensor | None:
        if not self.hides and (start == 0 or stop == start + 1):
            return None
        column = torch.arange(stop, device=self.present.device)
        row = column[start:].unsqueeze(1)
        mask = (column <= row)[None, None]
        if self.hides:
            # An absent position sees itself: a softmax over nothing is not a number.
            mask = mask & self.present[:, None, None, :stop] | (column == row)
        return mask

    def select(self, rows: Tensor) -> None:
        """Keep these rows (N,) int64, in their order; a row may be taken several times."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.present = self.present[rows]


class Decoder:
    """Next-token logits of a batch of sequences that grow.

    The model must be whole on this rank: a sharded one runs its root forward over the whole context.

    Args:
        model: a GPT-2 or a student built on it, in evaluation.
        capacity: tokens per row, prompt included.
        edit_kept: changes the concepts that a CoCoMix mixes in.
        edit_residual: changes the residual stream of a plain GPT-2.

    Raises:
        ValueError: more tokens than the model has positions.
    """

    def __init__(
        self,
        model: GPT2,
        capacity: int,
        *,
        edit_kept: EditKept | None = None,
        edit_residual: EditResidual | None = None,
    ) -> None:
        positions = model.config.n_positions
        if capacity > positions:
            raise ValueError(f"{capacity} tokens must be at most {positions}, the positions of the model")
        assert model.tp.size == 1
        assert edit_kept is None or isinstance(model, CoCoMix)
        assert edit_residual is None or type(model) is GPT2
        self.model = model
        self.capacity = capacity
        self.edit_kept = edit_kept
        self.edit_residual = edit_residual
        self.streams: list[PositionCache] = []
        self.num_tokens = 0
        self.padding = torch.zeros(0, 1, dtype=torch.int64)

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Take the prompts in, at least one token each; logits (B, V) of their next tokens."""
        device = self.model.wte.weight.device
        longest = max(map(len, prompts))
        missing = [longest - len(prompt) for prompt in prompts]
        padded = [[0] * count + list(prompt) for count, prompt in zip(missing, prompts, strict=True)]
        self.padding = torch.tensor(missing, device=device).unsqueeze(1)
        self.streams = self._allocate(len(prompts))
        self.num_tokens = 0
        present = None
        if any(missing):
            present = torch.arange(longest, device=device) >= self.padding
        return self._run(torch.tensor(padded, device=device), present)

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Take further tokens (B, R) int64 in; logits (B, V) of those after them."""
        return self._run(tokens, None)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (N,) int64, in their order; a row may be taken several times."""
        self.padding = self.padding[rows]
        for stream in self.streams:
            stream.select(rows)
        if self.edit_kept is not None:
            self.edit_kept = self.edit_kept.select(rows)
        if self.edit_residual is not None:
            self.edit_residual = self.edit_residual.select(rows)

    def _allocate(self, rows: int) -> list[PositionCache]:
        """One cache per stream: the tokens', and above an insertion the one with its further positions."""
        config, like = self.model.config, self.model.wte.weight
        head_dim = config.d_model // config.n_head
        sizes = [(config.n_layer, self.capacity)]
        if isinstance(self.model, MixingGPT2):
            below = self.model.insert_layer
            above = self.model.mixing.positions_per_token * self.capacity
            sizes = [(below, self.capacity), (config.n_layer - below, above)]
        return [
            PositionCache(blocks, (rows, config.n_head, positions, head_dim), like)
            for blocks, positions in sizes
        ]

    def _run(self, input_ids: Tensor, present: Tensor | None) -> Tensor:
        model, start = self.model, self.num_tokens
        self.num_tokens += input_ids.shape[1]
        column = torch.arange(start, self.num_tokens, device=input_ids.device)
        positions = (column - self.padding).clamp_min(0)
        x = F.embedding(input_ids, model.wte.weight) + F.embedding(positions, model.wpe.weight)
        x = self._blocks(x, 0, present)
        if isinstance(model, MixingGPT2):
            x = self._above(model, x, positions, present)
        return model.head_logits(x, 1, last_only=True)[:, -1]

    def _above(self, model: MixingGPT2, x: Tensor, positions: Tensor, present: Tensor | None) -> Tensor:
        """From the stream below the insertion to what is read, (B, 1, D); positions (B, R) of the tokens."""
        mixing = model.mixing
        if isinstance(model, CoCoMix):
            q, _ = model.vectors(x, edit=self.edit_kept)
        else:
            q, _ = model.vectors(x)
        if mixing.positions_per_token == 1:
            return self._blocks(mixing.mix(x, q), 1, present)
        assert q is not None
        stream = interleave(x, q)
        if mixing.every == 1:
            return self._blocks(stream, 1, None if present is None else present.repeat_interleave(2, dim=1))
        tokens = torch.ones_like(positions, dtype=torch.bool) if present is None else present
        has_vector = (positions + 1) % mixing.every == 0
        both = torch.stack((tokens, tokens & has_vector), dim=2).flatten(1)
        x = self._blocks(stream, 1, both.expand(len(stream), -1), _LAST_TWO)
        return torch.where(has_vector[:, -1:, None], x[:, 1:], x[:, :1])

    def _blocks(self, x: Tensor, index: int, present: Tensor | None, read: slice = _LAST) -> Tensor:
        """Apply the blocks of one stream to its new positions; the model's last block reads some."""
        first = sum(len(stream.keys) for stream in self.streams[:index])
        last = self.model.config.n_layer - 1
        for number, past in enumerate(self.streams[index].extend(x.shape[1], present), start=first):
            x = self.model.blocks[number](x, read if number == last else None, past)
            if self.edit_residual is not None and self.edit_residual.layer == number:
                x = self.edit_residual(x)
        return x
