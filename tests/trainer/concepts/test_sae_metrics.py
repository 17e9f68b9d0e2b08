"""Metrics of a TopK autoencoder against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.trainer.concepts.test_sae_training import WIDTH, learner_of, residuals
from trainer.concepts.sae_metrics import (
    ReconstructionSums,
    loss_recovered,
    reconstruction_metrics,
    reconstruction_sums,
    splice_losses,
)


def test_metrics_equal_their_definitions_and_add_up() -> None:
    """Catches a baseline that forgets the mean activation, and batches that are averaged unweighted."""
    sae = learner_of(noise=0.1).to_sae()
    x = residuals(60)
    sums = reconstruction_sums(sae, x[:50].view(5, 10, WIDTH)).plus(reconstruction_sums(sae, x[50:]))
    metrics = reconstruction_metrics(sums)
    x_n = sae.standardize(x)[0].double()
    values, ids = sae.encode(x)
    error = x_n - sae.decode(values, ids)
    expected = error.square().sum() / (x_n - x_n.mean(0)).square().sum()
    assert metrics["normalized_mse"] == pytest.approx(float(expected), rel=1e-6)
    assert metrics["mean_active"] == pytest.approx(float((values > 0).sum()) / 60)
    unused = sae.num_latents - ids[values > 0].unique().numel()
    assert metrics["dead_fraction"] == pytest.approx(unused / sae.num_latents)
    zeros = ReconstructionSums(*(torch.zeros_like(value) for value in sums))
    assert math.isnan(reconstruction_metrics(zeros)["normalized_mse"])


class Block(nn.Module):
    """The smallest teacher with a residual in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.head = nn.Linear(WIDTH, 20)

    def residual_after(self, input_ids: Tensor, layer: int, documents: object = None) -> Tensor:
        return self.embedding(input_ids) * (layer + 1)

    def loss_from_residual(
        self, residual: Tensor, labels: Tensor, layer: int, documents: object = None
    ) -> Tensor:
        return F.cross_entropy(self.head(residual).flatten(0, 1), labels.flatten(), reduction="sum")


def test_spliced_losses_are_those_of_the_three_streams() -> None:
    """Catches a reconstruction spliced in standardised units, or a mean of the loss in place of the sum."""
    torch.manual_seed(0)
    teacher, sae = Block(), learner_of(noise=0.1).to_sae()
    input_ids, labels = torch.randint(20, (2, 3, 7))
    losses = splice_losses(teacher, sae, input_ids, labels, layer=2)
    residual = teacher.embedding(input_ids) * 3
    for found, stream in zip(losses, (residual, sae.reconstruct(residual), 0 * residual), strict=True):
        torch.testing.assert_close(found, teacher.loss_from_residual(stream, labels, 2).detach())
    assert loss_recovered(clean=3.0, spliced=4.0, ablated=8.0) == pytest.approx(0.8)
    assert math.isnan(loss_recovered(clean=3.0, spliced=3.0, ablated=3.0))
