"""A plan beside what a step on fake tensors held and exchanged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from launch.planning.blocks import FP32
from launch.planning.forecast import Plan
from launch.planning.measure import Measured
from launch.planning.memory import optimizer_bytes
from launch.planning.traffic import Kind

EXACT = 0.0
MEMORY_TOLERANCE = 0.1
TRAFFIC_TOLERANCE = 0.02

_PHASES = {
    "targets": ("targets",),
    "forward": ("forward",),
    "backward": ("backward", "gradient"),
    "optimizer": ("optimizer",),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One number of a plan and its measurement, bytes."""

    what: str
    planned: int
    measured: int
    tolerance: float
    """Largest relative error that is accepted."""

    @property
    def error(self) -> float:
        """Relative to the measurement."""
        if self.measured == 0:
            return 0.0 if self.planned == 0 else float("inf")
        return self.planned / self.measured - 1

    @property
    def agrees(self) -> bool:
        """Whether the error is within the tolerance."""
        return abs(self.error) <= self.tolerance


def compare(plan: Plan, measured: Measured) -> list[Comparison]:
    """Number by number: state exactly, then the peak of each phase, then collectives."""
    shard = FP32 * plan.layout.shard_elements
    found = [
        Comparison("parameters", shard, measured.parameters, EXACT),
        Comparison("gradients", shard, measured.gradients, EXACT),
        Comparison("optimizer", optimizer_bytes(plan.layout), measured.optimizer, EXACT),
    ]
    for phase, starts in _PHASES.items():
        # On the CPU nothing is elsewhere: offloaded tensors are measured with the others.
        tensors = [
            moment.tensors + sum(moment.offloaded.values())
            for moment in plan.moments
            if moment.name.startswith(starts)
        ]
        if tensors:
            found.append(
                Comparison(f"peak: {phase}", max(tensors), measured.peaks.get(phase, 0), MEMORY_TOLERANCE)
            )
    return found + _compare_traffic(plan, measured.traffic)


def _compare_traffic(plan: Plan, measured: Mapping[tuple[str, Kind], int]) -> list[Comparison]:
    """Whole tensors of the collectives, by axis and kind."""
    sums: dict[bool, Counter[tuple[str, Kind]]] = {True: Counter(), False: Counter()}
    for transfer in plan.traffic:
        sums[True][_axis(plan, transfer.axis), transfer.kind] += transfer.buffer
    for (axis, kind), size in measured.items():
        sums[False][_axis(plan, axis), kind] += size
    keys = sorted({*sums[True], *sums[False]})
    return [
        Comparison(f"{axis} {kind}", sums[True][axis, kind], sums[False][axis, kind], TRAFFIC_TOLERANCE)
        for axis, kind in keys
    ]


def _axis(plan: Plan, axis: str) -> str:
    """Where one axis only has several ranks, torch may have one group for it and for what it is part of."""
    layout = plan.layout
    if axis == "dp" and 1 in (layout.dp_replicate, layout.dp_shard):
        return "dp_shard" if layout.dp_replicate == 1 else "dp_replicate"
    if axis == "replica" and 1 in (layout.dp_shard, layout.tp):
        return "dp_shard" if layout.tp == 1 else "tp"
    return axis
