"""The golden directory through the command that users run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.verify import main

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def _change(folder: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(folder / "expected.safetensors")
    assert name in tensors
    save_file({**tensors, name: value}, folder / "expected.safetensors")


def test_the_authors_numbers_are_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches any change of what is computed: every quantity, one line each."""
    assert main([str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("21 of 21 quantities within tolerance")
    assert all(line.startswith("ok ") for line in lines[:-1])
    expected = load_file(GOLDEN / "expected.safetensors")
    shown = {line.split()[1] for line in lines[:-1]}
    assert shown == set(expected) - {"input_ids"}


@pytest.mark.parametrize(
    ("name", "amount"),
    [
        ("student.logits", 5e-5),
        ("attribution", 5e-5),
        ("teacher.loss", 1e-4),
        ("grad.transformer.wte.weight", 1e-3),
        ("target_attribution", 5e-5),
    ],
)
def test_a_deviation_beyond_the_tolerance_fails(
    name: str, amount: float, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a check that cannot fail."""
    value = load_file(copy / "expected.safetensors")[name]
    scale = value.norm() if name.startswith("grad.") else torch.tensor(1.0)
    changed = value.clone()
    changed.view(-1)[0] += amount * scale
    _change(copy, name, changed)
    assert main([str(copy)]) == 1
    failed = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed == [name]


def test_one_wrong_target_fails_and_a_noise_label_does_not(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a comparison of positions instead of sets, and one that trusts noise labels."""
    tensors = load_file(copy / "expected.safetensors")
    positive = tensors["target_attribution"] > 0
    row = int(positive.all(-1)[0].nonzero()[0])
    swapped = tensors["targets"].clone()
    swapped[0, row] = swapped[0, row].flip(0)
    wrong = tensors["targets"].clone()
    used = set(wrong[0, row].tolist())
    wrong[0, row, 0] = next(i for i in range(512) if i not in used)
    for value, verdict in ((swapped, "ok"), (wrong, "FAIL")):
        _change(copy, "targets", value)
        main([str(copy)])
        lines = capsys.readouterr().out.splitlines()
        (line,) = [line for line in lines if " targets " in line]
        assert line.startswith(verdict), line


def test_nan_is_a_deviation(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches comparisons that NaN passes."""
    _change(copy, "student.loss_ntp", torch.tensor(float("nan")))
    assert main([str(copy)]) == 1


def test_unusable_directories_are_refused_in_one_line(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches tracebacks on a wrong path, a missing size and an unknown quantity."""
    cases = []
    assert main([str(tmp_path / "nowhere")]) == 2
    cases.append("nowhere")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "k_attr"}))
    assert main([str(copy)]) == 2
    cases.append("k_attr is missing")
    (copy / "config.json").write_text(json.dumps({**config, "insert_layer_index": 1, "concept_dim": 511}))
    assert main([str(copy)]) == 2
    cases.append("511")
    (copy / "config.json").write_text(json.dumps(config))
    save_file({"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, copy / "expected.safetensors")
    assert main([str(copy)]) == 2
    cases.append("targets is missing")
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(cases)
    for error, case in zip(errors, cases, strict=True):
        assert error.startswith("error: ")
        assert case in error
