"""How a run is doing, from what lies in its directory; works from any machine that sees it."""

from __future__ import annotations

import time
from pathlib import Path

from launch.lock import read_holder, why_dead
from launch.records import History, RunFiles, read_heartbeats, read_status
from trainer.checkpoint.store import CheckpointError, CheckpointStore


def describe_run(run_dir: Path) -> dict[str, str]:
    """Return what there is to say about a run, in the order in which it is shown.

    Keys: ``state``, ``last step``, ``last good checkpoint``, ``restarts``, ``lost steps`` and, where
    there was one, ``last failure``.

    Raises:
        ValueError: It is not a run directory.
    """
    files = RunFiles(run_dir)
    events = History(files.history).events()
    if not events and read_status(files) is None:
        raise ValueError(f"{run_dir} is not the directory of a run")
    failures = [event for event in events if event["kind"] == "failure"]
    kinds = [str(event["what"]) for event in failures]
    requeues = sum(event["kind"] == "requeue" for event in events)
    shown = {
        "state": _state(files, [str(event["kind"]) for event in events]),
        "last step": _last_step(files),
        "last good checkpoint": _last_good(files),
        "restarts": f"{len(failures)} after failures ({kinds.count('crash')} crashes, "
        f"{kinds.count('hang')} hangs), {requeues} by requeue",
        "lost steps": str(sum(int(event["lost_steps"]) for event in failures)),
    }
    if failures:
        ago = _duration(time.time() - float(failures[-1]["time"]))
        shown["last failure"] = f"{ago} ago: {failures[-1]['error']}"
    return shown


def print_status(run_dir: Path) -> int:
    """Print :func:`describe_run`; returns 0."""
    for name, text in describe_run(run_dir).items():
        print(f"{name:<22}{text}")
    return 0


def _state(files: RunFiles, kinds: list[str]) -> str:
    _, holder = read_holder(files.lock)
    proof = None if holder is None else why_dead(holder)
    if holder is not None and proof is None:
        return f"running: {holder}"
    status = read_status(files)
    if status is not None and status.state == "finished":
        return "finished"
    if "give_up" in kinds[-2:]:
        return "given up after failures without progress"
    if status is not None and status.state == "stopped":
        return "stopped after saving; the same command goes on"
    return f"not running ({proof or 'nobody holds it'}); the same command goes on"


def _last_step(files: RunFiles) -> str:
    """The newest of the ranks' beats and the status; beats of an earlier launch are removed by the next."""
    status, beats = read_status(files), read_heartbeats(files)
    steps = [beat.step for beat in beats.values()] + ([] if status is None else [status.step])
    times = [beat.time for beat in beats.values()] + ([] if status is None else [status.time])
    if not steps:
        return "none yet"
    return f"{max(steps)}, {_duration(time.time() - max(times))} ago"


def _last_good(files: RunFiles) -> str:
    """The newest committed checkpoint whose summary is intact; its bytes are verified when it is loaded."""
    store = CheckpointStore(files.checkpoints)
    for step in reversed(store.steps()):
        try:
            return f"step {step}, {store.read(step).path}"
        except CheckpointError:
            continue
    return "none yet"


def _duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
