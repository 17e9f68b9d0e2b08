"""The comparison of runs, on curves whose crossings are known exactly."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data.prepare import PrepareOptions, prepare
from tests.data.conftest import make_texts, write_jsonl
from tests.trainer.tiny_run import tiny_config
from trainer.analysis.compare import main
from trainer.analysis.compare_budgets import Run, compare
from trainer.analysis.compare_report import quantity, winner
from trainer.analysis.curves import Cost, Curve, Point, common_budget, read_curve
from trainer.config_io import dump_config
from trainer.flops import parameter_count


@dataclass(frozen=True)
class Speed:
    """What one token costs."""

    flops: float
    seconds: float


SLOW, FAST = Speed(30.0, 0.02), Speed(10.0, 0.01)


def records(losses: Sequence[float | None], speed: Speed = FAST, first: int = 1) -> list[dict[str, Any]]:
    """A validation every 100 tokens, which are 10 steps, with training records between them."""
    found: list[dict[str, Any]] = []
    for number, loss in enumerate(losses, start=first):
        tokens = 100 * number
        axes = {"tokens": tokens, "flops": speed.flops * tokens, "seconds": speed.seconds * tokens}
        found.append({"step": 10 * number - 5, **axes, "loss_ntp": 9.0})
        found.append({"step": 10 * number, **axes, "loss_ntp": 9.0, "val_loss_ntp": loss})
    return found


def curve(name: str, losses: Sequence[float | None], speed: Speed = FAST, first: int = 1) -> Curve:
    return read_curve(name, records(losses, speed, first), "metrics.jsonl")


BASELINE = curve("a", [5.0, 4.0, 3.0, 2.0])
"""400 tokens, 4000 FLOPs, 4 seconds."""
STUDENT = curve("b", [4.0, 2.5, 1.5], SLOW)
"""300 tokens, 9000 FLOPs, 6 seconds: learns more from a token and pays more for it."""


def compared(*curves: Curve) -> Any:
    return compare([Run(item, 1, 1.0, item.final.step) for item in curves])


def test_losses_at_equal_budgets() -> None:
    """Catches a budget that one run never reached, and axes that are mixed up: b wins one way, a two."""
    found = {item.axis: item for item in compared(BASELINE, STUDENT).at_budget}
    assert {axis: item.budget for axis, item in found.items()} == {
        "tokens": 300,
        "flops": 4000,
        "seconds": pytest.approx(4.0),
    }
    assert found["tokens"].losses == pytest.approx((3.0, 1.5))
    assert found["flops"].losses == pytest.approx((2.0, 3.5))
    assert found["seconds"].losses == pytest.approx((2.0, 2.5))


def test_cost_of_the_baselines_final_loss() -> None:
    """Catches a cost read at a validation instead of between two of them."""
    found = {item.axis: item.costs for item in compared(BASELINE, STUDENT).to_loss}
    assert [cost.value for cost in found["tokens"]] == pytest.approx([400, 250])
    assert [cost.value for cost in found["flops"]] == pytest.approx([4000, 7500])
    assert [cost.value for cost in found["seconds"]] == pytest.approx([4.0, 5.0])


def test_never_extrapolates() -> None:
    """Catches a guess beyond either end of a curve."""
    assert curve("c", [5.0, 2.7]).cost_of("tokens", 2.0) is None
    late = curve("late", [1.0], first=4)
    assert late.loss_at("tokens", 399.0) is None
    assert late.loss_at("tokens", 401.0) is None
    assert late.loss_at("tokens", 400.0) == 1.0
    assert late.cost_of("tokens", 2.0) == Cost(400, is_upper_bound=True)
    assert late.cost_of("tokens", 1.0) == Cost(400, is_upper_bound=False)


def test_first_crossing_counts() -> None:
    """Catches the last crossing being taken where a curve goes up again."""
    bumpy = curve("bumpy", [5.0, 2.0, 3.0, 1.0])
    assert bumpy.cost_of("tokens", 2.0) == Cost(200, is_upper_bound=False)
    assert bumpy.cost_of("tokens", 2.5) == pytest.approx((100 + 100 * 2.5 / 3.0, False))


def test_interpolates_every_point_of_a_line_exactly() -> None:
    """Catches an off-by-one between the points around a budget."""
    for tokens in range(100, 401, 7):
        loss = BASELINE.loss_at("tokens", tokens)
        assert loss == pytest.approx(6.0 - tokens / 100)
        assert BASELINE.cost_of("tokens", loss) == pytest.approx((tokens, False))


def test_more_than_two_runs() -> None:
    """Catches a budget or winner that looks at the first two runs only."""
    third = curve("c", [1.0, 0.5])
    comparison = compared(BASELINE, STUDENT, third)
    assert common_budget([BASELINE, STUDENT, third], "tokens") == 200
    assert [winner(comparison.names, item.losses) for item in comparison.at_budget] == ["c", "c", "c"]


def test_a_resumed_run_replaces_its_lost_steps() -> None:
    """Catches validations of steps that a dead process did and a resumed one did again."""
    before, after = records([5.0, 4.0, 3.9, 3.8]), records([3.0, 2.0], first=2)
    found = read_curve("a", [*before, *after], "metrics.jsonl")
    assert [(point.step, point.loss) for point in found.points] == [(10, 5.0), (20, 3.0), (30, 2.0)]


def test_winner() -> None:
    """Catches a winner where nothing was measured, and a tie that hides a run."""
    assert winner("ab", [2.0, 1.0]) == "b"
    assert winner("ab", [None, 9.0]) == "b"
    assert winner("ab", [1.0, 1.0]) == "a = b"
    assert winner("ab", [None, None]) == "-"


@pytest.mark.parametrize(
    ("value", "text"), [(1024, "1.024k"), (1.5e6, "1.5M"), (999.0, "999"), (0.25, "0.25"), (2e22, "20Z")]
)
def test_quantity(value: float, text: str) -> None:
    """Catches a wrong SI prefix."""
    assert quantity(value) == text


# The command line


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two shard folders whose validation texts differ: ``data`` and ``other``."""
    root = tmp_path_factory.mktemp("compare")
    for name, seed in (("data", 0), ("other", 1)):
        write_jsonl(root / f"{name}.jsonl", make_texts(60, seed))
        options = {"vocab_size": 300, "val_fraction": 0.2, "chunk_tokens": 256}
        prepare(PrepareOptions(input=root / f"{name}.jsonl", out=root / name, **options))  # type: ignore[arg-type]
    return root


