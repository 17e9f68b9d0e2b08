"""From a residual stream to one continuous concept per token (CoCoMix, arXiv 2502.08524, section 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from parallel.tensor import TensorGroup, local
from trainer.config import ConceptsConfig
from trainer.kernels.concept_head import ConceptHeadOutput, concept_head
from trainer.kernels.sparse_decode import sparse_decode
from trainer.model.padding import padded

_STD_EPS = 1e-5  # added to the standard deviation, not to the variance: as in the published SAEs


KeptEdit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Kept values and ids, both (B*T, K), to others of any K; an id may stand twice, its values add up."""


def standardize(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h - mean) / (std + eps) over the width, with the unbiased std; h (B, T, D) of any floating dtype.

    Returns it (B, T, D), mean and std (B, T, 1), all fp32.
    """
    h = h.float()
    mean = h.mean(-1, keepdim=True)
    std = h.std(-1, keepdim=True)
    return (h - mean) / (std + _STD_EPS), mean, std


class ConceptMixer(nn.Module):
    """Predict M concept logits, keep the K largest, compress them into one vector of width D.

    The compress weight is stored (M, D), one row per concept, so that K kept concepts are K rows;
    the authors' layout is its transpose (``trainer.model.formats``). With ``concepts.mix=none`` concepts
    are predicted only, and there is nothing to compress with.
    """

    def __init__(self, d_model: int, config: ConceptsConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.num_concepts = config.num_concepts
        self.pre_bias = nn.Parameter(torch.empty(d_model))
        self.predict = nn.Linear(d_model, padded(config.num_concepts))
        self.mixes = config.mix != "none"
        if self.mixes:
            self.compress_weight = nn.Parameter(torch.empty(padded(config.num_concepts), d_model))
            self.compress_bias = nn.Parameter(torch.empty(d_model))
        self.tp = TensorGroup()

    def standardize(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per token (h - mean) / (std + eps) - pre_bias; h (B, T, D).

        Statistics are fp32 whatever the dtype of h. Returns u (B, T, D) and mean, std (B, T, 1).
        """
        normal, mean, std = standardize(h)
        return normal - local(self.pre_bias).float(), mean, std

    def forward(
        self,
        h: Tensor,
        targets: Tensor | None,
        *,
        with_ranks: bool = False,
        edit: KeptEdit | None = None,
    ) -> tuple[Tensor | None, ConceptHeadOutput]:
        """Continuous concepts of a residual stream.

        Args:
            h: (B, T, D).
            targets: (B, T, A) int64 concept ids or ``MASKED_TARGET``; ``None`` predicts without a loss.
            with_ranks: also rank the targets.
            edit: changes what is mixed in after the selection; the head's output stays as predicted.

        Returns:
            q (B, T, D) in the dtype of h (``None`` without mixing), and the head's output over B*T rows.
        """
        u, mean, std = self.standardize(h)
        weight = local(self.predict.weight)
        rows = self.tp.gather_sequence(u.to(weight.dtype))
        head = concept_head(
            rows.flatten(0, 1),
            weight,
            local(self.predict.bias),
            None if targets is None else targets.flatten(0, 1),
            self.top_k,
            num_concepts=self.num_concepts,
            tp=self.tp,
            with_ranks=with_ranks,
        )
        if not self.mixes:
            return None, head
        kept = (head.values, head.ids) if edit is None else edit(head.values, head.ids)
        columns = sparse_decode(*kept, local(self.compress_weight)).view(*rows.shape[:2], -1)
        mixed = self.tp.columns_to_sequence(columns).float()
        bias = local(self.compress_bias).float() + local(self.pre_bias).float()
        q = (mixed + bias) * std + mean
        return q.to(h.dtype), head

    def logits(self, h: Tensor) -> Tensor:
        """All concept logits (B, T, M) of h (B, T, D), for inspection; training never forms them."""
        u, _, _ = self.standardize(h)
        out: Tensor = self.predict(u.to(self.predict.weight.dtype))
        return out[..., : self.num_concepts]
