"""Confidence over seeds: against formulas, and against how often the truth lies inside."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.trainer.analysis.test_compare import FAST, SLOW, cells, curve, records, world, write_run
from trainer.analysis.compare import main
from trainer.analysis.compare_budgets import Run
from trainer.analysis.compare_seeds import Estimate, Setting, difference, estimate, over_seeds

__all__ = ["world"]


def test_intervals_cover_the_truth_19_times_of_20() -> None:
    """Catches a normal quantile in place of Student's, and a variance divided by n."""
    generator = random.Random(0)
    for count in (2, 3, 5, 40):
        inside = 0
        for _ in range(4000):
            found = estimate([generator.gauss(3.0, 2.0) for _ in range(count)])
            assert found.half_width is not None
            inside += abs(found.mean - 3.0) <= found.half_width
        assert 0.935 < inside / 4000 < 0.965, count


def test_differences_cover_the_truth() -> None:
    """Catches a pooled variance: the settings scatter differently and have different numbers of seeds."""
    generator = random.Random(1)
    inside = 0
    for _ in range(4000):
        ours = [generator.gauss(2.0, 3.0) for _ in range(3)]
        theirs = [generator.gauss(1.5, 0.3) for _ in range(6)]
        found = difference(ours, theirs)
        assert found.half_width is not None
        inside += abs(found.mean - 0.5) <= found.half_width
    assert inside / 4000 > 0.935


def test_one_value_has_no_interval() -> None:
    """Catches certainty where nothing is known."""
    assert estimate([2.5]) == Estimate(2.5, None)
    assert difference([2.0], [1.0, 3.0]) == Estimate(0.0, None)
    assert difference([2.0, 2.0], [1.0, 1.0]) == Estimate(1.0, 0.0)


def runs_of(*lines: list[float]) -> tuple[Run, ...]:
    return tuple(Run(curve(str(n), losses, FAST), 1, 1.0, 40) for n, losses in enumerate(lines))


def test_settings_against_the_first() -> None:
    """Catches ratios the wrong way round, and a mean of the seeds that came there alone."""
    base = Setting("base", runs_of([5.0, 4.0, 3.0, 2.0], [5.0, 4.0, 3.0, 2.0]))
    fast = Setting("fast", runs_of([3.0, 2.0, 1.0, 0.5], [4.0, 2.0, 1.5, 1.0]))
    slow = Setting("slow", runs_of([5.0, 4.5, 4.0, 3.5], [4.0, 3.0, 2.0, 1.0]))
    tokens = over_seeds([base, fast, slow])[0]
    assert [item and item.mean for item in tokens.losses] == [2.0, 0.75, 2.25]
    assert [item and item.mean for item in tokens.differences] == [0.0, -1.25, 0.25]
    assert tokens.costs[:2] == (Estimate(1.0, 0.0), Estimate(0.5, 0.0))
    assert tokens.costs[2] is None  # one of its seeds never came there


def test_every_seed_of_the_first_setting_reaches_its_loss() -> None:
    """Catches a target that half of the baseline's own seeds never see, so that no cost is known."""
    base = Setting("base", runs_of([5.0, 4.0, 3.0, 2.0], [5.0, 4.0, 3.0, 1.0]))
    fast = Setting("fast", runs_of([3.0, 2.0, 1.0, 0.5]))
    tokens = over_seeds([base, fast])[0]
    assert tokens.costs[0] is not None and tokens.costs[0].mean == pytest.approx(1.0)
    assert tokens.costs[1] is not None and tokens.costs[1].mean == pytest.approx(20 / 37.5)


def test_command_line_groups_seeds(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches seeds that are taken for settings, and settings that are taken for seeds."""
    folders = []
    for seed in (1, 2, 3):
        shift = seed / 10
        base = records([5.0, 4.0, 3.0, 2.0 + shift])
        mixed = records([4.0, 2.5 + shift, 1.5 + shift], SLOW)
        folders.append(write_run(world, tmp_path / f"ntp_seed{seed}", base, run__seed=seed))
        folders.append(write_run(world, tmp_path / f"mix_seed{seed}", mixed, "cocomix", run__seed=seed))
    other = write_run(world, tmp_path / "ntp_lr", records([5.0, 4.0, 3.0, 1.9]), optim__lr=1e-3)
    out = tmp_path / "out"
    assert main([*map(str, [*folders, other]), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    seeds = [row for row in cells(shown) if row[1] in ("1", "3")]
    assert [row[:2] for row in seeds] == [["ntp", "3"], ["mix", "3"], ["ntp_lr", "1"]]
    assert "± " in seeds[0][2]
    assert "±" not in seeds[2][2]
    assert "One run each" not in shown
    body = json.loads((out / "comparison.json").read_text())
    assert body["settings"]["mix"] == ["mix_seed1", "mix_seed2", "mix_seed3"]
    assert [item["axis"] for item in body["over_seeds"]] == ["tokens", "flops", "seconds"]
    assert (out / "seeds.md").read_text().splitlines()[0] == "Validation loss over seeds, nats per token"
    capsys.readouterr()
    assert main([*map(str, folders), "--seeds"]) == 0
    assert "ntp_seed1" not in capsys.readouterr().out
    assert main([*map(str, folders[:2]), "--seeds"]) == 2
    assert "--seeds needs" in capsys.readouterr().err
