"""What is minimised: a microbatch of tokens in, a summed loss and summed metrics out.

An objective owns whatever it needs beside the model (the teacher, its SAE). Losses and metrics are sums
over tokens; the training step divides by the global number of tokens, so that neither accumulation nor
the number of ranks changes them.
"""

from __future__ import annotations

import math
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
from trainer.concepts.states import DistributionExtractor, StateExtractor
from trainer.config import ObjectiveConfig
from trainer.kernels.reference import IGNORED_LABEL, MASKED_TARGET
from trainer.metrics.sums import Mean
from trainer.model.documents import Inputs, split_windows
from trainer.model.gpt2 import GPT2, ModelOutput


class ConceptIds(NamedTuple):
    """Concepts of one microbatch, for counting which are in use."""

    targets: Tensor
    """(b, C, A) int64, ``MASKED_TARGET`` where there is none."""
    kept: Tensor
    """(b, C, K) int64, the concepts with the student's largest logits."""


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

    def __call__(self, model: nn.Module, batch: Batch, *, step: int, detail: bool) -> LossTerms:
        """Loss of a microbatch.

        ``step`` is the number of optimizer steps done. ``detail`` also computes the metrics that cost
        extra passes over wide tensors.
        """
        ...

    def count(self, batch: Batch) -> Tensor | None:
        """() tokens of this rank's rows that have a loss; ``None`` where all of them have, always."""
        ...

    def prepare(self, batch: Batch | None) -> None:
        """Called with the microbatch behind the next one, if it is known: what needs no weights can begin."""
        ...

    def settings(self, step: int) -> Mapping[str, float]:
        """What the objective varies over the run, by name, as it is in the step after ``step`` steps."""
        ...

    def before_step(self, model: nn.Module) -> None:
        """Called between the last backward and the optimizer step."""
        ...

    def after_step(self, model: nn.Module, mesh: Mesh) -> None:
        """Called after every optimizer step."""
        ...


def split_tokens(batch: Batch, document_end: int | None = None) -> Inputs:
    """Inputs and next tokens, both (b, T) int64; rows that do not count get no label.

    Args:
        batch: windows.
        document_end: as for :func:`trainer.model.documents.split_windows`.
    """
    inputs = split_windows(batch.tokens.long(), document_end)
    if not batch.masked_rows:
        return inputs
    labels = inputs.labels.clone()
    mask_rows(labels, batch, IGNORED_LABEL)
    return inputs._replace(labels=labels)


def mask_rows(values: Tensor, batch: Batch, mask: float) -> None:
    """Overwrite the rows of ``values`` (R, ...) that do not count."""
    for row in batch.masked_rows:  # one by one: an index tensor would have to be copied to the device
        values[row] = mask


class _TextLoss:
    """An objective of a language model that changes nothing around the optimizer step.

    Args:
        document_end: token that ends a document, where documents are to be computed as if each were alone;
            the one behind it is not predicted then.
    """

    def __init__(self, document_end: int | None = None) -> None:
        self.document_end = document_end

    def count(self, batch: Batch) -> Tensor | None:
        """See :class:`Objective`."""
        if self.document_end is None:
            return None
        return (split_tokens(batch, self.document_end).labels != IGNORED_LABEL).sum()

    def _num_tokens(self, batch: Batch, inputs: Inputs) -> Tensor | float:
        """Tokens of a microbatch that have a label."""
        if inputs.documents is None:
            return batch.num_counted * inputs.input_ids.shape[1]
        return (inputs.labels != IGNORED_LABEL).sum()

    def prepare(self, batch: Batch | None) -> None:
        """Nothing to do."""

    def settings(self, step: int) -> Mapping[str, float]:
        """Nothing to report."""
        return {}

    def before_step(self, model: nn.Module) -> None:
        """Nothing to do."""

    def after_step(self, model: nn.Module, mesh: Mesh) -> None:
        """Nothing to do."""


class NextToken(_TextLoss):
    """Next-token prediction: the summed cross entropy, whatever the model mixes into its stream.

    Args:
        document_end: as for all objectives of a language model.
    """

    means = (Mean("loss_ntp", "ntp_nats", "tokens"),)

    def __call__(self, model: nn.Module, batch: Batch, *, step: int, detail: bool) -> LossTerms:
        """See :class:`Objective`."""
        inputs = split_tokens(batch, self.document_end)
        out = model(inputs.input_ids, inputs.labels, documents=inputs.documents)
        loss = out.loss_ntp
        sums = {"ntp_nats": loss.detach(), "tokens": self._num_tokens(batch, inputs)}
        if out.concepts is None:
            return LossTerms(loss, sums)
        kept = out.concepts.ids
        return LossTerms(loss, sums, ConceptIds(kept[..., :0], kept))


