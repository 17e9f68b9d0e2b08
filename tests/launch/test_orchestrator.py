"""Real faults against real runs of two ranks outside SLURM."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launch.lock import RunLock, read_holder
from launch.records import RunFiles, read_status
from launch.status import describe_run
from tests.launch.runs import (
    SAVE_EVERY,
    STEPS,
    RunMaker,
    events,
    processes_of,
    rank_pid,
    read_losses,
    wait_for,
    wait_for_events,
    wait_for_step,
)

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def expire(directory: Path) -> None:
    """Let the newest lease look like one of another machine that was not renewed."""
    number, _ = read_holder(directory)
    path = directory / f"{number:08d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid_space": "another", "expires": 0.0}))


def test_crash_and_hang(runs: RunMaker, undisturbed: dict[int, float], tmp_path: Path) -> None:
    """Catches a restart that loses or repeats steps, a hang that is not seen, and lost stacks."""
    timeout_s = 4.0
    config = runs.write(tmp_path)
    run_dir = tmp_path / "run"
    with runs.started(config, "--preflight=off", f"--heartbeat_timeout_s={timeout_s}") as run:
        wait_for_step(run_dir, SAVE_EVERY + 10)
        os.kill(rank_pid(config, 1), signal.SIGKILL)
        wait_for_events(run_dir, "launch", 2)
        wait_for_step(run_dir, 2 * SAVE_EVERY + 10)
        os.kill(rank_pid(config, 1), signal.SIGSTOP)
        found_s = wait_for_events(run_dir, "hang", 1, timeout_s + 10)
        run.finish(0, timeout_s=90)

    assert found_s < timeout_s + 5
    (hang,) = events(run_dir, "hang")
    assert hang["stacks_of"] == [0, 1]
    for rank in (0, 1):
        stacks = (Path(hang["stacks"]) / f"stacks_rank_{rank}.txt").read_text()
        assert "trainer/loop.py" in stacks or "one_step" in stacks, stacks
    assert [event["what"] for event in events(run_dir, "failure")] == ["crash", "hang"]
    assert events(run_dir, "failure")[0]["rank"] == 1
    assert all(event["lost_steps"] <= SAVE_EVERY + 2 for event in events(run_dir, "failure"))
    assert read_losses(run_dir) == undisturbed
    assert processes_of(config) == []
    assert describe_run(run_dir)["restarts"].startswith("2 after failures (1 crashes, 1 hangs)")


def test_signals(runs: RunMaker, undisturbed: dict[int, float], tmp_path: Path) -> None:
    """Catches a signal that loses steps or leaves ranks behind, and a killed orchestrator's orphans."""
    config = runs.write(tmp_path)
    files = RunFiles(tmp_path / "run")
    for number, (what, expected) in enumerate(
        [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)], start=1
    ):
        with runs.started(config, "--preflight=off") as run:
            # Beats of the launch before are gone once this one stands in the history.
            wait_for_events(files.root, "launch", number)
            wait_for_step(files.root, 30 * number)
            run.signal(what)
            run.finish(expected, timeout_s=30)
            # The kernel tells the agent of a killed orchestrator, which then asks the ranks to stop.
            wait_for(lambda: not processes_of(config), 20, f"no process left after {what.name}")
            status = read_status(files)
            assert status is not None
            assert status.state == "stopped"
            assert status.step == max(read_losses(files.root)) >= 30 * number
            assert (files.checkpoints / f"step_{status.step:08d}").exists()
    with runs.started(config, "--preflight=off") as run:
        run.finish(0, timeout_s=60)
    assert events(files.root, "lock")[-1]["before"] == "its process is gone"
    assert read_losses(files.root) == undisturbed
    assert describe_run(files.root)["state"] == "finished"
    assert describe_run(files.root)["lost steps"] == "0"


def test_gives_up(runs: RunMaker, tmp_path: Path) -> None:
    """Catches endless restarts, and a last error that nobody finds."""
    config = runs.write(tmp_path)
    arguments = ("--preflight=off", "--max_restarts_without_progress=1", "--model.vocab_size=100")
    with runs.started(config, *arguments) as run:
        run.finish(1, timeout_s=90)
    assert len(events(tmp_path / "run", "launch")) == 2
    first = next(line for line in run.output.splitlines() if line.startswith("error:"))
    assert "model.vocab_size=100 must be at least 270" in first
    assert "given up" in describe_run(tmp_path / "run")["state"]


def test_taken_over(runs: RunMaker, tmp_path: Path) -> None:
    """Catches ranks of a job that was cut off, writing beside the job that succeeded it."""
    config = runs.write(tmp_path)
    run_dir = tmp_path / "run"
    with runs.started(config, "--preflight=off") as run:
        wait_for_step(run_dir, 5)
        expire(run_dir / "lock")
        lock = RunLock(run_dir / "lock")
        assert lock.acquire() == "its lease expired"
        run.finish(2, timeout_s=30)
        assert processes_of(config) == []
    assert f"{run_dir}: taken over by process {os.getpid()}" in run.output
    assert events(run_dir, "failure") == []
    lock.release()


def test_second_job_is_refused(runs: RunMaker, tmp_path: Path) -> None:
    """Catches two jobs in one run directory: the second must go within 5 s and write nothing."""
    config = runs.write(tmp_path)
    run_dir = tmp_path / "run"
    lock = RunLock(run_dir / "lock")
    lock.acquire()
    before = sorted(run_dir.rglob("*"))
    started = time.monotonic()
    with runs.started(config) as run:
        run.finish(2, timeout_s=30)
    assert time.monotonic() - started < 5
    assert run.output.count("\n") == 1
    assert f"{run_dir} is in use by process {os.getpid()}" in run.output
    assert sorted(run_dir.rglob("*")) == before


def test_finished_run_is_left_alone(runs: RunMaker, undisturbed: dict[int, float], tmp_path: Path) -> None:
    """Catches a chain of jobs whose later members start a finished run again."""
    config = runs.write(tmp_path)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "status.json").write_text(f'{{"state": "finished", "step": {STEPS}, "time": 1.0}}')
    with runs.started(config) as run:
        run.finish(0, timeout_s=30)
    assert "has finished already" in run.output
    assert events(run_dir, "launch") == []
