"""What validation windows say about single concepts: how often, where most strongly, and on whom they agree.

Shapes: M concepts, N contexts kept of each, C tokens of a context, T tokens of a window, K active concepts
of a token. Memory is that of the kept contexts, 8 M N C bytes a side, however many windows there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data.batch import Batch
from trainer.concepts.extractor import TargetExtractor
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.cocomix import CoCoMix
from trainer.model.documents import Documents, split_windows
from trainer.model.gpt2 import GPT2

TOKENS_BEFORE = 19
TOKENS_AFTER = 12
NO_TOKEN = -1
"""Stands where a context reaches beyond its window."""

_CHUNK = 1024  # contexts that are cut out at one time, K C comparisons each


class Contexts(NamedTuple):
    """The kept contexts of one concept, strongest first; n of them."""

    tokens: Tensor
    """(n, C) int32 ids or ``NO_TOKEN``; the strongest token is number ``TOKENS_BEFORE``."""
    strengths: Tensor
    """(n, C) fp32 value of the concept at each token, NaN where it is not active."""


class ConceptRecord:
    """For every concept, in how many tokens it is active and the windows where it is most so.

    Of each window only the strongest token of a concept counts, so that contexts differ.

    Attributes:
        active: (M) int64, tokens in which each concept was active.
    """

    def __init__(self, num_concepts: int, num_contexts: int) -> None:
        width = TOKENS_BEFORE + 1 + TOKENS_AFTER
        self.active = torch.zeros(num_concepts, dtype=torch.int64)
        self._best = torch.full((num_concepts, num_contexts), -math.inf)
        self._tokens = torch.full((num_concepts, num_contexts, width), NO_TOKEN, dtype=torch.int32)
        self._strengths = torch.full((num_concepts, num_contexts, width), math.nan)

    def add(self, tokens: Tensor, values: Tensor, ids: Tensor, *, positive_only: bool) -> None:
        """Take in one window.

        Args:
            tokens: (T) ids.
            values: (T, K) fp32 of the active concepts.
            ids: (T, K) int64, no concept twice in a token.
            positive_only: whether a value of 0 means that the concept is not active.
        """
        if positive_only:
            values = values.masked_fill(values <= 0, -math.inf)
        entries = values.isfinite().flatten().nonzero().squeeze(1)
        value, concept = values.flatten()[entries], ids.flatten()[entries]
        self.active += torch.bincount(concept, minlength=len(self.active))
        order = value.argsort(descending=True, stable=True)
        order = order[concept[order].argsort(stable=True)]
        strongest = torch.ones(len(order), dtype=torch.bool)
        strongest[1:] = concept[order][1:] != concept[order][:-1]
        order = order[strongest]
        value, concept, position = value[order], concept[order], entries[order] // values.shape[1]
        enters = (value > self._best[concept].amin(1)).nonzero().squeeze(1)
        for part in enters.split(_CHUNK):
            self._keep(tokens, values, ids, concept[part], position[part], value[part])

    def _keep(
        self, tokens: Tensor, values: Tensor, ids: Tensor, concept: Tensor, position: Tensor, value: Tensor
    ) -> None:
        slot = self._best[concept].argmin(1)
        columns = position.unsqueeze(1) + torch.arange(-TOKENS_BEFORE, TOKENS_AFTER + 1)
        outside = (columns < 0) | (columns >= len(tokens))
        columns = columns.clamp(0, len(tokens) - 1)
        same = ids[columns] == concept.view(-1, 1, 1)
        strengths = values[columns].masked_fill(~same, -math.inf).amax(2)
        self._best[concept, slot] = value
        self._tokens[concept, slot] = tokens[columns].masked_fill(outside, NO_TOKEN).int()
        self._strengths[concept, slot] = strengths.masked_fill(outside | ~strengths.isfinite(), math.nan)

    def contexts(self, concept: int) -> Contexts:
        """Those of one concept, fewer than N where it was active in fewer windows."""
        best, order = self._best[concept].sort(descending=True, stable=True)
        order = order[best.isfinite()]
        return Contexts(self._tokens[concept, order], self._strengths[concept, order])


@dataclass(slots=True)
class ConceptStatistics:
    """Of all tokens that were seen; concepts of a student and, where it is there, of its teacher."""

    student: ConceptRecord
    """Concept logits that are kept and mixed in."""
    teacher: ConceptRecord | None
    """Active latents of the autoencoder."""
    targeted: Tensor
    """(M) int64, tokens of which each concept was a target."""
    recalled: Tensor
    """(M) int64, of these, tokens where it was among the student's A largest logits."""
    num_tokens: int = 0
    num_places: int = 0
    """Of these, tokens that have a concept: one of ``concepts.every``."""


