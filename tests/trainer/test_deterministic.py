"""The same bits again, on the devices that this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.test_run import losses
from tests.trainer.tiny_run import tiny_config
from trainer.config import RunConfig
from trainer.config_io import dump_config

ROOT = Path(__file__).parents[2]


def _train(config: RunConfig) -> None:
    """In a process of its own: CUDA must not be used before ranks are forked here."""
    path = Path(config.run.dir).with_suffix(".yaml")
    path.write_text(dump_config(config))
    # The first product decides how cuBLAS works: it must find what the run sets itself.
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    subprocess.run(
        [sys.executable, "-m", "trainer.main", "--config", str(path)],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        timeout=240,
    )


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_resumed_from_an_old_checkpoint_gives_the_same_bits(
    device: str, tiny_world: Path, tmp_path: Path
) -> None:
    """Catches sums whose order differs from run to run, on a GPU in bf16 with targets on a second stream."""
    config = tiny_config(
        tiny_world,
        tmp_path / "run",
        run__device=device,
        run__deterministic=True,
        train__precision="bf16" if device == "cuda" else "fp32",
        concepts__ahead=True,
        checkpoint__keep_last=3,
    )
    _train(config)
    first = losses(tmp_path / "run")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    _train(config)
    assert losses(tmp_path / "run") == first
    assert [record["step"] for record in first] == list(range(1, 13))
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert '"resume"' in events
