"""Gradients that are not finite and losses that spike, noticed one step late on all ranks alike.

Every rank judges the same all-reduced numbers, so all ranks come to the same verdict at the same step
without asking each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor

from trainer.config import HealthConfig
from trainer.metrics.lagged import LaggedValues


class TrainingDiverged(RuntimeError):
    """The run cannot go on by itself; the text says why and what to change."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """An update that was left out on all ranks because its gradient norm was not finite."""

    step: int
    in_a_row: int


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss far above those before it."""

    step: int
    loss: float
    mean: float
    std: float


class HealthMonitor:
    """Judges each step when the next one has been dispatched.

    Args:
        config: the ``health:`` section.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._skipped_in_a_row = 0
        self._pending: tuple[int, LaggedValues] | None = None
        self.num_rewinds = 0

    @property
    def watches_losses(self) -> bool:
        """Whether every step's loss is needed, reduced over the ranks."""
        return self._config.spike_sigmas > 0

    def submit(self, step: int, grad_norm: Tensor, loss: Tensor | None) -> Skipped | Spike | None:
        """Hand over a step and get the verdict on the one before it; ``None`` when all is well.

        Args:
            step: optimizer steps done.
            grad_norm: () global gradient norm.
            loss: () mean loss over the global batch, the same on all ranks; needed only where
                :attr:`watches_losses`.

        Raises:
            TrainingDiverged: too many skipped steps in a row.
        """
        pending, self._pending = (
            self._pending,
            (step, LaggedValues([grad_norm, *([] if loss is None else [loss])])),
        )
        return None if pending is None else self._judge(*pending)

    def finish(self) -> Skipped | Spike | None:
        """The verdict on the last step."""
        pending, self._pending = self._pending, None
        return None if pending is None else self._judge(*pending)

    def _judge(self, step: int, values: LaggedValues) -> Skipped | Spike | None:
        grad_norm, *losses = values.read()
        if not math.isfinite(grad_norm):
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= self._config.max_skipped_steps:
                raise TrainingDiverged(
                    f"{self._skipped_in_a_row} steps in a row up to step {step} had non-finite gradients "
                    f"(health.max_skipped_steps={self._config.max_skipped_steps}): lower optim.lr, "
                    f"or look at the data"
                )
            return Skipped(step, self._skipped_in_a_row)
        self._skipped_in_a_row = 0
        return self._judge_loss(step, losses[0]) if losses else None

    def _judge_loss(self, step: int, loss: float) -> Spike | None:
        if math.isnan(loss):
            return None  # no row of the step counted
        window = self._losses
        if len(window) >= self._config.spike_window // 2:
            mean, std = fmean(window), pstdev(window)
            if loss > mean + self._config.spike_sigmas * std:
                return Spike(step, loss, mean, std)
        window.append(loss)
        return None

    def count_rewind(self, spike: Spike) -> None:
        """Note that the run goes back; raises :class:`TrainingDiverged` when it did so too often."""
        if self.num_rewinds >= self._config.max_rewinds:
            raise TrainingDiverged(
                f"loss {spike.loss:.4f} at step {spike.step} is a spike again after "
                f"health.max_rewinds={self._config.max_rewinds} rewinds: lower optim.lr"
            )
        self.num_rewinds += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the verdict on the newest step must have been taken."""
        return {
            "losses": list(self._losses),
            "skipped_in_a_row": self._skipped_in_a_row,
            "num_rewinds": self.num_rewinds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._losses = deque(state["losses"], maxlen=self._config.spike_window)
        self._skipped_in_a_row = int(state["skipped_in_a_row"])
        self.num_rewinds = max(self.num_rewinds, int(state["num_rewinds"]))
        self._pending = None
