"""Verdicts and the table; the program around the faults."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

import benchmarks.faults.__main__ as program
from benchmarks.faults.__main__ import Fault, main
from benchmarks.faults.lab import Lab
from benchmarks.faults.report import Trials, markdown_table
from benchmarks.record import write_record


def test_one_problem_fails_the_row() -> None:
    """Catches a verdict that overlooks a trial, or a check that belongs to several."""
    lines: list[str] = []
    trials = Trials("x", lines.append)
    assert not trials.passed, "nothing was tried"
    trials.add("first", [], "fine")
    assert trials.passed
    trials.check("losses", ["differ"])
    assert not trials.passed
    assert (trials.tried, trials.survived) == (1, 1)
    trials.add("second", ["gone", "twice"])
    assert (trials.tried, trials.survived) == (2, 1)
    assert trials.problems == ["losses: differ", "second: gone", "second: twice"]
    assert lines == ["[x] first: ok  fine", "[x] losses: FAIL  differ", "[x] second: FAIL  gone; twice"]
    assert (
        markdown_table([("a | b", trials)]).splitlines()[-1]
        == r"| a \| b | 2 | 1 | 3 problems, see below | **FAIL** |"
    )


def survived(lab: Lab, trials: Trials) -> str:
    trials.add(f"seed {lab.generator('x').random():.3f} in {lab.folder}", [])
    return "nothing"


def broken(lab: Lab, trials: Trials) -> str:
    raise LookupError("the trial\nis broken")


def test_exit_code_table_and_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a failure that ends with exit code 0, and a trial that breaks and counts as survived."""
    monkeypatch.setattr(program, "write_record", partial(write_record, root=tmp_path))
    faults = (Fault("good", "a good one", survived), Fault("bad", "a broken one", broken))
    monkeypatch.setattr(program, "FAULTS", faults)
    assert main(["--only", "good"]) == 0
    assert main(["--record", "--seed", "3"]) == 1
    output = capsys.readouterr().out
    assert "| a good one | 1 | 1 | nothing | pass |" in output
    assert "| a broken one | 1 | 0 | 1 problems, see below | **FAIL** |" in output
    assert "LookupError: the trial is broken" in output
    assert "in LAB" in output
    (record,) = tmp_path.iterdir()
    body = json.loads((record / "record.json").read_text())
    assert [row["passed"] for row in body["results"]] == [True, False]
    assert body["command"] == "python -m benchmarks.faults --record --seed 3"
    with pytest.raises(LookupError):
        main(["--only", "bad", "--debug"])


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a suite that tries nothing and calls that a success."""
    assert main(["--kills", "0"]) == 2
    assert "--kills 0 must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
