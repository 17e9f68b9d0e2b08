"""What a language model gets right on validation windows: by position, and how sure it is of itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from trainer.analysis.scoring import token_statistics
from trainer.concepts.extractor import TargetExtractor
from trainer.kernels.reference import IGNORED_LABEL, MASKED_TARGET
from trainer.model.cocomix import CoCoMix
from trainer.model.documents import Inputs, split_windows
from trainer.model.gpt2 import GPT2

NUM_BINS = 15
POSITION_GROUPS = 16


@dataclass(slots=True)
class Reliability:
    """Stated probabilities against what happened, in equal bins (Guo et al. 2017, arXiv 1706.04599)."""

    count: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.float64))
    """(NUM_BINS,) statements by bin."""
    stated: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.float64))
    """(NUM_BINS,) sum of their probabilities."""
    happened: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.float64))
    """(NUM_BINS,) sum of what happened, 0 to 1 each."""

    def add(self, probability: Tensor, outcome: Tensor) -> None:
        """Take in statements of any shape: probabilities, and outcomes from 0 to 1."""
        probability, outcome = probability.flatten().double().cpu(), outcome.flatten().double().cpu()
        index = (probability * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        self.count += torch.bincount(index, minlength=NUM_BINS)
        self.stated += torch.bincount(index, probability, minlength=NUM_BINS)
        self.happened += torch.bincount(index, outcome, minlength=NUM_BINS)

    @property
    def error(self) -> float:
        """Expected calibration error: mean over statements of |stated - happened| of their bin."""
        return float((self.stated - self.happened).abs().sum() / self.count.sum().clamp_min(1))

    def to_json(self) -> dict[str, Any]:
        """Error, and count, mean stated and mean happened of each bin that is not empty."""
        bins = [
            {
                "from": number / NUM_BINS,
                "to": (number + 1) / NUM_BINS,
                "count": int(count),
                "stated": stated / count,
                "happened": happened / count,
            }
            for number, (count, stated, happened) in enumerate(
                zip(self.count.tolist(), self.stated.tolist(), self.happened.tolist(), strict=True)
            )
            if count
        ]
        return {"expected_calibration_error": self.error, "bins": bins}


@dataclass(slots=True)
class ConceptQuality:
    """How well a student predicts the concepts that its teacher names."""

    num_targets: int = 0
    recalled: int = 0
    """Targets among the A largest logits of their token."""
    rank_sum: float = 0.0
    reciprocal_rank_sum: float = 0.0
    reliability: Reliability = field(default_factory=Reliability)
    """Of the K kept concepts: A times the stated probability against being a target. The loss asks for 1/A
    on each target."""

    def add(self, logits: Tensor, targets: Tensor, top_k: int) -> None:
        """Take in concept logits (N, M) and targets (N, A) with ``MASKED_TARGET``."""
        logits = logits.float()
        valid = targets != MASKED_TARGET
        picked = logits.gather(1, targets.clamp_min(0))
        above = torch.stack([(logits > column.unsqueeze(1)).sum(1) for column in picked.unbind(1)], 1)
        ranks = (above + 1)[valid].double()
        num_targets = targets.shape[1]
        self.num_targets += int(valid.sum())
        self.recalled += int((ranks <= num_targets).sum())
        self.rank_sum += float(ranks.sum())
        self.reciprocal_rank_sum += float((1 / ranks).sum())
        best = logits.topk(top_k, dim=1)
        share = (best.values - logits.logsumexp(1, keepdim=True)).exp() * num_targets
        is_target = (best.indices.unsqueeze(2) == targets.unsqueeze(1)).any(2)
        whole = valid.all(1)  # where targets are masked, 1/A is not what the loss asks for
        self.reliability.add(share[whole].clamp_max(1), is_target[whole])

    def to_json(self) -> dict[str, Any]:
        """Means over targets."""
        count = max(self.num_targets, 1)
        return {
            "targets": self.num_targets,
            "recall_at_A": self.recalled / count,
            "mean_rank": self.rank_sum / count,
            "mean_reciprocal_rank": self.reciprocal_rank_sum / count,
            "calibration": self.reliability.to_json(),
        }


@dataclass(slots=True)
class ValidationReport:
    """Sums over the windows of one source."""

    nats: Tensor
    """(T,) fp64 summed cross entropy by position in the window, or in the document where those are kept
    apart."""
    counts: Tensor
    """(T,) int64 tokens behind them."""
    hits: int = 0
    """Tokens whose most probable prediction was right."""
    reliability: Reliability = field(default_factory=Reliability)
    """Of the most probable next token."""
    concepts: ConceptQuality | None = None

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return float(self.nats.sum()) / self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that were predicted."""
        return int(self.counts.sum())

    def add(self, nats: Tensor, counted: Tensor, positions: Tensor) -> None:
        """Take in the cross entropies of tokens at positions, of which some count; each (B, T)."""
        where = positions[counted].cpu()
        self.nats.index_add_(0, where, nats[counted].double().cpu())
        self.counts += torch.bincount(where, minlength=len(self.counts))

    def to_json(self) -> dict[str, Any]:
        """All means, plain numbers."""
        body = {
            "tokens": self.num_tokens,
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "accuracy": self.hits / self.num_tokens,
            "by_position": self._by_position(),
            "calibration": self.reliability.to_json(),
        }
        if self.concepts is not None:
            body["concepts"] = self.concepts.to_json()
        return body

    def _by_position(self) -> list[dict[str, Any]]:
        """Losses of groups of positions; the first ones, where context is short, in groups that double.

        ``None`` where no token has such a position.
        """
        length = len(self.nats)
        widest = max(1, length // POSITION_GROUPS)
        edges = [0]
        while edges[-1] < length:
            edges.append(min(edges[-1] + min(max(edges[-1], 1), widest), length))
        return [
            {
                "first": first,
                "last": last - 1,
                "loss": self._mean(slice(first, last)),
            }
            for first, last in pairwise(edges)
        ]

    def _mean(self, positions: slice) -> float | None:
        count = int(self.counts[positions].sum())
        return float(self.nats[positions].sum()) / count if count else None


@torch.no_grad()
def measure(
    model: GPT2,
    batches: Iterable[Batch],
    device: torch.device,
    extractor: TargetExtractor | None = None,
    *,
    end_id: int | None = None,
) -> ValidationReport:
    """Go through validation windows with a model that is whole.

    Args:
        model: in evaluation, on ``device``.
        batches: at least one; rows that do not count are left out.
        device: where to compute.
        extractor: names the concepts; ``None`` leaves them out.
        end_id: token that ends a document, where each is read as if it were alone.

    Raises:
        ValueError: there is no batch, or nothing in it to predict.
    """
    report: ValidationReport | None = None
    for batch in batches:
        tokens = batch.counted(batch.tokens).to(device).long()
        if not len(tokens):
            continue
        inputs = split_windows(tokens, end_id)
        if report is None:
            length = inputs.labels.shape[1]
            report = ValidationReport(
                torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.int64)
            )
        counted = inputs.labels != IGNORED_LABEL
        logits = model(inputs.input_ids, documents=inputs.documents).logits
        statistics = token_statistics(logits, tokens[:, 1:])
        report.add(statistics.nats, counted, _positions(inputs))
        hit = statistics.hit[counted]
        report.hits += int(hit.sum())
        report.reliability.add(statistics.confidence[counted], hit)
        if extractor is not None and isinstance(model, CoCoMix):
            report.concepts = report.concepts or ConceptQuality()
            _add_concepts(report.concepts, model, extractor, inputs)
    if report is None or report.num_tokens == 0:
        raise ValueError("there is no validation window")
    return report


def _positions(inputs: Inputs) -> Tensor:
    if inputs.documents is not None:
        return inputs.documents.positions
    return torch.arange(inputs.labels.shape[1], device=inputs.labels.device).expand_as(inputs.labels)


def _add_concepts(
    quality: ConceptQuality, model: CoCoMix, extractor: TargetExtractor, inputs: Inputs
) -> None:
    targets = extractor(*inputs)
    for row, wanted in enumerate(targets):  # (T, M) logits at a time
        only = itemgetter(slice(row, row + 1))
        documents = None if inputs.documents is None else inputs.documents.map(only)
        logits = model.concept_logits(only(inputs.input_ids), documents)
        quality.add(logits.flatten(0, 1), wanted, model.mixer.top_k)