class DistillationLoss(_TextLoss):
    """Next-token loss + weight times KL(teacher || student) on the token distribution.

    Args:
        extractor: tokens -> the teacher's distribution, with weight and temperature of the divergence.
        document_end: as for :class:`NextToken`.
    """

    means = (
        Mean("loss_ntp", "ntp_nats", "tokens"),
        Mean("loss_kd", "kd_nats", "tokens"),
        Mean("loss_total", "total_nats", "tokens"),
    )

    def __init__(self, extractor: DistributionExtractor, document_end: int | None = None) -> None:
        super().__init__(document_end)
        self.extractor = extractor

    def __call__(self, model: nn.Module, batch: Batch, *, step: int, detail: bool) -> LossTerms:
        """See :class:`Objective`."""
        inputs = split_tokens(batch, self.document_end)
        teacher = self.extractor(inputs.input_ids, inputs.documents)
        out = model(inputs.input_ids, inputs.labels, teacher=teacher, documents=inputs.documents).distilled
        sums = {
            "tokens": self._num_tokens(batch, inputs),
            "ntp_nats": out.cross_entropy,
            "kd_nats": out.divergence,
            "total_nats": out.loss.detach(),
        }
        return LossTerms(out.loss, sums)


def concept_weight(step: int, total_steps: int, config: ObjectiveConfig) -> float:
    """Lambda in optimizer step ``step`` (0-based) of ``total_steps``; schedules end at 0."""
    progress = min(step / max(total_steps - 1, 1), 1.0)
    shares = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }
    return config.concept_weight * shares[config.concept_weight_schedule]


class _ConceptWeighted(_TextLoss):
    """An objective with a loss of what the student mixes in, weighted by lambda.

    Args:
        config: lambda and how it falls.
        total_steps: optimizer steps of the run.
        every: tokens per mixed-in vector; the loss is a mean over the tokens that have one.
        document_end: as for :class:`NextToken`.
    """

    def __init__(
        self, config: ObjectiveConfig, total_steps: int, every: int = 1, document_end: int | None = None
    ) -> None:
        super().__init__(document_end)
        self.config = config
        self.total_steps = total_steps
        self.every = every

    def settings(self, step: int) -> Mapping[str, float]:
        """Lambda, which is 0 or more and never waits for the device."""
        return {"concept_weight": concept_weight(step, self.total_steps, self.config)}

    def _weighted(
        self, out: ModelOutput, batch: Batch, inputs: Inputs, step: int
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The total loss, and the sums that every such objective reports."""
        assert out.loss_ntp is not None
        assert out.loss_concept is not None
        learned = self.every * out.loss_concept
        loss = out.loss_ntp + self.settings(step)["concept_weight"] * learned
        return loss, {
            "tokens": self._num_tokens(batch, inputs),
            "ntp_nats": out.loss_ntp.detach(),
            "concept_nats": learned.detach(),
            "total_nats": loss.detach(),
        }


class CoCoMixLoss(_ConceptWeighted):
    """Next-token loss + lambda times the concept loss (CoCoMix, arXiv 2502.08524, equation 5).

    Args:
        extractor: tokens -> concept targets; ``None`` where the batches bring them.
        config, total_steps, every, document_end: as above.
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
        config: ObjectiveConfig,
        total_steps: int,
        every: int = 1,
        document_end: int | None = None,
        *,
        ahead_on: torch.device | None = None,
    ) -> None:
        super().__init__(config, total_steps, every, document_end)
        self.extractor = extractor
        self.ahead = None if ahead_on is None else TargetsAhead(self.targets, ahead_on)

    def targets(self, batch: Batch) -> Tensor:
        """Concept targets (b, C, A) int64, ``MASKED_TARGET`` in rows that do not count."""
        return self._targets(batch, split_tokens(batch, self.document_end))

    def _targets(self, batch: Batch, inputs: Inputs) -> Tensor:
        if self.extractor is not None:
            targets = self.extractor(*inputs)
        else:
            assert batch.targets is not None, "without an extractor the loader reads stored targets"
            targets = unpack_ids(batch.targets[:, self.every - 1 :: self.every])
        mask_rows(targets, batch, MASKED_TARGET)
        return targets

    def prepare(self, batch: Batch | None) -> None:
        """Begin with the targets of a microbatch."""
        if self.ahead is not None and batch is not None:
            self.ahead.start(batch)

    def __call__(self, model: nn.Module, batch: Batch, *, step: int, detail: bool) -> LossTerms:
        """See :class:`Objective`; ``detail`` ranks the targets among all concepts."""
        inputs = split_tokens(batch, self.document_end)
        targets = self._targets(batch, inputs) if self.ahead is None else self.ahead.take(batch)
        out = model(inputs.input_ids, inputs.labels, targets, documents=inputs.documents, with_ranks=detail)
        loss, sums = self._weighted(out, batch, inputs, step)
        counts = out.concepts
        sums |= {"targets": counts.num_targets, "recalled": counts.num_recalled, "ranks": counts.rank_sum}
        return LossTerms(loss, sums, ConceptIds(targets, counts.ids))


