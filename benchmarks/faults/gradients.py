"""A gradient that is not finite, on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.faults.lab import Lab
from benchmarks.faults.ranks import rank_folder, run_ranks
from benchmarks.faults.report import Trials
from benchmarks.faults.watched import Observer, equal_bitwise, local_state, train_observed
from benchmarks.faults.world import logged_values, read_events
from parallel.world import World
from trainer.build import Parts
from trainer.config import RunConfig
from trainer.objective import LossTerms

NUM_RANKS = 3
STEPS = 10
BAD_STEP = 5
CASES = ((0, "nan"), (1, "inf"), (2, "nan"))


class Poisoner(Observer):
    """Makes the loss of one step on one rank not finite, and notes which steps change this rank's state."""

    def __init__(self, parts: Parts, factor: float) -> None:
        super().__init__(parts)
        self._factor = factor
        self._before: list[Tensor] = []
        self.changed: list[bool] = []
        """By step: whether a bit of weights or optimizer state changed."""

    def disturb(self, terms: LossTerms) -> LossTerms:
        """Multiply the loss: the gradients of this rank become infinite or not a number."""
        if self.steps != BAD_STEP or self._factor == 1.0:
            return terms
        return terms._replace(loss=terms.loss * self._factor)

    def on_gradients(self) -> None:
        """Keep the state before the update."""
        self._before = local_state(self.parts)

    def on_end(self) -> None:
        """Compare it with the state after the update."""
        self.changed.append(not equal_bitwise(self._before, local_state(self.parts)))


def nan_gradients(lab: Lab, trials: Trials) -> str:
    """One rank's gradients are bad at one step: all ranks skip that step, and no other."""
    folder = lab.room("gradients")
    for rank, value in CASES:
        config = lab.world.config(
            folder / f"{value}_{rank}", "ntp", train__steps=STEPS, validation__every_steps=0
        )
        problems = poison(config, rank, float(value))
        trials.add(f"{value} on rank {rank} of {NUM_RANKS}", problems, "skipped by all")
    return "1 step each, on all ranks alike; 0 bits of weights and optimizer state changed by it"


def poison(config: RunConfig, bad_rank: int, value: float) -> list[str]:
    """Train with one bad gradient; returns what is wrong with how that was taken."""

    def one_rank(world: World) -> tuple[str, list[bool]]:
        factor = value if world.rank == bad_rank else 1.0
        outcome, observer = train_observed(config, world, lambda parts: Poisoner(parts, factor))
        assert isinstance(observer, Poisoner)
        return outcome, observer.changed

    run_dir = Path(config.run.dir)
    results: list[tuple[str, list[bool]]] = run_ranks(one_rank, NUM_RANKS, rank_folder(run_dir))
    problems = []
    expected = [step != BAD_STEP for step in range(1, STEPS + 1)]
    for rank, (outcome, changed) in enumerate(results):
        if outcome != "finished":
            problems.append(f"rank {rank} ended with {outcome}")
        if changed != expected:
            updated = [step for step, is_changed in enumerate(changed, start=1) if is_changed]
            problems.append(f"rank {rank}: all steps but {BAD_STEP} must change the state, {updated} did")
    return problems + _check_log(run_dir)


def _check_log(run_dir: Path) -> list[str]:
    problems = []
    skipped: list[Any] = [event["step"] for event in read_events(run_dir, "skip")]
    if skipped != [BAD_STEP]:
        problems.append(f"events.jsonl names steps {skipped}, not [{BAD_STEP}]")
    bad = [record["step"] for record in logged_values(run_dir) if record["grad_norm"] is None]
    if bad != [BAD_STEP]:
        problems.append(f"the gradient norm is not finite at steps {bad}, not at [{BAD_STEP}]")
    return problems
