"""GPT-2 with one continuous concept interleaved after every token (CoCoMix, arXiv 2502.08524)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import ConceptsConfig, ModelConfig
from trainer.kernels.concept_head import ConceptHeadOutput
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.concept_head import ConceptMixer, KeptEdit
from trainer.model.gpt2 import GPT2, ConceptSums, ModelOutput


def interleave(tokens: Tensor, concepts: Tensor) -> Tensor:
    """h_1, q_1, h_2, q_2, ...: two (B, T, D) streams -> (B, 2T, D), token first."""
    return torch.stack((tokens, concepts), dim=2).flatten(1, 2)


POSITIONS_PER_TOKEN = 2
"""Positions above the insertion that a token adds: its own and its concept's."""

CONCEPT_POSITIONS = slice(1, None, 2)
"""Where the concepts stand in an interleaved stream."""


def _count(head: ConceptHeadOutput, targets: Tensor | None) -> ConceptSums | None:
    if targets is None:
        return None
    rows = targets.flatten(0, 1)
    valid = rows != MASKED_TARGET
    best = head.ids[:, : rows.shape[1]]
    recalled = (rows.unsqueeze(2) == best.unsqueeze(1)).any(2) & valid
    return ConceptSums(valid.sum(), recalled.sum(), head.rank_sum, head.ids.view(*targets.shape[:2], -1))


class CoCoMix(GPT2):
    """A GPT-2 that predicts concepts before block ``insert_layer`` and mixes them into its stream.

    Blocks from ``insert_layer`` on run causally over 2T positions; no positional embedding is added
    there. Next tokens are read at the concept positions, so token t's prediction sees tokens up to t
    and concepts up to t.
    """

    def __init__(self, config: ModelConfig, concepts: ConceptsConfig) -> None:
        super().__init__(config)
        self.insert_layer = concepts.insert_layer
        self.mixer = ConceptMixer(config.d_model, concepts)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        last_only: bool = False,
        with_ranks: bool = False,
    ) -> ModelOutput:
        """As :meth:`GPT2.forward`, with concept targets.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64 next tokens; logits are returned without them.
            targets: (B, T, A) int64 concept ids or ``MASKED_TARGET``; no concept loss without them.
            last_only: logits of the last position only.
            with_ranks: rank the targets among all concepts (for metrics).
        """
        length = input_ids.shape[1]
        h = self.run_blocks(self.embed(self.whole_parts(input_ids)), 0, self.insert_layer)
        x, head = self.insert(h, targets, with_ranks=with_ranks)
        last = self.config.n_layer - 1
        x = self.run_blocks(x, self.insert_layer, last)
        x = self.blocks[last](x, CONCEPT_POSITIONS)
        out = self.read_out(x, labels, length, last_only=last_only)
        return out._replace(
            loss_concept=None if targets is None else head.loss, concepts=_count(head, targets)
        )

    def insert(
        self,
        h: Tensor,
        targets: Tensor | None = None,
        *,
        with_ranks: bool = False,
        edit: KeptEdit | None = None,
    ) -> tuple[Tensor, ConceptHeadOutput]:
        """The stream above the insertion (B, 2T, D) from the one below it (B, T, D); see the mixer."""
        q, head = self.mixer(h, targets, with_ranks=with_ranks, edit=edit)
        return interleave(h, q), head

    def concept_logits(self, input_ids: Tensor) -> Tensor:
        """All concept logits (B, T, M), for inspection."""
        h = self.run_blocks(self.embed(input_ids), 0, self.insert_layer)
        return self.mixer.logits(h)
