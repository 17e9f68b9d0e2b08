"""From a residual stream to one continuous concept per token (CoCoMix, arXiv 2502.08524, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import ConceptsConfig
from trainer.kernels.concept_head import ConceptHeadOutput, concept_head
from trainer.kernels.sparse import sparse_decode

_STD_EPS = 1e-5  # added to the standard deviation, not to the variance: as in the published SAEs


class ConceptMixer(nn.Module):
    """Predict M concept logits, keep the K largest, compress them into one vector of width D.

    The compress weight is stored (M, D), one row per concept, so that K kept concepts are K rows;
    the authors' layout is its transpose (``trainer.model.formats``).
    """

    def __init__(self, d_model: int, config: ConceptsConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.pre_bias = nn.Parameter(torch.empty(d_model))
        self.predict = nn.Linear(d_model, config.num_concepts)
        self.compress_weight = nn.Parameter(torch.empty(config.num_concepts, d_model))
        self.compress_bias = nn.Parameter(torch.empty(d_model))

    def standardize(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per token (h - mean) / (std + eps) - pre_bias with the unbiased std; h (B, T, D).

        Statistics are fp32 whatever the dtype of h. Returns u (B, T, D) and mean, std (B, T, 1).
        """
        h = h.float()
        mean = h.mean(-1, keepdim=True)
        std = h.std(-1, keepdim=True)
        return (h - mean) / (std + _STD_EPS) - self.pre_bias.float(), mean, std

    def forward(
        self, h: Tensor, targets: Tensor | None, *, with_ranks: bool = False
    ) -> tuple[Tensor, ConceptHeadOutput]:
        """Continuous concepts of a residual stream.

        Args:
            h: (B, T, D).
            targets: (B, T, A) int64 concept ids or ``MASKED_TARGET``; ``None`` predicts without a loss.
            with_ranks: also rank the targets.

        Returns:
            q (B, T, D) in the dtype of h, and the head's output over B*T rows.
        """
        u, mean, std = self.standardize(h)
        weight = self.predict.weight
        head = concept_head(
            u.flatten(0, 1).to(weight.dtype),
            weight,
            self.predict.bias,
            None if targets is None else targets.flatten(0, 1),
            self.top_k,
            with_ranks=with_ranks,
        )
        mixed = sparse_decode(head.values, head.ids, self.compress_weight).view_as(h).float()
        q = (mixed + self.compress_bias.float() + self.pre_bias.float()) * std + mean
        return q.to(h.dtype), head

    def logits(self, h: Tensor) -> Tensor:
        """All concept logits (B, T, M) of h (B, T, D), for inspection; training never forms them."""
        u, _, _ = self.standardize(h)
        out: Tensor = self.predict(u.to(self.predict.weight.dtype))
        return out
