"""What is minimised: a microbatch of tokens in, a summed loss and summed metrics out.

An objective owns whatever it needs beside the model (the teacher, its SAE). Losses and metrics are sums
over tokens; the training step divides by the global number of tokens, so that neither accumulation nor
the number of ranks changes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from data.batch import Batch
from parallel.collectives import min_over_ranks
from parallel.mesh import Mesh
from parallel.tensor import TensorGroup
from trainer.concepts.ahead import TargetsAhead
from trainer.concepts.extractor import TargetExtractor, unpack_ids
from trainer.concepts.sae_training import SaeLearner
from trainer.kernels.reference import IGNORED_LABEL, MASKED_TARGET
from trainer.metrics.sums import Mean
from trainer.model.gpt2 import GPT2


class ConceptIds(NamedTuple):
    """Concepts of one microbatch, for counting which are in use."""

    targets: Tensor
    """(b, T, A) int64, ``MASKED_TARGET`` where there is none."""
    kept: Tensor
    """(b, T, K) int64, what the student mixed in."""


class LossTerms(NamedTuple):
    """One microbatch's loss and metrics."""

    loss: Tensor
    """() fp32 summed over tokens; what backward starts from."""
    sums: Mapping[str, Tensor | float]
    """Sums by slot, as the objective's ``means`` name them; tensors are detached scalars."""
    concepts: ConceptIds | None = None


class Objective(Protocol):
    """What the training step and the validation ask of an objective."""

    @property
    def means(self) -> tuple[Mean, ...]:
        """Reported metrics, as ratios of summed slots."""
        ...

    def __call__(self, model: nn.Module, batch: Batch, *, detail: bool) -> LossTerms:
        """Loss of a microbatch.

        ``detail`` also computes the metrics that cost extra passes over wide tensors.
        """
        ...

    def prepare(self, batch: Batch | None) -> None:
        """Called with the microbatch behind the next one, if it is known: what needs no weights can begin."""
        ...

    def before_step(self, model: nn.Module) -> None:
        """Called between the last backward and the optimizer step."""
        ...

    def after_step(self, model: nn.Module, mesh: Mesh) -> None:
        """Called after every optimizer step."""
        ...


