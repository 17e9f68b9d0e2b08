"""Finds ranks that fell silent, and collects their stacks."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from launch.records import Beat, RunFiles, read_heartbeats

_LONG_PHASES = ("start", "publish", "leave")


@dataclass(frozen=True, slots=True)
class Silence:
    """Ranks that gave no sign of life for too long."""

    seconds: float
    """Longest silence."""
    ranks: tuple[int, ...]
    beats: dict[int, Beat]
    """Newest beat of every rank that ever gave one."""

    @property
    def suspects(self) -> tuple[int, ...]:
        """Ranks that are furthest behind: in a hang, the others wait for them."""
        steps = {rank: self.beats[rank].step if rank in self.beats else -1 for rank in self.ranks}
        return tuple(rank for rank, step in steps.items() if step == min(steps.values()))

    def host(self) -> str | None:
        """The one node of all suspects, None when they are on several."""
        hosts = {self.beats[rank].host for rank in self.suspects if rank in self.beats}
        return hosts.pop() if len(hosts) == 1 else None


class Watchdog:
    """Watches the heartbeats of one launch.

    A beat counts when it differs from the one before, by the clock of this machine: clocks of nodes
    need not agree.

    Args:
        files: Run directory; beats of earlier launches are removed.
        world_size: Number of ranks.
        timeout_s: Seconds of silence after the first step.
        startup_timeout_s: Seconds until the first step (loading, compiling, verifying a checkpoint) and
            after the last one (publishing, the last save).
    """

    def __init__(
        self, files: RunFiles, world_size: int, *, timeout_s: float, startup_timeout_s: float
    ) -> None:
        self._files, self._timeout_s, self._startup_timeout_s = files, timeout_s, startup_timeout_s
        for path in files.heartbeats.glob("rank_*.json"):
            path.unlink(missing_ok=True)
        now = time.monotonic()
        self._changed = dict.fromkeys(range(world_size), now)
        self._beats: dict[int, Beat] = {}

    @property
    def last_step(self) -> int:
        """Newest step that any rank reached; -1 before the first."""
        return max((beat.step for beat in self._beats.values()), default=-1)

    def check(self) -> Silence | None:
        """Read all beats; returns the ranks that are silent for longer than they may be."""
        now = time.monotonic()
        for rank, beat in read_heartbeats(self._files).items():
            if rank in self._changed and self._beats.get(rank) != beat:
                self._beats[rank], self._changed[rank] = beat, now
        silent = {rank: now - since for rank, since in self._changed.items()}
        late = [rank for rank, seconds in silent.items() if seconds > self._allowed_s(rank)]
        if not late:
            return None
        return Silence(max(silent[rank] for rank in late), tuple(late), dict(self._beats))

    def _allowed_s(self, rank: int) -> float:
        phase = self._beats[rank].phase if rank in self._beats else "start"
        if phase in _LONG_PHASES:
            return max(self._timeout_s, self._startup_timeout_s)
        return self._timeout_s


class StackCollection:
    """Waits for the stacks that ranks append to their files, and copies the new part aside.

    Args:
        files: Run directory.
        world_size: Number of ranks.
    """

    def __init__(self, files: RunFiles, world_size: int) -> None:
        self._files = files
        self._before = {rank: _size(files.stacks(rank)) for rank in range(world_size)}

    def wait(self, timeout_s: float) -> list[int]:
        """Return the ranks that have written stacks and are done with it."""
        deadline = time.monotonic() + timeout_s
        sizes: dict[int, int] = {}
        while time.monotonic() < deadline:
            before, sizes = sizes, {rank: _size(self._files.stacks(rank)) for rank in self._before}
            if sizes == before and all(sizes[rank] > start for rank, start in self._before.items()):
                break
            time.sleep(0.1)
        return [rank for rank, start in self._before.items() if sizes[rank] > start]

    def keep(self, directory: Path) -> None:
        """Copy the stack files to a directory, where the next hang does not mix with them."""
        directory.mkdir(parents=True, exist_ok=True)
        for rank in self._before:
            source = self._files.stacks(rank)
            if source.exists():
                shutil.copyfile(source, directory / source.name)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
