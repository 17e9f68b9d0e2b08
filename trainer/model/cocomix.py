"""GPT-2 with continuous concepts mixed into its residual stream (CoCoMix, arXiv 2502.08524)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from trainer.config import ConceptsConfig, Insertion, ModelConfig
from trainer.kernels.concept_head import ConceptHeadOutput
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.concept_head import ConceptMixer, KeptEdit
from trainer.model.documents import Documents, attention_mask
from trainer.model.gpt2 import GPT2, ConceptSums, ModelOutput, TeacherHead
from trainer.model.mixing import mixing_of


class Learned(NamedTuple):
    """What an insertion reports besides the stream; fields that were not asked for are ``None``."""

    loss: Tensor | None = None
    """() fp32 summed over tokens."""
    concepts: ConceptSums | None = None


class MixingGPT2(GPT2):
    """A GPT-2 whose residual stream takes up further vectors before block ``insert_layer``.

    A subclass makes the :meth:`vectors`; ``mixing`` says to which tokens they belong and where
    they go. No positional embedding is added there. Blocks from ``insert_layer`` on run causally over the
    mixed stream, of which the last one updates only what is read.
    """

    def __init__(self, config: ModelConfig, insertion: Insertion) -> None:
        super().__init__(config)
        self.insertion = insertion
        self.insert_layer = insertion.insert_layer
        self.mixing = mixing_of(insertion)

    def vectors(
        self, h: Tensor, targets: Tensor | None = None, *, with_ranks: bool = False
    ) -> tuple[Tensor | None, Learned]:
        """Vectors (B, C, D) of the tokens h (B, C, D) that have one, and what is learned by them."""
        raise NotImplementedError

    def insert(
        self, h: Tensor, targets: Tensor | None = None, *, with_ranks: bool = False
    ) -> tuple[Tensor, Learned]:
        """The stream above the insertion (B, S, D) from that below it, h (B, T, D); see :meth:`forward`."""
        places = self.with_vectors(h)
        if places.shape[1] == 0:
            return h, Learned()  # a prompt that ends before its first vector
        q, learned = self.vectors(places, targets, with_ranks=with_ranks)
        return self.mixing.mix(h, q), learned

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        last_only: bool = False,
        teacher: TeacherHead | None = None,
        documents: Documents | None = None,
        with_ranks: bool = False,
    ) -> ModelOutput:
        """As :meth:`GPT2.forward`, with targets of what is mixed in.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64 next tokens; logits are returned without them.
            targets: one for each vector, of the subclass' kind; no loss of the insertion without them.
            last_only, teacher, documents: as there. A vector belongs to its token's document.
            with_ranks: rank the targets among all concepts (for metrics).
        """
        length = input_ids.shape[1]
        padded_ids = self.whole_parts(input_ids)
        h = self.embed(padded_ids, documents)
        mask = None if documents is None else attention_mask(documents.ids, h.dtype)
        h = self.run_blocks(h, 0, self.insert_layer, mask)
        x, learned = self.insert(h, targets, with_ranks=with_ranks)
        if documents is not None and self.mixing.positions_per_token > 1:
            mask = attention_mask(self.mixing.spread(documents.ids), x.dtype)
        last = self.config.n_layer - 1
        x = self.run_blocks(x, self.insert_layer, last, mask)
        x = self.blocks[last](x, self.mixing.read(padded_ids.shape[1], x.device), mask=mask)
        out = self.read_out(x, labels, length, last_only=last_only, teacher=teacher)
        return out._replace(loss_concept=learned.loss, concepts=learned.concepts)

    def with_vectors(self, h: Tensor) -> Tensor:
        """The tokens of h (B, T, D) that a vector belongs to, (B, T // every, D)."""
        every = self.mixing.every
        return h if every == 1 else h[:, every - 1 :: every]

    def whole_parts(self, input_ids: Tensor) -> Tensor:
        """As :meth:`GPT2.whole_parts`; each part has its own vectors."""
        if self.tp.size == 1:
            return input_ids
        return F.pad(input_ids, (0, -input_ids.shape[1] % (self.tp.size * self.mixing.every)))


class CoCoMix(MixingGPT2):
    """A GPT-2 that predicts concepts before block ``insert_layer`` and mixes them into its stream.

    Interleaved, token t's prediction sees tokens up to t and concepts up to t. Targets are (B, C, A) int64
    concept ids or ``MASKED_TARGET``, C being T without ``concepts.every``.
    """

    def __init__(self, config: ModelConfig, concepts: ConceptsConfig) -> None:
        super().__init__(config, concepts)
        self.mixer = ConceptMixer(config.d_model, concepts)

    def vectors(
        self,
        h: Tensor,
        targets: Tensor | None = None,
        *,
        with_ranks: bool = False,
        edit: KeptEdit | None = None,
    ) -> tuple[Tensor | None, Learned]:
        """See :class:`MixingGPT2`, and the mixer for ``edit``."""
        q, head = self.mixer(h, targets, with_ranks=with_ranks, edit=edit)
        return q, Learned(None if targets is None else head.loss, _count(head, targets, len(h)))

    def concept_logits(self, input_ids: Tensor, documents: Documents | None = None) -> Tensor:
        """All concept logits (B, C, M), for inspection."""
        h = self.stream_after(input_ids, self.insert_layer, documents)
        return self.mixer.logits(self.with_vectors(h))


def _count(head: ConceptHeadOutput, targets: Tensor | None, num_rows: int) -> ConceptSums:
    kept = head.ids.unflatten(0, (num_rows, -1))
    if targets is None:
        nothing = head.rank_sum
        return ConceptSums(nothing, nothing, nothing, kept)
    rows = targets.flatten(0, 1)
    valid = rows != MASKED_TARGET
    best = head.ids[:, : rows.shape[1]]
    recalled = (rows.unsqueeze(2) == best.unsqueeze(1)).any(2) & valid
    return ConceptSums(valid.sum(), recalled.sum(), head.rank_sum, kept)
