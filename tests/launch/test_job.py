"""What a process makes of SLURM's variables; the cluster itself is in test_slurm."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launch.orchestrator import expand_task
from launch.preflight import check_batch
from launch.slurm import Job
from launch.workers import Place
from tests.launch.runs import ROOT, RunMaker
from trainer.config import RunConfig
from trainer.config_io import load_config


def test_array_tasks_have_own_directories(runs: RunMaker, tmp_path: Path) -> None:
    """Catches tasks of an array that meet in one run directory."""
    config = runs.write(tmp_path)
    assert expand_task(["--run.seed=3"], "", config) == ["--run.seed=3"]
    expected = ["--run.seed=7", f"--run.dir={tmp_path}/run_task_7"]
    assert expand_task(["--run.seed={task}"], "7", config) == expected
    assert expand_task(["--run.dir=sweep/{task}"], "7", config) == ["--run.dir=sweep/7"]


def test_job_of_an_array() -> None:
    """Catches a requeue of a whole array instead of one task, and jobs that share a port."""
    variables = {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    job = Job.from_environment(variables)
    assert job is not None
    assert job.name == "12_3"
    other = Job.from_environment({"SLURM_JOB_ID": "16"})
    assert other is not None
    assert other.name == "16"
    assert not {job.port(launch) for launch in range(20)} & {other.port(launch) for launch in range(20)}


@pytest.mark.parametrize("size", ["69m", "386m", "1b"])
def test_scripts_fit_their_configurations(size: str) -> None:
    """Catches a script that asks for nodes among which its configuration's batch cannot be divided."""
    script = ROOT / "launch" / f"cocomix_{size}.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, flags=re.MULTILINE))
    (path,) = re.findall(r"--config (configs/\S+\.yaml) \"\$@\"", text)
    hosts = tuple(f"n{number}" for number in range(int(asked["nodes"])))
    config = load_config(RunConfig, ROOT / path)
    place = Place(None, hosts, int(asked["gpus-per-node"]))
    assert check_batch(config, place).startswith(f"{place.world_size} ranks")
    assert (config.train.batch_size // place.world_size) % config.train.microbatch_size == 0
    assert asked["job-name"] == f"cocomix_{size}"
    assert int(asked["signal"].removeprefix("B:USR1@")) >= 120