class RegressionLoss(_ConceptWeighted):
    """Next-token loss + lambda times the distance to the teacher's standardised residual.

    Args:
        extractor: tokens -> residuals.
        config, total_steps, every, document_end: as above.
    """

    means = (
        Mean("loss_ntp", "ntp_nats", "tokens"),
        Mean("loss_concept", "concept_nats", "tokens"),
        Mean("loss_total", "total_nats", "tokens"),
    )

    def __init__(
        self,
        extractor: StateExtractor,
        config: ObjectiveConfig,
        total_steps: int,
        every: int = 1,
        document_end: int | None = None,
    ) -> None:
        super().__init__(config, total_steps, every, document_end)
        self.extractor = extractor

    def __call__(self, model: nn.Module, batch: Batch, *, step: int, detail: bool) -> LossTerms:
        """See :class:`Objective`."""
        inputs = split_tokens(batch, self.document_end)
        states = self.extractor(inputs.input_ids, inputs.documents)
        mask_rows(states, batch, math.nan)
        out = model(inputs.input_ids, inputs.labels, states, documents=inputs.documents)
        return LossTerms(*self._weighted(out, batch, inputs, step))


class SaeLoss:
    """Reconstruction of a frozen teacher's residuals by a TopK autoencoder (Gao et al. 2024).

    Args:
        teacher: frozen GPT-2 on the device of the run.
        layer: block after which the residual is read.
        tokens_per_step: tokens of one optimizer step over all ranks.
        tp: ranks that hold the same tokens and one dictionary between them; each of them runs the teacher
            on a share of the rows.
        document_end: token that ends a document, where the teacher reads each as if it were alone.
    """

    means = (
        Mean("sae_nmse", "squared_error", "tokens"),
        Mean("sae_aux_loss", "aux", "tokens"),
        Mean("sae_active_latents", "active", "tokens"),
        Mean("sae_dead_fraction", "dead", "tokens"),
    )

    def __init__(
        self,
        teacher: GPT2,
        layer: int,
        tokens_per_step: int,
        tp: TensorGroup | None = None,
        document_end: int | None = None,
    ) -> None:
        self.tp = tp or TensorGroup()
        self.document_end = document_end
        self.teacher = teacher
        self.layer = layer
        self.tokens_per_step = tokens_per_step

    def __call__(self, model: nn.Module, batch: Batch, *, step: int, detail: bool) -> LossTerms:
        """See :class:`Objective`."""
        assert isinstance(model, SaeLearner)
        inputs = split_windows(batch.counted(batch.tokens).long(), self.document_end)
        with torch.no_grad():
            residual = self.teacher.residual_after(inputs.input_ids, self.layer, inputs.documents)
        terms = model(residual)
        num_tokens = batch.num_counted * (batch.tokens.shape[1] - 1)
        sums = {
            "tokens": num_tokens,
            "squared_error": terms.normalized_mse,
            "aux": terms.aux,
            "active": terms.num_active,
            "dead": model.dead_latents().double().mean() * num_tokens,
        }
        return LossTerms(terms.loss, sums)

    def count(self, batch: Batch) -> Tensor | None:
        """See :class:`Objective`; the last token of a document has a residual too."""
        return None

    def prepare(self, batch: Batch | None) -> None:
        """Nothing to do."""

    def settings(self, step: int) -> Mapping[str, float]:
        """Nothing to report."""
        return {}

    def before_step(self, model: nn.Module) -> None:
        """Take the gradient along the unit decoder rows out, before it enters Adam's moments."""
        assert isinstance(model, SaeLearner)
        model.project_gradients()

    def after_step(self, model: nn.Module, mesh: Mesh) -> None:
        """Decoder rows back to unit norm; one all-reduce of M counters."""
        assert isinstance(model, SaeLearner)
        model.after_step()
        model.sync_buffers(lambda counters: min_over_ranks(counters, mesh), self.tokens_per_step)
