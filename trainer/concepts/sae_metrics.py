"""How well a TopK autoencoder reconstructs residuals (Gao et al. 2024, arXiv 2406.04093, section 2).

Shapes: D_t teacher width, M latents.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.concepts.sae import TopKSae
from trainer.model.documents import Documents


class ReconstructionSums(NamedTuple):
    """Sums over tokens behind :func:`reconstruction_metrics`; add them over batches and ranks.

    All are float64, in standardised space.
    """

    tokens: Tensor
    """() number of tokens."""
    squared_error: Tensor
    """() sum of ``|x - x'|^2``."""
    power: Tensor
    """() sum of ``|x|^2``."""
    total: Tensor
    """(D_t) sum of ``x``."""
    activations: Tensor
    """(M) tokens in which each latent is above 0."""

    def plus(self, other: ReconstructionSums) -> ReconstructionSums:
        """Elementwise sum."""
        return ReconstructionSums(*(a + b for a, b in zip(self, other, strict=True)))


@torch.no_grad()
def reconstruction_sums(sae: TopKSae, residual: Tensor) -> ReconstructionSums:
    """What one batch of residuals (..., D_t) adds to the metrics."""
    residual = residual.reshape(-1, residual.shape[-1])
    x = sae.standardize(residual)[0]
    values, ids = sae.encode(residual)
    error = x - sae.decode(values, ids)
    activations = torch.zeros(sae.num_latents, dtype=torch.float64, device=x.device)
    activations.index_add_(0, ids.flatten(), (values > 0).flatten().double())
    return ReconstructionSums(
        tokens=activations.new_tensor(x.shape[0]),
        squared_error=error.double().square().sum(),
        power=x.double().square().sum(),
        total=x.double().sum(0),
        activations=activations,
    )


def reconstruction_metrics(sums: ReconstructionSums) -> dict[str, float]:
    """Metrics of everything that was summed up.

    ``normalized_mse`` is the paper's (section 2.1): the squared error over that of always predicting the mean
    activation, here the mean of the same tokens; 1 minus it is the explained variance. The training loss is
    lower on the same tokens, for its denominator does not subtract that mean. ``dead_fraction`` is the share
    of latents that no token used; ``mean_active`` the latents above 0 per token.
    """
    tokens = float(sums.tokens)
    baseline = float(sums.power - sums.total.square().sum() / sums.tokens)
    return {
        "normalized_mse": float(sums.squared_error) / baseline if baseline > 0 else float("nan"),
        "dead_fraction": float((sums.activations == 0).double().mean()),
        "mean_active": float(sums.activations.sum()) / tokens if tokens else float("nan"),
    }


class SplicedTeacher(Protocol):
    """What a teacher must offer so that its residual can be replaced."""

    def residual_after(self, input_ids: Tensor, layer: int, documents: Documents | None = None) -> Tensor:
        """Residual stream (B, T, D_t) after block ``layer``."""

    def loss_from_residual(
        self, residual: Tensor, labels: Tensor, layer: int, documents: Documents | None = None
    ) -> Tensor:
        """Summed next-token loss in nats when the stream after block ``layer`` is ``residual``."""


class SpliceLosses(NamedTuple):
    """Summed next-token losses in nats of one batch."""

    clean: Tensor
    """The teacher's own."""
    spliced: Tensor
    """With the autoencoder's reconstruction in place of the residual."""
    ablated: Tensor
    """With zeros in place of the residual."""


@torch.no_grad()
def splice_losses(
    teacher: SplicedTeacher,
    sae: TopKSae,
    input_ids: Tensor,
    labels: Tensor,
    layer: int,
    documents: Documents | None = None,
) -> SpliceLosses:
    """Teacher losses with the residual after block ``layer`` intact, reconstructed and zeroed.

    Args:
        teacher: in eval mode.
        sae: on the teacher's device.
        input_ids: (B, T) int64.
        labels: (B, T) int64, as ``loss_from_residual`` takes them.
        layer: teacher block, 0-based.
        documents: those of ``input_ids``, where the teacher reads each as if it were alone.
    """
    residual = teacher.residual_after(input_ids, layer, documents)
    streams = (residual, sae.reconstruct(residual), torch.zeros_like(residual))
    return SpliceLosses(*(teacher.loss_from_residual(stream, labels, layer, documents) for stream in streams))


def loss_recovered(clean: float, spliced: float, ablated: float) -> float:
    """``(ablated - spliced) / (ablated - clean)``: 1 for a lossless reconstruction, 0 for one as bad as 0.

    Not a number where zeros cost nothing, for then there is nothing to recover.
    """
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")