@torch.no_grad()
def collect(
    model: CoCoMix,
    batches: Iterable[Batch],
    device: torch.device,
    extractor: TargetExtractor | None,
    *,
    num_contexts: int,
    end_id: int | None = None,
) -> ConceptStatistics:
    """Go through validation windows once.

    Args:
        model: whole, in evaluation, on ``device``.
        batches: at least one row that counts.
        device: where to compute; what is kept is on the CPU.
        extractor: the teacher and its autoencoder on ``device``; ``None`` leaves them out.
        num_contexts: N.
        end_id: token that ends a document, where each is read as if it were alone.

    Raises:
        ValueError: there is no window.
    """
    num_concepts, every = model.mixer.num_concepts, model.mixing.every
    found = ConceptStatistics(
        ConceptRecord(num_concepts, num_contexts),
        None if extractor is None else ConceptRecord(num_concepts, num_contexts),
        torch.zeros(num_concepts, dtype=torch.int64),
        torch.zeros(num_concepts, dtype=torch.int64),
    )
    for batch in batches:
        tokens = batch.counted(batch.tokens).long()
        if not len(tokens):
            continue
        inputs = split_windows(tokens.to(device), end_id)
        num_rows, num_tokens = inputs.input_ids.shape
        found.num_tokens += num_rows * num_tokens
        found.num_places += num_rows * (num_tokens // every)
        values, ids = kept_concepts(model, inputs.input_ids, inputs.documents)
        _add_windows(found.student, tokens, values, ids, positive_only=False)
        if extractor is not None and found.teacher is not None:
            latents, latent_ids, targets = extractor.latents(*inputs)
            latents = spread(latents, num_tokens, every, -math.inf)
            latent_ids = spread(latent_ids, num_tokens, every, 0)
            _add_windows(found.teacher, tokens, latents, latent_ids, positive_only=True)
            _add_agreement(found, targets.cpu(), ids[:, every - 1 :: every].cpu())
    if not found.num_tokens:
        raise ValueError("there is no validation window")
    return found


def _add_windows(
    record: ConceptRecord, tokens: Tensor, values: Tensor, ids: Tensor, *, positive_only: bool
) -> None:
    for row in zip(tokens[:, :-1], values.float().cpu(), ids.cpu(), strict=True):
        record.add(*row, positive_only=positive_only)


def _add_agreement(found: ConceptStatistics, targets: Tensor, kept: Tensor) -> None:
    size = len(found.targeted)
    valid = targets != MASKED_TARGET
    best = kept[..., : targets.shape[-1]]
    recalled = (targets.unsqueeze(-1) == best.unsqueeze(-2)).any(-1) & valid
    found.targeted += torch.bincount(targets[valid], minlength=size)
    found.recalled += torch.bincount(targets[recalled], minlength=size)


def spread(places: Tensor, num_tokens: int, every: int, fill: float) -> Tensor:
    """Rows of the tokens that have a concept, (B, C, K), among all tokens: (B, T, K), ``fill`` elsewhere."""
    out = places.new_full((len(places), num_tokens, places.shape[2]), fill)
    out[:, every - 1 :: every] = places
    return out


@torch.no_grad()
def kept_concepts(
    model: CoCoMix, input_ids: Tensor, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """Concept logits that a student mixes in, largest first, and their ids; both (B, T, K).

    Logits of tokens that have no concept are minus infinity, their ids 0.
    """
    num_rows, num_tokens = input_ids.shape
    h = model.with_vectors(model.stream_after(input_ids, model.insert_layer, documents))
    values = h.new_empty(num_rows, 0, model.mixer.top_k, dtype=torch.float32)
    ids = torch.empty_like(values, dtype=torch.int64)
    if h.shape[1]:  # a text may end before its first concept
        _, head = model.mixer(h, None)
        values, ids = (part.view(num_rows, h.shape[1], -1) for part in (head.values.float(), head.ids))
    every = model.mixing.every
    return spread(values, num_tokens, every, -math.inf), spread(ids, num_tokens, every, 0)


class Promotion(NamedTuple):
    """Tokens by what a direction adds to their logits."""

    most: Tensor
    """(n, count) int64 ids, most first."""
    least: Tensor
    """(n, count) int64 ids, most negative first."""


@torch.no_grad()
def promoted_tokens(
    model: GPT2, directions: Tensor, vocab_size: int, count: int, chunk_rows: int = 256
) -> Promotion:
    """Read directions of the residual stream (n, D) as tokens (the logit lens).

    A direction is centred and scaled by the last LayerNorm's weight and goes through the head. The norm's
    bias, which promotes the same tokens for every direction, is left out, as is its division by the
    standard deviation, which changes no order.

    Args:
        model: whose last norm and head read it.
        directions: on the device of the model.
        vocab_size: tokens that exist; the head may have more rows.
        count: tokens to name at either end, at most ``vocab_size``.
        chunk_rows: directions whose logits exist at one time, 4 * V bytes each.
    """
    head = model.head_weight[:vocab_size].float()
    most, least = [], []
    for rows in directions.float().split(chunk_rows):
        centred = (rows - rows.mean(1, keepdim=True)) * model.ln_f.weight.float()
        logits = centred @ head.t()
        most.append(logits.topk(count, dim=1).indices.cpu())
        least.append(logits.topk(count, dim=1, largest=False).indices.cpu())
    return Promotion(torch.cat(most), torch.cat(least))
