"""Whole runs through the code behind ``trainer.main``: resume, ranks, objectives, signals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.tiny_run import tiny_config, with_changes
from trainer.config import RunConfig
from trainer.config_io import dump_config
from trainer.main import EXIT_STOPPED, main, train
from trainer.metrics.json_lines import read_json_lines
from trainer.model.cocomix import CoCoMix
from trainer.model.formats import load_model
from trainer.stop import StopRequest

LOSSES = ("loss_ntp", "loss_concept", "sae_nmse", "grad_norm", "val_loss_ntp", "val_sae_nmse")


def losses(run_dir: Path) -> list[dict[str, Any]]:
    """What must be equal between two runs: steps, losses and gradient norms, as written."""
    records = read_json_lines(run_dir / "metrics.jsonl")
    return [{key: record.get(key) for key in ("step", "tokens", *LOSSES)} for record in records]


def train_on_ranks(config: RunConfig, num_ranks: int) -> None:
    def one_rank(world: World) -> str:
        with StopRequest() as stop:
            return train(config, world, stop)

    assert set(run_ranks(one_rank, num_ranks, timeout_s=120)) == {"finished"}


class StopAfter(StopRequest):
    """A request to stop that arrives while a given step is made."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self._polls = polls

    @property
    def requested(self) -> bool:
        self._polls -= 1
        return self._polls < 0


def stop_after(config: RunConfig, polls: int) -> None:
    def one_rank(world: World) -> str:
        return train(config, world, StopAfter(polls))

    assert run_ranks(one_rank, 1) == ["stopped"]


@pytest.mark.dist
@pytest.mark.parametrize("objective", ["ntp", "cocomix", "sae"])
def test_resumed_run_equals_the_uninterrupted_one_bitwise(
    objective: str, tiny_world: Path, tmp_path: Path
) -> None:
    """Catches any state that a checkpoint forgets: moments, data cursor, dead-latent counters, schedule."""
    whole = tiny_config(tiny_world, tmp_path / "whole", objective)
    train_on_ranks(whole, 1)
    parts = tiny_config(tiny_world, tmp_path / "parts", objective, checkpoint__every_steps=0)
    stop_after(parts, 2)
    stop_after(parts, 3)
    train_on_ranks(parts, 1)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [record["step"] for record in losses(tmp_path / "whole")] == list(range(1, 13))
    kinds = [event["kind"] for event in read_json_lines(tmp_path / "parts" / "events.jsonl")]
    assert kinds == ["start", "save", "preempt", "resume", "save", "preempt", "resume", "save", "finish"]
    name = "sae.pt" if objective == "sae" else "model.safetensors"
    published = [(tmp_path / run / "model" / name).read_bytes() for run in ("whole", "parts")]
    assert objective == "sae" or published[0] == published[1]


@pytest.mark.dist
@pytest.mark.parametrize("objective", ["ntp", "cocomix", "sae"])
def test_two_ranks_train_as_one(objective: str, tiny_world: Path, tmp_path: Path) -> None:
    """Catches a loss or gradient that is averaged over ranks or microbatches instead of over tokens."""
    for num_ranks in (1, 2):
        # Three rows per rank in microbatches of two: the last one is short.
        train_on_ranks(tiny_config(tiny_world, tmp_path / f"{num_ranks}", objective), num_ranks)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 12
    for ours, theirs in zip(two, one, strict=True):
        for key, value in theirs.items():
            assert (value is None) == (ours[key] is None)
            if value is not None:
                assert ours[key] == pytest.approx(value, abs=1e-5, rel=1e-5), (ours["step"], key)


@pytest.mark.dist
def test_resume_at_another_world_size_goes_on(tiny_world: Path, tmp_path: Path) -> None:
    """Catches a checkpoint or data cursor that depends on the number of ranks: 3 -> 1 -> 2."""
    train_on_ranks(tiny_config(tiny_world, tmp_path / "whole"), 1)
    for steps, num_ranks in ((4, 3), (8, 1), (12, 2)):
        # The schedule is that of 12 steps throughout: warm-up, then constant.
        config = tiny_config(
            tiny_world, tmp_path / "parts", train__steps=steps, optim__min_lr=3e-3, validation__every_steps=4
        )
        train_on_ranks(config, num_ranks)
    reference = tiny_config(tiny_world, tmp_path / "flat", optim__min_lr=3e-3, validation__every_steps=4)
    train_on_ranks(reference, 1)
    for ours, theirs in zip(losses(tmp_path / "parts"), losses(tmp_path / "flat"), strict=True):
        assert ours["loss_ntp"] == pytest.approx(theirs["loss_ntp"], abs=1e-5)
        assert ours["loss_concept"] == pytest.approx(theirs["loss_concept"], abs=1e-5)


