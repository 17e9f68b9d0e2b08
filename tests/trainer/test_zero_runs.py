"""Whole runs with the DeepSpeed engine: bf16, moves between the engines, resume; fp32 is in test_layouts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.test_run import StopAfter, losses, train_on_ranks
from tests.trainer.tiny_run import tiny_config
from trainer.config import RunConfig
from trainer.config_io import dump_config
from trainer.main import main, train
from trainer.metrics.json_lines import read_json_lines

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

pytestmark = pytest.mark.usefixtures("deepspeed_before_forks")


def zero(stage: int) -> dict[str, Any]:
    return {"parallel__engine": "deepspeed", "parallel__zero_stage": stage}


def assert_close(run_dir: Path, reference: Path, tolerance: float) -> None:
    ours, theirs = losses(run_dir), losses(reference)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for own, other in zip(ours, theirs, strict=True):
        for key, value in other.items():
            assert (value is None) == (own[key] is None), key
            if value is not None:
                assert own[key] == pytest.approx(value, abs=tolerance), (own["step"], key)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_stays_near_fsdp(stage: int, tiny_world: Path, tmp_path: Path) -> None:
    """Catches bf16 master weights or reductions."""
    precision: dict[str, Any] = {"train__precision": "bf16"}
    train_on_ranks(tiny_config(tiny_world, tmp_path / "fsdp", **precision), 2)
    train_on_ranks(tiny_config(tiny_world, tmp_path / "zero", **precision, **zero(stage)), 2)
    for own, other in zip(losses(tmp_path / "zero"), losses(tmp_path / "fsdp"), strict=True):
        for key in ("loss_ntp", "loss_concept"):
            assert own[key] == pytest.approx(other[key], abs=1e-2)


@pytest.mark.dist
def test_a_run_moves_through_all_engines(tiny_world: Path, tmp_path: Path) -> None:
    """Catches checkpoints that only their own engine or world size can continue."""
    flat: dict[str, Any] = {"optim__min_lr": 3e-3, "validation__every_steps": 2, "checkpoint__every_steps": 0}
    layouts: list[tuple[dict[str, Any], int]] = [
        ({}, 2),
        (zero(3), 1),
        (zero(1), 2),
        (zero(2), 3),
        (zero(3), 2),
        ({}, 1),
    ]
    for index, (layout, num_ranks) in enumerate(layouts):
        steps = 2 * (index + 1)
        config = tiny_config(tiny_world, tmp_path / "parts", train__steps=steps, **flat, **layout)
        train_on_ranks(config, num_ranks)
    train_on_ranks(tiny_config(tiny_world, tmp_path / "whole", train__steps=12, **flat), 1)
    assert_close(tmp_path / "parts", tmp_path / "whole", 1e-5)


def published(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()


def stop_two_ranks(config: RunConfig, polls: int) -> None:
    def one_rank(world: World) -> str:
        return train(config, world, StopAfter(polls))

    assert run_ranks(one_rank, 2) == ["stopped", "stopped"]


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumed_run_equals_the_uninterrupted_one_bitwise(
    stage: int, tiny_world: Path, tmp_path: Path
) -> None:
    """Catches state that only deepspeed's own checkpoints would hold."""
    train_on_ranks(tiny_config(tiny_world, tmp_path / "whole", **zero(stage)), 2)
    parts = tiny_config(tiny_world, tmp_path / "parts", checkpoint__every_steps=0, **zero(stage))
    stop_two_ranks(parts, 4)
    train_on_ranks(parts, 2)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert published(tmp_path / "parts") == published(tmp_path / "whole")


@pytest.mark.dist
def test_the_program_runs_quietly_and_ends_well(tiny_world: Path, tmp_path: Path) -> None:
    """Catches deepspeed's chatter in the output, and groups that it keeps beyond the end."""
    path = tmp_path / "config.yaml"
    config = tiny_config(
        tiny_world, tmp_path / "run", train__steps=3, train__precision="bf16", log__sample_prompts=["the"]
    )
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "trainer.main", "--config", str(path)]
    flags = ["--parallel.engine=deepspeed", "--parallel.zero_stage=1"]
    ended = subprocess.run(
        [*command, *flags], cwd=Path(__file__).parents[2], capture_output=True, text=True, env={**os.environ}
    )
    assert ended.returncode == 0, ended.stderr
    for word in ("DeepSpeed", "deepspeed", "MA ", "Warning", "bf16_optimizer"):
        assert word not in ended.stdout + ended.stderr, ended.stdout + ended.stderr
    assert read_json_lines(tmp_path / "run" / "events.jsonl")[-1]["kind"] == "finish"


def test_the_autoencoder_is_refused(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches decoder rows that are normalised in a copy which ZeRO overwrites."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config(tiny_world, tmp_path / "run", "sae")))
    flags = ["--parallel.engine=deepspeed", "--parallel.zero_stage=1"]
    assert main(["--config", str(path), *flags]) == 2
    error = capsys.readouterr().err
    assert "parallel.engine=deepspeed does not fit objective.name=sae" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
