"""Programs that take turns in one process, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Seconds:
    """What each call of one program took."""

    cpu: tuple[float, ...]
    """All threads of the process together."""
    wall: tuple[float, ...]

    @property
    def cpu_median(self) -> float:
        """Of the CPU."""
        return median(self.cpu)

    @property
    def wall_median(self) -> float:
        """On the clock."""
        return median(self.wall)


def take_turns(
    programs: Mapping[str, Callable[[], object]], repeats: int, *, warm_ups: int = 1
) -> dict[str, Seconds]:
    """Run each program once per round; the first ``warm_ups`` rounds do not count."""
    cpu: dict[str, list[float]] = {name: [] for name in programs}
    wall: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(warm_ups + repeats):
        for name, program in programs.items():
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            program()
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - wall_start)
    return {name: Seconds(tuple(cpu[name][warm_ups:]), tuple(wall[name][warm_ups:])) for name in programs}


def ratio(slower: Seconds, faster: Seconds) -> float:
    """Median over rounds of the CPU seconds of one program over those of the other."""
    return median(a / b for a, b in zip(slower.cpu, faster.cpu, strict=True))


def wall_ratio(slower: Seconds, faster: Seconds) -> float:
    """As :func:`ratio`, on the clock."""
    return median(a / b for a, b in zip(slower.wall, faster.wall, strict=True))