@pytest.mark.dist
def test_training_learns_and_publishes_what_it_validated(tiny_world: Path, tmp_path: Path) -> None:
    """Catches a run whose published weights are not those it measured."""
    config = tiny_config(tiny_world, tmp_path / "run", train__steps=40, optim__lr=1e-2)
    train_on_ranks(config, 2)
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["loss_ntp"] < records[0]["loss_ntp"] - 1
    assert records[-1]["loss_concept"] < records[0]["loss_concept"]
    assert records[-1]["val_concept_recall_at_A"] > records[5]["val_concept_recall_at_A"]
    student = load_model(tmp_path / "run")
    assert isinstance(student, CoCoMix)
    assert validation_loss(student, config) == pytest.approx(records[-1]["val_loss_ntp"], abs=1e-5)


def validation_loss(model: torch.nn.Module, config: RunConfig) -> float:
    """Mean next-token loss over all validation windows, computed without the training code."""
    from data.loader import validation_batches

    total, count = 0.0, 0
    for batch in validation_batches(config.data, share=1.0, rows=4, rank=0, world_size=1):
        rows = batch.tokens[: batch.num_rows].long()
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        ).item()
        count += rows[:, 1:].numel()
    return total / count


def start_process(config: RunConfig, path: Path) -> subprocess.Popen[str]:
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "trainer.main", "--config", str(path)]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        records = read_json_lines(run_dir / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"step {step}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_says_to_go_on(number: signal.Signals, tiny_world: Path, tmp_path: Path) -> None:
    """Catches a signal that loses steps, that leaves no checkpoint or that looks like a failure."""
    run_dir = tmp_path / "run"
    config = tiny_config(tiny_world, run_dir, "ntp", train__steps=100_000, checkpoint__every_steps=0)
    process = start_process(config, tmp_path / "config.yaml")
    try:
        wait_for_step(run_dir, 3, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED, errors
    last = read_json_lines(run_dir / "metrics.jsonl")[-1]["step"]
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == [f"step_{last:08d}"]
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", last)
    assert read_json_lines(run_dir / "events.jsonl")[-1]["reason"] == number.name


@pytest.mark.slow
def test_killed_run_continues_and_logs_what_the_uninterrupted_run_logs(
    tiny_world: Path, tmp_path: Path
) -> None:
    """Catches records lost or doubled by SIGKILL between two checkpoints."""
    changes: dict[str, Any] = {"train__steps": 60, "checkpoint__every_steps": 10}
    assert run_in_child(tiny_config(tiny_world, tmp_path / "whole", **changes)) == 0
    config = tiny_config(tiny_world, tmp_path / "killed", **changes)
    for step in (13, 37):
        process = start_process(config, tmp_path / "config.yaml")
        wait_for_step(tmp_path / "killed", step, process)
        process.kill()
        process.communicate()
    assert run_in_child(config) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def run_in_child(config: RunConfig) -> int:
    """Run as ``trainer.main`` does, in a fork: this process must stay without groups and threads."""
    return int(run_ranks(lambda world: 0 if train(config, world, StopRequest()) == "finished" else 1, 1)[0])


def main_in_child(arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of the command line, in a fork."""

    def call(world: World) -> tuple[int, str]:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = main(arguments)
        return code, errors.getvalue()

    code, text = run_ranks(call, 1)[0]
    return int(code), str(text)


def test_a_finished_run_is_left_alone(tiny_world: Path, tmp_path: Path) -> None:
    """Catches a second start that trains on, or that forgets to publish."""
    config = tiny_config(tiny_world, tmp_path / "run", "ntp", train__steps=3)
    assert run_in_child(config) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    assert run_in_child(config) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_the_last_checkpoint_is_committed_before_the_run_counts_as_finished(
    tiny_world: Path, tmp_path: Path
) -> None:
    """Catches a background save of the last step that nobody waits for."""
    config = tiny_config(tiny_world, tmp_path / "run", "ntp", train__steps=4, checkpoint__every_steps=2)
    assert run_in_child(config) == 0
    events = read_json_lines(tmp_path / "run" / "events.jsonl")
    assert [(event["kind"], event.get("step")) for event in events[-2:]] == [("save", 4), ("finish", 4)]


def test_log_every_and_validation_steps_are_recorded(tiny_world: Path, tmp_path: Path) -> None:
    """Catches a missing last record, and validation values on a record without losses."""
    config = tiny_config(
        tiny_world, tmp_path / "run", "ntp", log__every=5, validation__every_steps=4, train__steps=11
    )
    assert run_in_child(config) == 0
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [4, 5, 8, 10, 11]
    assert [record["step"] for record in records if "val_loss_ntp" in record] == [4, 8, 11]
    for record in records:
        assert record["tokens"] == record["step"] * 6 * 16
        assert record["loss_ntp"] > 0
        assert record["loss_concept"] is None


def test_bf16_keeps_fp32_masters_and_learns(tiny_world: Path, tmp_path: Path) -> None:
    """Catches bf16 weights in the optimizer: small updates would be lost."""
    config = tiny_config(tiny_world, tmp_path / "run", train__precision="bf16", train__steps=20)
    assert run_in_child(config) == 0
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["loss_ntp"] < records[0]["loss_ntp"]
    assert load_model(tmp_path / "run").wte.weight.dtype == torch.float32


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"train__batch_size": 6, "parallel__dp_shard": 4}, "does not fit the 1 processes"),
    ({"model__vocab_size": 289}, "model.vocab_size=289 must be at least 290"),
    ({"data__seq_len": 15}, "data.seq_len=15 does not divide chunk_tokens=64"),
    ({"concepts__num_concepts": 38}, "num_concepts=38"),
    ({"concepts__sae_layer": 2}, "concepts.sae_layer=2 must be from 0 to 1"),
    ({"concepts__teacher": "nowhere"}, "nowhere: model not found"),
    ({"concepts__sae": "nowhere.pt"}, "nowhere.pt"),
    ({"data__dir": "nowhere"}, "nowhere"),
    ({"run__device": "cuda"}, "run.device=cuda"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_what_does_not_fit_is_refused_in_one_line(
    changes: dict[str, Any],
    message: str,
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    """Catches a traceback, a silent fallback, or a run directory left half-written."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config(tiny_world, tmp_path / "run", **changes)))
    code, error = main_in_child(["--config", str(path)])
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_configuration_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    """Catches weights of one run continued with the settings of another."""
    config = tiny_config(tiny_world, tmp_path / "run", "ntp", train__steps=2)
    assert run_in_child(config) == 0
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(with_changes(config, optim__lr=5e-3)))
    code, error = main_in_child(["--config", str(path)])
    assert code == 2
    assert "optim.lr: 0.003" in error
    assert "0.005 now" in error
    assert "run.dir" in error
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_setting_that_may_change_is_warned_about(tiny_world: Path, tmp_path: Path) -> None:
    """Catches a silent change of the length or the layout of a run."""
    config = tiny_config(tiny_world, tmp_path / "run", "ntp", train__steps=2)
    assert run_in_child(config) == 0
    assert run_in_child(with_changes(config, train__steps=3, log__every=2)) == 0
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "train.steps: 2 in the checkpoint, 3 now" in log
    assert "log.every: 1 in the checkpoint, 2 now" in log


def test_a_world_size_that_does_not_divide_the_batch_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    """Catches ranks that silently train on batches of different size."""
    config = tiny_config(tiny_world, tmp_path / "run", "ntp")

    def refused(world: World) -> str:
        with pytest.raises(ValueError, match=r"train.batch_size=6 must be a multiple of the 4 data-parallel"):
            train(config, world, StopRequest())
        return "refused"

    assert run_ranks(refused, 4) == ["refused"] * 4
