"""The GPU benchmark does on a CPU, with tiny sizes, what it will do on a GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bench_gpu import TARGETS, Part, all_parts, main, start_part, target_lines
from benchmarks.gpu import ceilings
from benchmarks.gpu.report import Report, read_report
from benchmarks.students import load_student


def _never(report: Report, device: torch.device, *, dry_run: bool) -> None:
    raise AssertionError("a part runs in its own process")


@pytest.mark.slow
def test_a_dry_run_measures_and_writes_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a part that does not run, a result that is not recorded, and a failure that is not told."""
    parts = ["kernels", "resume", "train-cocomix-386m-eager"]
    assert main(["--dry_run", "--record", "--root", str(tmp_path), "--parts", *parts]) == 0
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "record.json").read_text())
    found = {name: part["found"] for name, part in record["results"]["parts"].items()}
    assert list(found) == parts
    assert {name.rsplit("_", 2)[0] for name in found["kernels"]} >= {"sparse_sums", "sparse_weight_grad"}
    assert found["resume"]["deterministic"]["bitwise_equal"]
    trained = found["train-cocomix-386m-eager"]
    assert trained["equal"]["tokens_per_s"] > 0
    assert trained["largest"]["rows"] == 2 * trained["equal"]["rows"]
    assert trained.keys() >= {"parts", "equal_without_triton", "equal_ahead", "flops_per_token"}
    assert set(trained["parts"]) == {"targets", "forward", "backward", "update"}
    assert "| cocomix 386m | not measured | 42% |" in capsys.readouterr().out


def test_a_part_that_hangs_or_fails_is_recorded_as_such(tmp_path: Path) -> None:
    """Catches a benchmark that one part ends, and one that waits for ever."""
    started = time.monotonic()
    stopped = start_part(Part("resume", _never, 1.0), tmp_path, 1.0, dry_run=True)
    assert stopped["status"] == "stopped after 1 s"
    assert time.monotonic() - started < 30
    failed = start_part(Part("no-such-part", _never, 60.0), tmp_path, 60.0, dry_run=True)
    assert failed["status"] == "exit code 1"
    assert "ValueError" in failed["output"]
    assert failed["found"] == {}


def test_what_a_part_found_before_it_died_is_kept(tmp_path: Path) -> None:
    """Catches results that are written at the end only, and numbers that JSON does not know."""
    report = Report(tmp_path / "part.json")
    report.put("first", {"value": float("nan"), "more": [1.23456789]})
    assert read_report(tmp_path / "part.json") == {"first": {"value": "nan", "more": [1.23457]}}
    assert read_report(tmp_path / "none.json") == {}


def test_the_ceilings_count_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a factor in FLOPs or bytes: a product of (m, k) by (k, n) is 2mkn, a copy reads and writes."""
    monkeypatch.setattr(ceilings, "median_seconds", lambda run, device, repeats: 1e-6)
    report = Report(tmp_path / "part.json")
    ceilings.measure(report, torch.device("cpu"), dry_run=True)
    found = read_report(tmp_path / "part.json")
    assert found["matmul_bf16_8192x8192x8192"]["tflops"] == pytest.approx(2 * 64**3 / 1e6)
    assert found["copy"]["gb_per_s"] == pytest.approx(2 * 2**20 / 1e3)


def test_every_student_has_a_part_with_and_without_compilation() -> None:
    """Catches a row of the table that nothing measures, and a configuration that does not load."""
    names = [part.name for part in all_parts()]
    for kind, size in TARGETS:
        assert {f"train-{kind}-{size}-compiled", f"train-{kind}-{size}-eager"} <= set(names)
        config = load_student(size, kind, dry_run=False)
        assert config.objective.name == kind
    assert len(set(names)) == len(names)


def test_targets_show_the_best_of_what_was_measured() -> None:
    """Catches a utilisation that is taken from another student, or shown where none was measured."""
    results: dict[str, Any] = {
        "train-ntp-1b-eager": {"found": {"equal": {"mfu": 0.31}, "largest": {"mfu": 0.4}}},
        "train-ntp-1b-compiled": {"found": {"equal": {"mfu": 0.52}}},
        "train-cocomix-1b-eager": {"found": {"equal": {"mfu": None}}},
    }
    lines = target_lines(results)
    assert "| ntp 1b | 52.0% | 50% |" in lines
    assert "| cocomix 1b | not measured | 48% |" in lines


def test_mistaken_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or a long wait, for a mistyped part."""
    assert main(["--dry_run", "--parts", "trian"]) == 2
    assert "--parts trian must begin one of ceilings" in capsys.readouterr().err
    assert main(["--dry_run", "--minutes", "0"]) == 2
    if not torch.cuda.is_available():
        assert main([]) == 2
        assert "--dry_run tries the program" in capsys.readouterr().err
