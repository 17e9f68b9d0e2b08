"""Starting and ending the process group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import Agreement
from parallel.world import World, start_world, stop_world
from tests.parallel.toy import ToyRun

ROOT = Path(__file__).parents[2]
LAUNCHED = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def _set_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_plain_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a single process that needs torchrun's variables, and a second start after an end."""
    _set_environment(monkeypatch, {})
    for _ in range(2):
        world = start_world("cpu", timeout_s=30)
        try:
            assert world == World(0, 1, 0, torch.device("cpu"), 30)
            assert world.is_main
            total = torch.ones(2)
            dist.all_reduce(total)
            assert total.tolist() == [1.0, 1.0]
            assert start_world("cpu", timeout_s=30) == world, "a second start must use the same group"
        finally:
            stop_world()
        assert not dist.is_initialized()
    stop_world()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"MASTER_ADDR": None},
            "MASTER_ADDR is not set although RANK and WORLD_SIZE are: start with torchrun",
        ),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set although RANK or WORLD_SIZE is: start with torchrun"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set although RANK or WORLD_SIZE is: start with torchrun"),
        ({"RANK": None}, "RANK is not set although RANK or WORLD_SIZE is: start with torchrun"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set although RANK or WORLD_SIZE is: start with torchrun"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK='-1' in the environment must be a whole number of at least 0"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x' in the environment must be a whole number of at least 0"),
    ],
)
def test_half_an_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], message: str
) -> None:
    """Catches a wait of minutes for a master that nobody named, and torch's stack of errors."""
    values = {name: value for name, value in {**LAUNCHED, **change}.items() if value is not None}
    _set_environment(monkeypatch, values)
    with pytest.raises(ValueError, match=f"^{message}$"):
        start_world("cpu", timeout_s=5)
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that falls back to the CPU although CUDA was asked for."""
    _set_environment(monkeypatch, {})
    with pytest.raises(ValueError, match="run.device=cuda, but this machine has no CUDA device"):
        start_world("cuda", timeout_s=5)
    assert not dist.is_initialized()


def _threads_after_a_run() -> list[str]:
    world = start_world("cpu", timeout_s=30)

    def work() -> None:
        agreement = Agreement(world)
        agreement.exchange(False, False)
        ToyRun(world).train(0, 1)
        agreement.finish()

    work()
    stop_world()
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def test_no_thread_of_the_group_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches groups that something still holds: their threads abort some runs at interpreter exit."""
    _set_environment(monkeypatch, {})
    assert not [name for name in _threads_after_a_run() if "gloo" in name]


WORKER = """
import torch
import torch.distributed as dist
from parallel.config import ParallelConfig
from parallel.collectives import sum_over_ranks
from parallel.mesh import build_mesh
from parallel.world import start_world, stop_world

def work():
    world = start_world("cpu", 30)
    mesh = build_mesh(ParallelConfig(), world)
    total = sum_over_ranks(torch.tensor(world.rank + 1), mesh).item()
    if world.is_main:
        print(world.size, total)

work()
stop_world()
"""


@pytest.mark.dist
def test_torchrun_starts_several_ranks(tmp_path: Path) -> None:
    """Catches a start that works only in the tests' own file store."""
    script = tmp_path / "worker.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{WORKER}")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 3\n"
