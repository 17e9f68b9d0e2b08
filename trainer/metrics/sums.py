"""Sums of one optimizer step on the device, and the means they become over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


class ConceptUsage:
    """Which of the M concepts were targets, and which the student kept, since the last report."""

    def __init__(self, num_concepts: int, device: torch.device) -> None:
        # The last column takes masked ids: indexing by a mask would make the host wait for its length.
        self._seen = torch.zeros(2, num_concepts + 1, dtype=torch.uint8, device=device)

    def add(self, targets: Tensor, kept: Tensor, mask: Tensor | None = None) -> None:
        """Mark concepts as seen.

        Args:
            targets: (..., A) integer ids.
            kept: (..., K) integer ids of the student's largest concept logits.
            mask: (..., A), true where a target counts; None counts all.
        """
        targets = targets.long()
        if mask is not None:
            targets = targets.masked_fill(~mask, self._seen.shape[1] - 1)
        self._seen[0].index_fill_(0, targets.flatten(), 1)
        self._seen[1].index_fill_(0, kept.long().flatten(), 1)

    def reduce(self, max_over_ranks: Reduction) -> dict[str, Tensor]:
        """Return both shares over all ranks as 0-dim tensors and start anew (collective)."""
        shares = max_over_ranks(self._seen.clone())[:, :-1].double().mean(dim=1)
        self._seen.zero_()
        return {"concept_share_targeted": shares[0], "concept_share_used": shares[1]}
