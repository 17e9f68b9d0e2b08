"""When to save and when to stop."""

from __future__ import annotations

from trainer.checkpoint.policy import CheckpointPolicy, slurm_deadline
from trainer.config import CheckpointConfig

HOUR = 3600.0


def test_interval_in_steps() -> None:
    """Catches a save at step 0 and a missed multiple."""
    policy = CheckpointPolicy(CheckpointConfig(every_steps=10), start=0.0)
    assert [step for step in range(31) if policy.due_by_step(step)] == [10, 20, 30]


def test_zero_is_off() -> None:
    """Catches a division by zero, and saves nobody asked for."""
    policy = CheckpointPolicy(CheckpointConfig(every_steps=0), start=0.0)
    assert not any(policy.due_by_step(step) for step in range(100))
    assert not policy.due_by_time(now=1e9)
    assert not policy.must_stop(now=1e9)


def test_interval_in_minutes_counts_from_the_last_save() -> None:
    """Catches a timer that is not reset, and one that retries a failing save at every step."""
    policy = CheckpointPolicy(CheckpointConfig(every_steps=0, every_minutes=2.0), start=1000.0)
    assert not policy.due_by_time(now=1119.0)
    assert policy.due_by_time(now=1120.0)
    policy.started(now=1120.0)
    assert not policy.due_by_time(now=1239.0)
    assert policy.due_by_time(now=1240.0)


def test_stops_twice_the_save_time_before_the_deadline() -> None:
    """Catches a job that is killed in the middle of its last save; the slowest recent save counts."""
    policy = CheckpointPolicy(CheckpointConfig(every_steps=1), start=0.0, deadline=HOUR, margin_s=30.0)
    assert not policy.must_stop(now=HOUR - 30.0)
    assert policy.must_stop(now=HOUR - 29.0)
    for seconds in (100.0, 40.0):
        policy.finished(seconds)
    assert policy.save_time_s == 100.0
    assert not policy.must_stop(now=HOUR - 230.0)
    assert policy.must_stop(now=HOUR - 229.0)


def test_one_slow_save_is_forgotten_in_the_end() -> None:
    """Catches a run that ends hours early for ever because the disk was slow once."""
    policy = CheckpointPolicy(CheckpointConfig(every_steps=1), start=0.0)
    policy.finished(5000.0)
    for _ in range(10):
        policy.finished(20.0)
    assert policy.save_time_s == 20.0


def test_slurm_deadline() -> None:
    """Catches a missing or odd variable that ends the run at once."""
    assert slurm_deadline({"SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    for environment in (
        {},
        {"SLURM_JOB_END_TIME": ""},
        {"SLURM_JOB_END_TIME": "0"},
        {"SLURM_JOB_END_TIME": "n/a"},
    ):
        assert slurm_deadline(environment) is None
