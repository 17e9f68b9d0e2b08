"""What is stored besides tensors, and which changed configuration may resume."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.checkpoint.state import (
    RunState,
    capture_rng,
    check_resume,
    code_version,
    compare_configs,
    restore_rng,
)
from trainer.checkpoint.store import CheckpointError


def _config() -> dict[str, Any]:
    return {
        "run": {"dir": "runs/a", "seed": 1, "device": "auto"},
        "data": {"dir": "shards", "seq_len": 64, "seed": 0, "lanes": 8, "prefetch_steps": 2},
        "model": {"d_model": 64, "n_layer": 2},
        "concepts": {"sae": "sae.pt", "top_k": 4},
        "sae": None,
        "objective": {"name": "cocomix", "concept_weight": 0.1},
        "optim": {"lr": 6e-4, "betas": [0.9, 0.95]},
        "train": {"steps": 100, "batch_size": 8, "microbatch_size": 2, "precision": "fp32"},
        "parallel": {"dp_shard": -1},
        "log": {"every": 10},
        "checkpoint": {"every_steps": 10},
        "validation": {"every_steps": 10},
    }


HARD = [
    ("model.d_model", 128),
    ("concepts.top_k", 5),
    ("sae", {"layer": 1}),
    ("objective.concept_weight", 0.2),
    ("optim.lr", 1e-4),
    ("optim.betas", [0.9, 0.99]),
    ("data.dir", "other"),
    ("data.seed", 1),
    ("data.lanes", 16),
    ("run.seed", 2),
    ("train.batch_size", 16),
    ("train.precision", "bf16"),
    ("surprise.key", 1),
]
SOFT = [
    ("train.steps", 200),
    ("train.microbatch_size", 4),
    ("parallel.dp_shard", 2),
    ("log.every", 1),
    ("checkpoint.every_steps", 5),
    ("validation.every_steps", 5),
    ("run.dir", "runs/b"),
    ("run.device", "cpu"),
    ("data.prefetch_steps", 0),
]


def _changed(key: str, value: Any) -> dict[str, Any]:
    config = _config()
    section, _, name = key.partition(".")
    if name:
        config[section] = {**config.get(section, {}), name: value}
    else:
        config[section] = value
    return config


@pytest.mark.parametrize(("key", "value"), HARD)
def test_hard_difference_refuses_in_one_line(key: str, value: Any) -> None:
    """Catches a run that goes on with another model, objective, optimizer or data than it began with."""
    new = _changed(key, value)
    with pytest.raises(CheckpointError, match="run.dir") as error:
        check_resume(_config(), new)
    message = str(error.value)
    assert key in message
    assert "\n" not in message
    hard, soft = compare_configs(_config(), new)
    assert len(hard) == 1
    assert soft == []
    assert repr(hard[0].old) in message
    assert repr(hard[0].new) in message


@pytest.mark.parametrize(("key", "value"), SOFT)
def test_soft_difference_resumes_and_is_named(key: str, value: Any) -> None:
    """Catches a resume that is refused because of its length, layout or logging."""
    (difference,) = check_resume(_config(), _changed(key, value))
    assert difference.key == key
    assert difference.new == value


def test_sources_are_compared_by_name() -> None:
    """Catches a limit that cannot be raised for a longer run, and a weight that can be changed."""
    old, new = _config(), _config()
    old["data"]["sources"] = [
        {"name": "a", "weight": 1.0, "max_epochs": 2},
        {"name": "b", "weight": 1.0, "max_epochs": 0},
    ]
    new["data"]["sources"] = [{**item, "max_epochs": 9} for item in old["data"]["sources"]]
    assert [str(item) for item in check_resume(old, new)] == [
        "data.sources.a.max_epochs: 2 in the checkpoint, 9 now",
        "data.sources.b.max_epochs: 0 in the checkpoint, 9 now",
    ]
    new["data"]["sources"][1]["weight"] = 2.0
    with pytest.raises(CheckpointError, match=r"data\.sources\.b\.weight: 1\.0 in the checkpoint, 2\.0 now"):
        check_resume(old, new)
    new["data"]["sources"] = old["data"]["sources"][:1]
    with pytest.raises(CheckpointError, match=r"data\.sources\.b\.name: 'b' in the checkpoint, '\(absent\)'"):
        check_resume(old, new)


def test_equal_configurations_have_no_difference() -> None:
    """Catches tuples against lists and absent against null sections counting as differences."""
    new = _config()
    new["optim"]["betas"] = (0.9, 0.95)
    del new["sae"]
    assert compare_configs(_config(), new) == ([], [])


def test_run_state_survives_json() -> None:
    """Catches a field that is lost, or of a type that JSON cannot hold."""
    state = RunState(step=3, tokens=192, data={"row": 24, "seed": 0}, more={"spike": [1.0, 2.0]})
    assert RunState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_run_state_of_another_version_is_refused() -> None:
    """Catches a field that silently takes its default on resume."""
    with pytest.raises(CheckpointError, match="this version expects"):
        RunState.from_json({"step": 1})


def test_random_generators_continue_exactly() -> None:
    """Catches a generator that is not stored, or not exactly (the normal draws have carried-over state)."""

    def draw() -> list[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.randint(1 << 30),
            np.random.normal(),
            torch.randn(3).tolist(),
        ]

    draw()
    state = json.loads(json.dumps(capture_rng()))
    expected = [draw() for _ in range(3)]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    restore_rng(state)
    assert [draw() for _ in range(3)] == expected


def test_code_version_is_never_empty() -> None:
    """Catches a crash where there is no git and no installed package."""
    assert code_version()
    inside = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    if inside.returncode == 0:
        tracked = ["git", "-C", str(Path(__file__).parents[3]), "ls-files", "trainer/checkpoint/state.py"]
        if subprocess.run(tracked, capture_output=True, check=True).stdout:
            assert code_version().startswith(inside.stdout.strip())
