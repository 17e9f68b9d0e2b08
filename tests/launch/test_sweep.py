"""A sweep: its plan, and a tiny one from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.stages import Spent, estimate_s
from launch.sweep import SettingConfig, SweepConfig, main, plan
from tests.launch.test_demo import TINY, config_of
from trainer.config_io import load_config

ROOT = Path(__file__).parents[2]


def test_the_published_matrix_is_a_fair_one(tmp_path: Path) -> None:
    """Catches settings that differ in data, length or optimizer, and seeds that change one thing only."""
    sweep = load_config(SweepConfig, ROOT / "configs" / "sweeps" / "demo.yaml")
    assert len(sweep.seeds) >= 3
    stages = plan(sweep, tmp_path / "demo", tmp_path / "sweep", 1)
    students = stages[3:-1]
    assert len(students) == len(sweep.seeds) * len(sweep.settings)
    same = {replace(config_of(stage), run=config_of(students[0]).run) for stage in students}
    assert len(same) == len(students), "two settings are one"
    for stage in students:
        config, first = config_of(stage), config_of(students[0])
        assert config.run.seed == config.data.seed == int(stage.name.rpartition("seed")[2])
        for section in ("train", "optim", "validation"):
            assert getattr(config, section) == getattr(first, section), (stage.name, section)
        assert config.data.dir == str(tmp_path / "demo" / "data")
        if config.concepts is not None:
            assert config.concepts.teacher == str(tmp_path / "demo" / "teacher" / "model")
    baseline = sweep.settings[0].name
    compared = [Path(text).name for text in stages[-1].command[2:-2]]
    assert [name.startswith(f"{baseline}_seed") for name in compared] == sorted(
        (name.startswith(f"{baseline}_seed") for name in compared), reverse=True
    )


@pytest.mark.slow
def test_a_tiny_sweep_from_end_to_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches stages that do not fit together, and finished runs that are trained again."""
    path = tmp_path / "sweep.yaml"
    path.write_text("seeds: [1, 2]\nsettings:\n  - {name: ntp, config: demo_ntp}\n")
    base = plan(load_config(SweepConfig, path), tmp_path / "demo", tmp_path / "out", 1, TINY)
    monkeypatch.setattr("launch.sweep.foundation", lambda out: base[:1])  # no teacher is needed here
    places = ["--demo", str(tmp_path / "demo"), "--out", str(tmp_path / "out")]
    arguments = [str(path), *places, "--processes", "1", *TINY]
    assert main(arguments) == 0
    shown = capfd.readouterr().out
    assert "ntp_seed2: ntp with seed 2 (about " in shown
    table = (tmp_path / "out" / "comparison" / "seeds.md").read_text()
    assert table in shown
    assert "± " in table
    found = json.loads((tmp_path / "out" / "comparison" / "comparison.json").read_text())
    assert found["settings"] == {"ntp": ["ntp_seed1", "ntp_seed2"]}
    losses = [found["runs"][name]["final_loss"] for name in ("ntp_seed1", "ntp_seed2")]
    assert losses[0] != losses[1]
    assert main(arguments) == 0
    again = capfd.readouterr().out
    assert again.count("finished before") == 4
    assert table in again


def test_what_is_left_is_estimated(tmp_path: Path) -> None:
    """Catches estimates that take one setting's time for another's, or count what is done."""
    sweep = SweepConfig(
        seeds=(1, 2),
        settings=(SettingConfig(name="a", config="demo_ntp"), SettingConfig(name="b", config="demo_ntp")),
    )
    stages = plan(sweep, tmp_path, tmp_path, 1)
    assert [stage.name for stage in stages[3:7]] == ["a_seed1", "b_seed1", "a_seed2", "b_seed2"]
    assert estimate_s(stages, stages, {"data": Spent(500.0, 0.0)}) is None
    assert estimate_s(stages[4:], stages, {"a_seed1": Spent(10.0, 0.0)}) == 30.0
    spent = {"a_seed1": Spent(10.0, 0.0), "b_seed1": Spent(30.0, 0.0), "a_seed2": Spent(20.0, 0.0)}
    assert estimate_s(stages[6:], stages, spent) == 30.0
    assert estimate_s(stages[5:], stages, spent) == 15.0 + 30.0
    assert estimate_s(stages[7:], stages, spent) is None


def test_bad_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches runs that overwrite each other, and folders named outside."""
    with pytest.raises(ValueError, match="different names"):
        SweepConfig(seeds=(1, 1), settings=(SettingConfig(name="a", config="demo"),))
    with pytest.raises(ValueError, match="letters, digits"):
        SettingConfig(name="../a", config="demo")
    path = tmp_path / "sweep.yaml"
    path.write_text("seeds: [1]\nsettings:\n  - {name: a, config: demo}\n")
    assert main([str(path)]) == 2
    path.write_text("seeds: [1, 2]\nsettings:\n  - {name: a, config: demo, overides: []}\n")
    assert main([str(path)]) == 2
    path.write_text("seeds: [1, 2]\nsettings:\n  - {name: a, config: no_such}\n")
    assert main([str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert "two runs" in lines[0]
    assert "overides" in lines[1]
    assert "no_such.yaml" in lines[2]
