"""The benchmarks of steps compare equal work, and the table of figures says when one is missed."""

from __future__ import annotations

import contextlib
import io
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from benchmarks import bench, bench_extractor, bench_step, reference_dense
from benchmarks.bench import Figure, Measurement, Row
from benchmarks.parts import PARTS, REST, TEACHER, PartClock
from benchmarks.step_memory import step_memory
from benchmarks.turns import ratio, take_turns
from tests.ranks import run_ranks

SMALL = bench_step.Settings(dry_run=True, repeats=2)


def in_child(work: Any) -> Any:
    """This process must stay without groups."""
    return run_ranks(lambda world: work(), 1)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_sides_of_a_step_are_measured(precision: str) -> None:
    """Catches a side without a part, a part that swallows another, and a step that is not the whole."""
    settings = bench_step.Settings(dry_run=True, repeats=2, precision=precision)
    found = in_child(lambda: bench_step.against_dense(settings))
    assert found.ratio > 0
    assert found.equal_targets == 1.0 if precision == "fp32" else found.equal_targets > 0.5
    for side in ("dense", "own"):
        assert set(found.parts[side]) == set(PARTS)
        assert len(found.seconds[side].cpu) == len(found.seconds[side].wall) == 2
    lines = bench_step.lines_of(settings, found)
    assert any(line.startswith("| teacher |") for line in lines)


def test_a_wrong_oracle_is_noticed() -> None:
    """Catches a benchmark that times two things that differ."""

    dense = reference_dense.next_token_loss

    def planted() -> str:
        reference_dense.next_token_loss = lambda logits, labels: 1.01 * dense(logits, labels)
        try:
            bench_step.against_dense(SMALL)
        except bench_step.Disagreement as error:
            return str(error)
        return ""

    assert "the loss is" in in_child(planted)


def test_next_token_side_has_no_teacher() -> None:
    """Catches a baseline that pays for concepts, and a ratio that is compared with nothing."""
    found = in_child(lambda: bench_step.against_ntp(SMALL))
    assert TEACHER in found.parts["cocomix"]
    assert TEACHER not in found.parts["ntp"]
    assert found.predicted > 1
    assert found.over_predicted == found.ratio / found.predicted


def test_extraction_in_both_precisions() -> None:
    """Catches a precision that is the other one."""
    found = in_child(lambda: bench_extractor.compare_extraction(SMALL))
    assert found.equal_targets["fp32"] == 1.0
    assert 0.5 < found.equal_targets["bf16"] < 1.0
    assert list(found.seconds) == ["dense", "fp32", "bf16"]


def test_commands_print_and_refuse(capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a table without a ratio, and a traceback for a mistaken number."""

    def work() -> tuple[int, str]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = bench_step.main(["--against", "ntp", "--dry_run", "--repeats", "1", "--precision", "fp32"])
        return code, out.getvalue()

    code, text = in_child(work)
    assert code == 0
    assert "CoCoMix / NTP" in text
    assert bench_step.main(["--rows", "0"]) == 2
    assert bench_extractor.main(["--threads", "0"]) == 2
    assert "--rows 0 must be at least 1" in capfd.readouterr().err


def test_memory_is_what_a_step_adds() -> None:
    """Catches a peak that includes weights, or one of another process."""
    config, teacher = SMALL.config("cocomix"), bench_step.teacher_of(SMALL)
    few, many = (step_memory("dense", config, teacher, rows) for rows in (1, 400))
    assert many.peak > many.before > 0
    # 400 rows of 32 tokens have concept logits of 25 MB each time that they are copied.
    assert many.above - few.above > 50e6


def test_turns() -> None:
    """Catches rounds that are not taken in turns, and a warm-up that counts."""
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    found = take_turns({"slow": slow, "fast": lambda: order.append("fast")}, 3)
    assert order == ["slow", "fast"] * 4
    assert len(found["slow"].cpu) == 3
    assert ratio(found["slow"], found["fast"]) > 2


def test_a_part_does_not_count_what_is_inside_it() -> None:
    """Catches parts whose sum is more than the whole."""
    clock = PartClock()

    def busy(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    start = time.process_time()
    with clock.part(REST):
        busy(0.02)
        with clock.part(TEACHER):
            busy(0.05)
        busy(0.02)
    whole = time.process_time() - start
    assert clock.seconds[TEACHER] == pytest.approx(0.05, abs=0.015)
    assert sum(clock.seconds.values()) == pytest.approx(whole, abs=0.005)


def table_of(
    capsys: pytest.CaptureFixture[str], values: list[float | None], **changes: Any
) -> tuple[int, str]:
    rows = (Row("faster", 2.0), Row("smaller", 0.4, at_most=True))
    measurement = Measurement("both", rows, 90.0, lambda dry_run: (values, {"dry": dry_run}))
    args = Namespace(**{"only": [], "dry_run": False, "record": False, "root": None, **changes})
    code = bench.bench(args, [], [measurement])
    return code, capsys.readouterr().out


def test_a_missed_figure_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches an exit code of 0 with a figure missed, a bound read the wrong way, and a NaN that passes."""
    assert table_of(capsys, [2.0, 0.4])[0] == 0
    for values in ([1.99, 0.3], [2.5, 0.41], [float("nan"), 0.1], [2.5, float("nan")]):
        code, text = table_of(capsys, values)
        assert code == 1
        assert text.count("missed") == 1
    code, text = table_of(capsys, [None, 0.3])
    assert code == 0
    assert "| faster | at least 2 | - | not measured |" in text
    assert "| smaller | at most 0.4 | 0.3 | reached |" in text
    assert table_of(capsys, [1.0, 1.0], dry_run=True)[0] == 0
    table_of(capsys, [1.0, 0.3], record=True, root=tmp_path)
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "record.json").read_text())
    assert [figure["verdict"] for figure in record["results"]["figures"]] == ["missed", "reached"]


def test_the_registry_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a figure that nobody measures, an unknown name, and utilisation from another theme's record."""
    names = [row.name for measurement in bench.registry() for row in measurement.rows]
    assert len(names) == len(set(names)) == 15
    assert bench.main(["--only", "nothing"]) == 2
    assert "--only nothing must be one of step-fp32" in capsys.readouterr().err
    assert bench.newest_record("gpu", tmp_path) is None
    for folder, theme, when in (
        ("a_gpu_x", "gpu", "1"),
        ("b_gpu_x", "gpu", "2"),
        ("c_gpu_x", "gpu-dry-run", "3"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "record.json").write_text(json.dumps({"theme": theme, "time": when}))
    assert bench.newest_record("gpu", tmp_path) == tmp_path / "b_gpu_x"


def test_figure_says_what_it_is() -> None:
    """Catches a value at the bound that is missed."""
    assert not Figure(Row("x", 1.7), 1.7).missed
    assert Figure(Row("x", 1.7), 1.69).missed
    assert Figure(Row("x", 1.7), None).verdict == "not measured"
