"""What can be known before the first step is said before it."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from launch.gpus import Gpu, parse_gpus
from launch.preflight import check, check_batch, check_concepts, check_disk, check_gpus, main
from launch.workers import Place
from tests.launch.runs import ROOT, RunMaker
from tests.trainer.tiny_run import tiny_config, write_tiny_world
from trainer.config import RunConfig
from trainer.config_io import load_config


def place(num_hosts: int, nproc_per_node: int) -> Place:
    return Place(None, tuple(f"n{number}" for number in range(num_hosts)), nproc_per_node)


@pytest.mark.dist
@pytest.mark.slow
def test_good_run_passes(runs: RunMaker, tmp_path: Path) -> None:
    """Catches checks that refuse a good run, and an all-reduce that is not made."""
    config = runs.write(tmp_path)
    command = [sys.executable, "-m", "launch.preflight", f"--config={config}", "--nproc_per_node=2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 ranks (cpu): 4 MiB in" in result.stdout
    assert "FAIL" not in result.stdout


def test_failures_come_first(runs: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a failed check that drowns among good ones, and ranks that are started in spite of it."""
    config = runs.write(tmp_path)
    arguments = [f"--config={config}", "--nproc_per_node=5", f"--data.dir={tmp_path}/nowhere"]
    assert main(arguments) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "train.batch_size=24 must be a multiple of the 5 data-parallel ranks" in lines[0]
    assert f"{tmp_path}/nowhere: no such folder" in lines[1]
    assert not any("FAIL" in line for line in lines[2:])
    assert not (tmp_path / "run").exists()


def test_a_run_that_reads_its_targets_needs_them_and_no_teacher(tmp_path: Path) -> None:
    """Catches a run that waits in a queue for labels that nobody has made."""
    changes = {"concepts__source": "cache", "concepts__teacher": "nowhere", "concepts__sae": "nowhere"}
    world = write_tiny_world(tmp_path / "world")
    found = check("teacher, SAE", partial(check_concepts, tiny_config(world, tmp_path / "run", **changes)))
    assert found.outcome == "FAIL"
    assert "no labels.json, so there are no finished labels; python -m trainer.concepts.label" in str(found)


def test_short_shard(
    runs: RunMaker, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches data that are found damaged only when the run comes to them."""
    copy = tmp_path / "shards"
    copy.mkdir()
    for source in shards.iterdir():
        (copy / source.name).write_bytes(source.read_bytes())
    shard = next(copy.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    config = runs.write(tmp_path / "run")
    assert main([f"--config={config}", "--nproc_per_node=1", f"--data.dir={copy}", "--quick"]) == 2
    assert shard.name in capsys.readouterr().out.splitlines()[0]


def test_other_run_in_directory(runs: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run directory of another run, which the trainer would refuse on every node later."""
    config = runs.write(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.read_text().replace("lr: 1e-2", "lr: 2e-2"))
    assert main([f"--config={config}", "--nproc_per_node=1", "--quick"]) == 2
    assert "cannot resume: optim.lr" in capsys.readouterr().out.splitlines()[0]


def test_mesh_and_batch(runs: RunMaker, tmp_path: Path) -> None:
    """Catches world sizes that fit neither mesh nor batch."""
    path = runs.write(tmp_path)
    assert "6 ranks on 2 nodes, 4 sequences" in check_batch(load_config(RunConfig, path), place(2, 3))
    for override, ranks in (("--parallel.dp_shard=4", 2), ("--parallel.dp_replicate=2", 3)):
        with pytest.raises(ValueError, match=f"does not make {ranks} ranks"):
            check_batch(load_config(RunConfig, path, [override]), place(1, ranks))


def test_disk(runs: RunMaker, tmp_path: Path) -> None:
    """Catches a run that fills its disk with the first checkpoints."""
    path = runs.write(tmp_path)
    assert "GB free" in check_disk(load_config(RunConfig, path))
    huge = load_config(RunConfig, path, ["--model.d_model=400000", "--model.n_layer=100"])
    failed = check("disk", lambda: check_disk(huge))
    assert failed.outcome == "FAIL"
    assert "lower checkpoint.keep_last" in failed.text


def test_gpus() -> None:
    """Catches a GPU that somebody else holds or that is too hot, and one that says nothing."""
    listed = parse_gpus("0, 4, 81559, 34\n1, 5, 81559, [N/A]\n")
    assert listed == [Gpu(0, 4, 81559, 34), Gpu(1, 5, 81559, 0)]
    assert check_gpus([("n1", gpu) for gpu in listed]).startswith("2 GPUs")
    for gpu, expected in (
        (Gpu(3, 60000, 81559, 30), "60000 of 81559 MiB"),
        (Gpu(3, 0, 81559, 91), "91 degrees"),
    ):
        with pytest.raises(ValueError, match=f"n7 GPU 3: {expected}"):
            check_gpus([("n7", gpu)])
