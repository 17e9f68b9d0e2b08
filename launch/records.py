"""What trainer, agents and orchestrator tell each other through the run directory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Where things lie below a run directory."""

    root: Path

    @property
    def lock(self) -> Path:
        """Lease records of the run's owner."""
        return self.root / "lock"

    @property
    def heartbeats(self) -> Path:
        """``rank_N.json`` of each rank, written by the trainer."""
        return self.root / "heartbeat"

    @property
    def status(self) -> Path:
        """What the trainer's rank 0 says about the run."""
        return self.root / "status.json"

    @property
    def history(self) -> Path:
        """What the orchestrator did, one JSON object per line."""
        return self.root / "orchestrator.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Root of the checkpoint store."""
        return self.root / "checkpoints"

    def stacks(self, rank: int) -> Path:
        """Where a rank writes its stacks when it gets SIGUSR2."""
        return self.root / "logs" / f"stacks_rank_{rank}.txt"

    def launch(self, number: int) -> Path:
        """Raw output of the ranks of one launch, and its agents' records."""
        return self.root / "logs" / f"launch_{number:04d}"


def agent_record(launch_dir: Path, node_rank: int) -> Path:
    """Where the agent of a node says how its part of a launch is going."""
    return launch_dir / f"node_{node_rank}.json"


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None when there is none, or a writer is at it."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a small file atomically; not fsynced, because nobody needs it after a power loss."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    temporary.replace(path)


@dataclass(frozen=True, slots=True)
class Status:
    """``RUN/status.json``: the trainer's own account, which exit codes cannot give through torchrun."""

    state: str
    """``running``, ``stopped`` (saved, to be started again) or ``finished``."""
    step: int
    time: float


def read_status(files: RunFiles) -> Status | None:
    """Return the trainer's status, None before its first one."""
    value = read_json(files.status)
    if value is None or not {"state", "step", "time"} <= value.keys():
        return None
    return Status(str(value["state"]), int(value["step"]), float(value["time"]))


@dataclass(frozen=True, slots=True)
class Beat:
    """One rank's newest sign of life."""

    rank: int
    host: str
    pid: int
    step: int
    time: float
    phase: str


def read_heartbeats(files: RunFiles) -> dict[int, Beat]:
    """Return the newest beat of each rank that has one."""
    beats = {}
    for path in files.heartbeats.glob("rank_*.json"):
        value, number = read_json(path), path.stem.removeprefix("rank_")
        if value is not None and number.isdecimal():
            rank = int(number)
            beats[rank] = Beat(
                rank, str(value["host"]), value["pid"], value["step"], value["time"], str(value["phase"])
            )
    return beats


class History:
    """``RUN/orchestrator.jsonl``, to which the run's owner appends what it does.

    Kinds: ``lock preflight_failed launch signal hang failure restart exclude requeue requeue_refused
    give_up stop finish``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, kind: str, **fields: Any) -> None:
        """Append an event with its time in seconds since the epoch, and show it."""
        line = json.dumps({"time": time.time(), "kind": kind, **fields})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        shown = "  ".join(f"{name}={value}" for name, value in fields.items())
        print(f"[orchestrator] {kind}  {shown}".rstrip(), flush=True)

    def events(self) -> list[dict[str, Any]]:
        """Return all events, oldest first; a line that was cut short by a crash is left out."""
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        events = []
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and {"kind", "time"} <= event.keys():
                events.append(event)
        return events

    def num_launches(self) -> int:
        """How often ranks were started."""
        return sum(event["kind"] == "launch" for event in self.events())

    def failures_without_progress(self, checkpoint: int) -> int:
        """Failures in a row, up to now, while ``checkpoint`` was the newest one; giving up ends a row."""
        count = 0
        for event in reversed(self.events()):
            if event["kind"] == "give_up" or (
                event["kind"] == "failure" and event["checkpoint"] < checkpoint
            ):
                break
            count += event["kind"] == "failure"
        return count

    def failures_of(self, host: str, *, within_s: float) -> int:
        """How often a node was the first to fail lately."""
        since = time.time() - within_s
        return sum(
            event["kind"] == "failure" and event.get("host") == host and event["time"] >= since
            for event in self.events()
        )
