"""When to save and when to stop: pure logic on step numbers and times (torch-free).

Rank 0 asks, the other ranks are told: clocks differ, and all ranks must save at the same step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from trainer.config import CheckpointConfig


class CheckpointPolicy:
    """Decides after each optimizer step. Times are seconds since the epoch, as ``time.time`` gives.

    Args:
        config: The ``checkpoint:`` section.
        start: When training starts; the first interval in minutes counts from here.
        deadline: When the job is ended from outside, if that is known.
        margin_s: Seconds that are left for leaving after the last save.
    """

    _NUM_MEASURED = 8

    def __init__(
        self, config: CheckpointConfig, *, start: float, deadline: float | None = None, margin_s: float = 30.0
    ) -> None:
        self._every_steps = config.every_steps
        self._every_s = 60.0 * config.every_minutes
        self._deadline = deadline
        self._margin_s = margin_s
        self._last_time = start
        self._durations_s: deque[float] = deque(maxlen=self._NUM_MEASURED)

    def due_by_step(self, step: int) -> bool:
        """Whether an interval in steps is over after ``step`` optimizer steps; every rank can tell."""
        return self._every_steps > 0 and step > 0 and step % self._every_steps == 0

    def due_by_time(self, now: float) -> bool:
        """Whether an interval in minutes is over; rank 0 asks."""
        return self._every_s > 0 and now - self._last_time >= self._every_s

    def started(self, now: float) -> None:
        """Note that a save was started; one that fails is tried again at the next interval, not step."""
        self._last_time = now

    def finished(self, seconds: float) -> None:
        """Note how long a save took from its start to its commit."""
        self._durations_s.append(seconds)

    @property
    def save_time_s(self) -> float:
        """The longest of the last saves in seconds; 0 before the first."""
        return max(self._durations_s, default=0.0)

    def must_stop(self, now: float) -> bool:
        """Whether less time is left than two saves and the margin take: save now and leave."""
        if self._deadline is None:
            return False
        return self._deadline - now < 2 * self.save_time_s + self._margin_s


def slurm_deadline(environment: Mapping[str, str]) -> float | None:
    """End of the SLURM job in seconds since the epoch, where the job knows it (SLURM_JOB_END_TIME)."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() and int(text) > 0 else None