def write_run(
    world: Path, run_dir: Path, lines: Sequence[dict[str, Any]], objective: str = "ntp", **changes: Any
) -> Path:
    run_dir.mkdir(parents=True)
    settings = {"train__steps": lines[-1]["step"] if lines else 1, **changes}
    config = tiny_config(world, run_dir, objective, **settings)
    (run_dir / "config.yaml").write_text(dump_config(config))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


@pytest.fixture
def runs(world: Path, tmp_path: Path) -> tuple[Path, Path]:
    ntp = write_run(world, tmp_path / "ntp", records([5.0, 4.0, 3.0, 2.0]))
    cocomix = write_run(world, tmp_path / "cocomix", records([4.0, 2.5, 1.5], SLOW), "cocomix")
    return ntp, cocomix


def cells(markdown: str) -> Iterator[list[str]]:
    for line in markdown.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_writes_all_files(
    world: Path, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a file that disagrees with the table, and parameters counted without the concepts."""
    out = tmp_path / "out"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown == (out / "comparison.md").read_text()
    rows = list(cells(shown))
    config = tiny_config(world, tmp_path, "cocomix")
    assert config.model is not None
    parameters = sum(parameter_count(config.model, config.concepts).values())
    assert rows[2] == [
        "cocomix",
        f"{parameters:,}",
        "30",
        "1.5000 (4.48)",
        "3.5000 (33.12)",
        "2.5000 (12.18)",
    ]
    assert rows[3][3:] == ["cocomix", "ntp", "ntp"]
    assert rows[6] == ["cocomix", "250 (0.62x)", "7.5k (1.88x)", "5 (1.25x)"]
    assert rows[7][1:] == ["cocomix", "ntp", "ntp"]
    numbers = json.loads((out / "comparison.json").read_text())
    assert numbers["at_equal"]["flops"] == {
        "budget": 4000.0,
        "losses": {"ntp": 2.0, "cocomix": pytest.approx(3.5)},
        "winner": "ntp",
    }
    lines = list(csv.DictReader((out / "curves.csv").open()))
    assert [line["run"] for line in lines] == ["ntp"] * 4 + ["cocomix"] * 3
    assert Point(*(float(lines[-1][key]) for key in list(lines[-1])[1:])) == STUDENT.final  # type: ignore[arg-type]
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.json",
        "comparison.md",
        "curves.csv",
        "curves.png",
    ]


def test_says_what_a_reader_must_know(
    world: Path, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a table that hides an unfinished run, an unreached loss or the schedule's end."""
    short = write_run(world, tmp_path / "short", records([4.9]), train__steps=40)
    assert main([*map(str, runs), str(short)]) == 0
    shown = capsys.readouterr().out
    assert "short is unfinished: validated up to step 10 of 40" in shown
    assert "learning-rate schedule ends" in shown
    assert "not reached" in shown
    assert "not validated so early" in shown  # cocomix first validates after 3000 FLOPs, short ends at 1000


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_refuses_what_is_no_pair_of_runs(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or a comparison of a run with itself."""
    assert "needs at least 2" in refused([runs[0]], capsys)
    assert "given more than once" in refused([runs[0], runs[0].parent / "." / "ntp"], capsys)
    assert "nowhere/config.yaml" in refused([runs[0], tmp_path / "nowhere"], capsys)
    (runs[1] / "metrics.jsonl").unlink()
    assert "cocomix/metrics.jsonl" in refused(runs, capsys)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "no validation points"),
        (records([3.0])[:1], "no validation points"),
        (records([3.0, None]), "val_loss_ntp=None at step 20 must be a finite number"),
        ([{"step": 1, "tokens": 1, "seconds": 1, "val_loss_ntp": 2.0}], "flops=None at step 1"),
    ],
)
def test_refuses_records_without_a_curve(
    lines: list[dict[str, Any]],
    expected: str,
    world: Path,
    runs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a diverged run that looks as if it had stopped before, and an empty curve."""
    bad = write_run(world, tmp_path / "bad", lines)
    assert expected in refused([runs[0], bad], capsys)


def test_refuses_an_autoencoder(
    world: Path, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a comparison with a run that has no next-token loss."""
    sae = write_run(world, tmp_path / "sae", records([3.0]), "sae")
    assert "trains no language model" in refused([runs[0], sae], capsys)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__seq_len": 8}, "data.seq_len 8, not 16"),
        ({"validation__share": 0.5}, "validation.share 0.5, not 1.0"),
        ({"data__dir": "other"}, "data.dir tokenizer"),
        ({"data__dir": "gone"}, "data.dir"),
    ],
)
def test_refuses_other_validation_data(
    changes: dict[str, Any],
    expected: str,
    world: Path,
    runs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches losses of different tokens, contexts or windows in one table."""
    if "data__dir" in changes:
        changes = {"data__dir": str(world / changes["data__dir"])}
    other = write_run(world, tmp_path / "other", records([3.0]), **changes)
    error = refused([runs[0], other, "--out", tmp_path / "out"], capsys)
    assert "validated on other data" in error and expected in error
    assert not (tmp_path / "out").exists()


def test_names_the_extra_for_the_picture(
    runs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a missing matplotlib that is found only after half of the files are there."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "cocomix[plot]" in refused([*runs, "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()
    assert main([*map(str, runs)]) == 0
