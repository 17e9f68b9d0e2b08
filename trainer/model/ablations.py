"""What the method is compared with: other vectors in the place of continuous concepts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.tensor import local
from trainer.config import ModelConfig, PauseConfig, RegressionInsertion
from trainer.model.cocomix import Learned, MixingGPT2
from trainer.model.concept_head import standardize

Distance = Literal["l1", "l2", "cosine"]


class PauseGPT2(MixingGPT2):
    """A GPT-2 with one learned vector interleaved after its tokens: positions without content.

    Positions to think on are what concepts bring besides their content (Goyal et al. 2023, arXiv 2310.02226).
    """

    def __init__(self, config: ModelConfig, pause: PauseConfig) -> None:
        super().__init__(config, pause)
        self.pause = nn.Embedding(1, config.d_model)

    def vectors(
        self, h: Tensor, targets: Tensor | None = None, *, with_ranks: bool = False
    ) -> tuple[Tensor | None, Learned]:
        """See :class:`MixingGPT2`; there are no targets."""
        return local(self.pause.weight).to(h.dtype).expand_as(h), Learned()


class RegressionGPT2(MixingGPT2):
    """A GPT-2 that predicts the teacher's standardised residual, in place of its concepts, and mixes it in.

    Targets are (B, C, D_t) fp32 states, NaN in rows that have none, C being T without ``concepts.every``.
    """

    def __init__(self, config: ModelConfig, insertion: RegressionInsertion) -> None:
        super().__init__(config, insertion)
        self.distance: Distance = insertion.distance
        self.mixer = StateMixer(config.d_model, insertion)

    def vectors(
        self, h: Tensor, targets: Tensor | None = None, *, with_ranks: bool = False
    ) -> tuple[Tensor | None, Learned]:
        """See :class:`MixingGPT2`."""
        q, predicted = self.mixer(h)
        if targets is None:
            return q, Learned()
        part = self.tp.split(targets.shape[1])
        loss = state_distance(predicted, targets[:, part], self.distance)
        return q, Learned(self.tp.sum_parts(loss))


class StateMixer(nn.Module):
    """Predict a state of width D_t linearly, and map the prediction back to one vector of width D.

    As :class:`trainer.model.concept_head.ConceptMixer`, with all of the prediction kept. Every
    tensor-parallel rank holds both maps whole and applies them to its part of the sequence.
    """

    def __init__(self, d_model: int, insertion: RegressionInsertion) -> None:
        super().__init__()
        self.pre_bias = nn.Parameter(torch.empty(d_model))
        self.to_state = nn.Linear(d_model, insertion.width)
        self.from_state = None if insertion.mix == "none" else nn.Linear(insertion.width, d_model)

    def forward(self, h: Tensor) -> tuple[Tensor | None, Tensor]:
        """From h (B, C, D) to q (B, C, D) in its dtype, ``None`` without mixing, and states (B, C, D_t)."""
        normal, mean, std = standardize(h)
        pre_bias = local(self.pre_bias).float()
        predicted = _linear(self.to_state, normal - pre_bias)
        if self.from_state is None:
            return None, predicted
        q = (_linear(self.from_state, predicted).float() + pre_bias) * std + mean
        return q.to(h.dtype), predicted


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.to(layer.weight.dtype), local(layer.weight), local(layer.bias))


def state_distance(predicted: Tensor, state: Tensor, distance: Distance) -> Tensor:
    """Summed distance of predictions to states, both (..., D_t), over the states that are not NaN: () fp32.

    Per token the mean over D_t of the absolute (``l1``) or squared (``l2``) difference, or 1 - cosine.
    """
    predicted = predicted.float()
    known = ~state.isnan().any(-1)
    state = state.nan_to_num()  # a mask on the distance alone would send NaN backwards
    if distance == "cosine":
        per_token = 1 - F.cosine_similarity(predicted, state, dim=-1)
    else:
        difference = predicted - state
        per_token = (difference.abs() if distance == "l1" else difference.square()).mean(-1)
    return torch.where(known, per_token, 0.0).sum()
