"""Gradients that are not finite and losses that spike, in real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from data.batch import Batch
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.test_run import losses, train_on_ranks
from tests.trainer.tiny_run import tiny_config
from trainer.config import HealthConfig, RunConfig
from trainer.health import HealthMonitor, Skipped, Spike, TrainingDiverged
from trainer.main import train
from trainer.metrics.json_lines import read_json_lines
from trainer.objective import LossTerms, NextToken
from trainer.stop import StopRequest


def train_with(
    objective: Any, config: RunConfig, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Train with an objective that misbehaves; everything else is real."""
    monkeypatch.setattr("trainer.build.NextToken", objective)

    def one_rank(world: World) -> str:
        with StopRequest() as stop:
            return train(config, world, stop)

    return run_ranks(one_rank, num_ranks)


def poisoned(calls: set[int], value: float, rank: int = 0) -> type[NextToken]:
    """Next-token prediction whose n-th training microbatch on one rank has its loss multiplied."""

    class Poisoned(NextToken):
        def __init__(self, document_end: int | None = None) -> None:
            super().__init__(document_end)
            self.calls = 0

        def __call__(self, model: nn.Module, batch: Batch, *, step: int, detail: bool) -> LossTerms:
            terms = super().__call__(model, batch, step=step, detail=detail)
            if not model.training:
                return terms
            self.calls += 1
            if self.calls in calls and torch.distributed.get_rank() == rank:
                sums = {**terms.sums, "ntp_nats": terms.sums["ntp_nats"] * value}
                return LossTerms(terms.loss * value, sums)
            return terms

    return Poisoned


@pytest.mark.dist
def test_a_nan_on_one_rank_skips_the_step_on_all(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches one rank that updates while another does not, and a skip that nobody hears of."""
    config = tiny_config(tiny_world, tmp_path / "run", "ntp", train__microbatch_size=3)
    assert train_with(poisoned({5, 6}, float("nan"), rank=1), config, 2, monkeypatch) == ["finished"] * 2
    events = read_json_lines(tmp_path / "run" / "events.jsonl")
    skips = [(event["step"], event["in_a_row"]) for event in events if event["kind"] == "skip"]
    assert skips == [(5, 1), (6, 2)]
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert records[4]["grad_norm"] is None
    assert all(record["loss_ntp"] is not None for record in records[6:])


@pytest.mark.dist
def test_too_many_skipped_steps_end_the_run_with_the_last_checkpoint_intact(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that burns GPU hours without ever updating again."""
    config = tiny_config(
        tiny_world, tmp_path / "run", "ntp", train__microbatch_size=6, health__max_skipped_steps=3
    )

    def one_rank(world: World) -> str:
        with pytest.raises(TrainingDiverged, match=r"3 steps in a row up to step 8 had non-finite gradients"):
            train(config, world, StopRequest())
        return "diverged"

    monkeypatch.setattr("trainer.build.NextToken", poisoned(set(range(6, 100)), float("nan")))
    assert run_ranks(one_rank, 1) == ["diverged"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000004"]
    (fault,) = [e for e in read_json_lines(tmp_path / "run" / "events.jsonl") if e["kind"] == "fault"]
    assert (fault["what"], fault["step"]) == ("diverged", 8)


@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_spike_rewinds_and_the_run_replays_without_its_batches(
    num_ranks: int, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rewind that keeps damaged weights, repeats the batches, or cannot be reproduced."""
    changes: dict[str, Any] = {
        "train__steps": 14,
        "train__microbatch_size": 6 // num_ranks,
        "health__spike_sigmas": 8.0,
        "health__spike_window": 8,
    }
    config = tiny_config(tiny_world, tmp_path / "spiky", "ntp", **changes)
    outcomes = train_with(poisoned({10}, 50.0), config, num_ranks, monkeypatch)
    assert outcomes == ["finished"] * num_ranks
    monkeypatch.undo()
    (skip,) = [e for e in read_json_lines(tmp_path / "spiky" / "events.jsonl") if e["kind"] == "skip"]
    assert (skip["what"], skip["step"], skip["resumed_step"]) == ("loss spike", 10, 8)
    # Steps 9, 10 and 11, which was under way when step 10 was judged.
    assert skip["rows"] == [8 * 6, 11 * 6]
    replayed = tiny_config(tiny_world, tmp_path / "replay", "ntp", data__skip=[skip["rows"]], **changes)
    train_on_ranks(replayed, num_ranks)
    assert losses(tmp_path / "replay") == losses(tmp_path / "spiky")


def test_monitor_judges_one_step_late_and_keeps_its_window_over_a_resume() -> None:
    """Catches a window that forgets, a spike that enters the window, and a verdict on the wrong step."""
    config = HealthConfig(spike_sigmas=3.0, spike_window=8)
    monitor = HealthMonitor(config)
    one = torch.tensor(1.0)
    values = [5.0, 5.1, 4.9, 5.0, 5.05, 4.95]
    for step, value in enumerate(values, start=1):
        assert monitor.submit(step, one, torch.tensor(value, dtype=torch.float64)) is None
    assert monitor.finish() is None
    other = HealthMonitor(config)
    other.load_state_dict(monitor.state_dict())
    for watcher in (monitor, other):
        assert watcher.submit(7, one, torch.tensor(9.0, dtype=torch.float64)) is None
        verdict = watcher.submit(8, one, torch.tensor(5.0, dtype=torch.float64))
        assert isinstance(verdict, Spike)
        assert (verdict.step, verdict.loss) == (7, 9.0)
        assert watcher.finish() is None
    assert monitor.state_dict()["losses"] == [*values, 5.0]


def test_skips_in_a_row_are_counted_and_reset() -> None:
    """Catches an abort after n skips in total instead of n in a row."""
    monitor = HealthMonitor(HealthConfig(max_skipped_steps=2))
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    verdicts = [monitor.submit(step, norm, None) for step, norm in enumerate([nan, one, nan, one, one])]
    assert verdicts == [None, Skipped(0, 1), None, Skipped(2, 1), None]
    monitor.submit(6, nan, None)
    monitor.submit(7, nan, None)
    with pytest.raises(TrainingDiverged, match="2 steps in a row up to step 7"):
        monitor.finish()