def split_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs and next tokens, both (b, T) int64; rows that do not count get no label."""
    tokens = batch.tokens.long()
    input_ids, labels = tokens[:, :-1], tokens[:, 1:]
    if batch.num_rows < len(labels):
        labels = labels.clone()
        labels[batch.num_rows :] = IGNORED_LABEL
    return input_ids, labels


class _NoHooks:
    """An objective that prepares nothing and changes nothing around the optimizer step."""

    def prepare(self, batch: Batch | None) -> None:
        """Nothing to do."""

    def before_step(self, model: nn.Module) -> None:
        """Nothing to do."""

    def after_step(self, model: nn.Module, mesh: Mesh) -> None:
        """Nothing to do."""


class NextToken(_NoHooks):
    """Next-token prediction: the summed cross entropy."""

    means = (Mean("loss_ntp", "ntp_nats", "tokens"),)

    def __call__(self, model: nn.Module, batch: Batch, *, detail: bool) -> LossTerms:
        """See :class:`Objective`."""
        input_ids, labels = split_tokens(batch)
        loss = model(input_ids, labels).loss_ntp
        return LossTerms(loss, {"ntp_nats": loss.detach(), "tokens": batch.num_rows * input_ids.shape[1]})


class CoCoMixLoss(_NoHooks):
    """Next-token loss + lambda times the concept loss (CoCoMix, arXiv 2502.08524, equation 5).

    Args:
        extractor: tokens -> concept targets; ``None`` where the batches bring them.
        concept_weight: lambda.
        ahead_on: device on which targets are computed a microbatch ahead; ``None`` for when they are used.
    """

    means = (
        Mean("loss_ntp", "ntp_nats", "tokens"),
        Mean("loss_concept", "concept_nats", "tokens"),
        Mean("loss_total", "total_nats", "tokens"),
        Mean("concept_recall_at_A", "recalled", "targets"),
        Mean("concept_mean_rank", "ranks", "targets"),
        Mean("concept_targets_per_token", "targets", "tokens"),
    )

    def __init__(
        self,
        extractor: TargetExtractor | None,
        concept_weight: float,
        ahead_on: torch.device | None = None,
    ) -> None:
        self.extractor = extractor
        self.concept_weight = concept_weight
        self.ahead = None if ahead_on is None else TargetsAhead(self.targets, ahead_on)

    def targets(self, batch: Batch) -> Tensor:
        """Targets (b, T, A) int64; ``MASKED_TARGET`` where there is none, and in rows that do not count."""
        if self.extractor is not None:
            targets = self.extractor(*split_tokens(batch))
        else:
            assert batch.targets is not None, "without an extractor the loader reads stored targets"
            targets = unpack_ids(batch.targets)
        targets[batch.num_rows :] = MASKED_TARGET
        return targets

    def prepare(self, batch: Batch | None) -> None:
        """Begin with the targets of a microbatch."""
        if self.ahead is not None and batch is not None:
            self.ahead.start(batch)

    def __call__(self, model: nn.Module, batch: Batch, *, detail: bool) -> LossTerms:
        """See :class:`Objective`; ``detail`` ranks the targets among all concepts."""
        input_ids, labels = split_tokens(batch)
        targets = self.targets(batch) if self.ahead is None else self.ahead.take(batch)
        out = model(input_ids, labels, targets, with_ranks=detail)
        loss = out.loss_ntp + self.concept_weight * out.loss_concept
        counts = out.concepts
        sums = {
            "tokens": batch.num_rows * input_ids.shape[1],
            "ntp_nats": out.loss_ntp.detach(),
            "concept_nats": out.loss_concept.detach(),
            "total_nats": loss.detach(),
            "targets": counts.num_targets,
            "recalled": counts.num_recalled,
            "ranks": counts.rank_sum,
        }
        return LossTerms(loss, sums, ConceptIds(targets, counts.ids))


class SaeLoss:
    """Reconstruction of a frozen teacher's residuals by a TopK autoencoder (Gao et al. 2024).

    Args:
        teacher: frozen GPT-2 on the device of the run.
        layer: block after which the residual is read.
        tokens_per_step: tokens of one optimizer step over all ranks.
        tp: ranks that hold the same tokens and one dictionary between them; each of them runs the teacher
            on a share of the rows.
    """

    means = (
        Mean("sae_nmse", "squared_error", "tokens"),
        Mean("sae_aux_loss", "aux", "tokens"),
        Mean("sae_active_latents", "active", "tokens"),
        Mean("sae_dead_fraction", "dead", "tokens"),
    )

    def __init__(
        self, teacher: GPT2, layer: int, tokens_per_step: int, tp: TensorGroup | None = None
    ) -> None:
        self.tp = tp or TensorGroup()
        self.teacher = teacher
        self.layer = layer
        self.tokens_per_step = tokens_per_step

    def __call__(self, model: nn.Module, batch: Batch, *, detail: bool) -> LossTerms:
        """See :class:`Objective`."""
        assert isinstance(model, SaeLearner)
        with torch.no_grad():
            residual = self.teacher.residual_after(batch.tokens[: batch.num_rows, :-1].long(), self.layer)
        terms = model(residual)
        num_tokens = batch.num_rows * (batch.tokens.shape[1] - 1)
        sums = {
            "tokens": num_tokens,
            "squared_error": terms.normalized_mse,
            "aux": terms.aux,
            "active": terms.num_active,
            "dead": model.dead_latents().double().mean() * num_tokens,
        }
        return LossTerms(terms.loss, sums)

    def prepare(self, batch: Batch | None) -> None:
        """Nothing to do."""

    def before_step(self, model: nn.Module) -> None:
        """Take the gradient along the unit decoder rows out, before it enters Adam's moments."""
        assert isinstance(model, SaeLearner)
        model.project_gradients()

    def after_step(self, model: nn.Module, mesh: Mesh) -> None:
        """Decoder rows back to unit norm; one all-reduce of M counters."""
        assert isinstance(model, SaeLearner)
        model.after_step()
        model.sync_buffers(lambda counters: min_over_ranks(counters, mesh), self.tokens_per_step)
