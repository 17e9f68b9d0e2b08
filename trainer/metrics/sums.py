"""Sums of one optimizer step on the device, and the means they become over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Reduction = Callable[[Tensor], Tensor]
"""All-reduce over the data-parallel ranks, such as a partial of ``parallel.collectives.sum_over_ranks``."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A value ``name`` = slot ``total`` / slot ``count``, both summed over microbatches and ranks."""

    name: str
    total: str
    count: str


class StepMetrics:
    """Sums of one optimizer step in named slots of one fp64 device vector.

    Args:
        means: What is reported; its totals and counts are the slots.
        device: Where the added sums live.
    """

    def __init__(self, means: Sequence[Mean], device: torch.device) -> None:
        self._means = tuple(means)
        names = dict.fromkeys(slot for mean in means for slot in (mean.total, mean.count))
        self._slots = {name: index for index, name in enumerate(names)}
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, **sums: Tensor | float) -> None:
        """Add a microbatch's sums (0-dim tensors of any float or integer type) to their slots.

        Raises:
            ValueError: A name is not a slot.
        """
        for name, value in sums.items():
            if name not in self._slots:
                raise ValueError(f"{name} is not a slot of the metrics; slots are {', '.join(self._slots)}")
            self._sums[self._slots[name]].add_(value.detach() if isinstance(value, Tensor) else value)

    def reduce(self, sum_over_ranks: Reduction) -> dict[str, Tensor]:
        """Return the step's means over ranks as 0-dim fp64 tensors (collective); NaN where a count is 0."""
        sums = sum_over_ranks(self._sums.clone())
        slots = self._slots
        return {mean.name: sums[slots[mean.total]] / sums[slots[mean.count]] for mean in self._means}

    def reset(self) -> None:
        """Start the next step."""
        self._sums.zero_()


DENSITY_LIMITS = tuple(number / 4 for number in range(-24, 1))
"""Upper limits of the bins of a histogram of concepts, log10 of the share of tokens; 0 is every token."""


class UsageReport(NamedTuple):
    """Concepts in use over all ranks, still on the device."""

    shares: dict[str, Tensor]
    """Shares of the dictionary as 0-dim fp64 tensors, by the record's key."""
    histograms: dict[str, Tensor]
    """Numbers of concepts (25,) int64 by how often they occur, in the bins of ``DENSITY_LIMITS``; those that
    never do are in the first one."""


class ConceptUsage:
    """How often each of the M concepts was a target, and was kept by the student, since the last report."""

    def __init__(self, num_concepts: int, device: torch.device) -> None:
        # Targets, kept. The last column takes masked ids, because indexing by a mask would make the host wait
        # for its length; in the second row it counts the tokens.
        self._counts = torch.zeros(2, num_concepts + 1, dtype=torch.int64, device=device)
        self._limits = torch.tensor(DENSITY_LIMITS, dtype=torch.float64, device=device).view(1, -1, 1)

    def add(self, targets: Tensor, kept: Tensor, mask: Tensor | None = None) -> None:
        """Count concepts.

        Args:
            targets: (..., A) integer ids.
            kept: (..., K) integer ids of the student's largest concept logits.
            mask: (..., A), true where a target counts; None counts all.
        """
        targets = targets.long()
        if mask is not None:
            targets = targets.masked_fill(~mask, self._counts.shape[1] - 1)
        for row, ids in zip(self._counts, (targets.flatten(), kept.long().flatten()), strict=True):
            row.scatter_add_(0, ids, torch.ones_like(ids))
        self._counts[1, -1] += kept.numel() // kept.shape[-1]

    def reduce(self, sum_over_ranks: Reduction) -> UsageReport:
        """Return what was counted over all ranks and start anew (collective)."""
        counts = sum_over_ranks(self._counts.clone())
        self._counts.zero_()
        occurs, num_tokens = counts[:, :-1], counts[1, -1]
        shares = (occurs > 0).double().mean(dim=1)
        density = (occurs / num_tokens.clamp_min(1)).log10()
        # Cumulative numbers, one comparison per limit: torch.histogram knows no CUDA, and bincount waits.
        below = (density.unsqueeze(1) <= self._limits).sum(dim=2)
        histograms = below.diff(dim=1, prepend=below.new_zeros(2, 1))
        return UsageReport(
            {"concept_share_targeted": shares[0], "concept_share_used": shares[1]},
            {"concepts/density_targeted": histograms[0], "concepts/density_used": histograms[1]},
        )
