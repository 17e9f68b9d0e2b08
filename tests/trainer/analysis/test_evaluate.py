"""Evaluation on validation windows, against plain loops over probabilities."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from data.loader import validation_batches
from data.prepare import PrepareOptions, prepare
from tests.trainer.analysis.test_generate import write_run
from trainer.analysis.evaluate import main
from trainer.analysis.trained import open_teacher, open_trained
from trainer.analysis.validation import NUM_BINS, ConceptQuality, Reliability
from trainer.concepts.extractor import TargetExtractor
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.cocomix import CoCoMix


@pytest.fixture(scope="module")
def run(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tiny_world, tmp_path_factory.mktemp("runs") / "cocomix", "cocomix")


def test_report_against_plain_loops(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches padded rows that count, labels shifted by one, ranks from 0, means over wrong numbers."""
    assert main([str(run), "--batch_size", "3"]) == 0
    body = json.loads((run / "evaluation" / "validation_00000012.json").read_text())
    found = body["sources"]["data"]
    trained = open_trained(run)
    model = trained.model
    assert isinstance(model, CoCoMix)
    assert trained.config is not None
    assert trained.config.concepts is not None
    teacher, sae, _ = open_teacher(trained)
    extractor = TargetExtractor(teacher, sae, trained.config.concepts)
    nats = torch.zeros(16, dtype=torch.float64)
    windows = hits = recalled = targets = 0
    ranks: list[int] = []
    confidences: list[tuple[float, bool]] = []
    for batch in validation_batches(trained.config.data, share=1.0, rows=1, rank=0, world_size=1):
        tokens = batch.tokens.long()
        windows += 1
        with torch.no_grad():
            probability = model(tokens[:, :-1]).logits[0].double().softmax(-1)
            logits = model.concept_logits(tokens[:, :-1])[0]
        for t, label in enumerate(tokens[0, 1:].tolist()):
            nats[t] -= probability[t, label].log()
            hits += int(probability[t].argmax()) == label
            confidences.append((float(probability[t].max()), int(probability[t].argmax()) == label))
        for t, row in enumerate(extractor(tokens[:, :-1], tokens[:, 1:])[0].tolist()):
            order = logits[t].argsort(descending=True).tolist()
            for target in row:
                if target != MASKED_TARGET:
                    ranks.append(order.index(target) + 1)
                    recalled += ranks[-1] <= len(row)
                    targets += 1
    assert found["tokens"] == 16 * windows
    assert found["loss"] == pytest.approx(float(nats.sum()) / (16 * windows), rel=1e-5)
    assert found["perplexity"] == pytest.approx(float((nats.sum() / (16 * windows)).exp()), rel=1e-4)
    assert found["accuracy"] == hits / (16 * windows)
    spans = [(item["first"], item["last"]) for item in found["by_position"]]
    assert [t for first, last in spans for t in range(first, last + 1)] == list(range(16))
    for item in found["by_position"]:
        part = nats[item["first"] : item["last"] + 1]
        assert item["loss"] == pytest.approx(float(part.mean()) / windows, rel=1e-5)
    error = 0.0
    for number in range(NUM_BINS):
        inside = [(p, hit) for p, hit in confidences if number / NUM_BINS <= p < (number + 1) / NUM_BINS]
        error += abs(sum(p - hit for p, hit in inside)) / len(confidences)
    assert found["calibration"]["expected_calibration_error"] == pytest.approx(error, rel=1e-4)
    concepts = found["concepts"]
    assert concepts["targets"] == targets > 0
    assert concepts["recall_at_A"] == pytest.approx(recalled / targets)
    assert concepts["mean_rank"] == pytest.approx(sum(ranks) / targets, rel=1e-3)
    assert concepts["mean_reciprocal_rank"] == pytest.approx(
        sum(1 / rank for rank in ranks) / targets, rel=1e-3
    )
    printed = capsys.readouterr().out
    assert f"{found['loss']:.4f}" in printed
    assert (run / "evaluation" / "validation_00000012.md").read_text() == printed


def test_a_calibrated_forecaster_has_no_error() -> None:
    """Catches bins that mix up statements and outcomes."""
    generator = torch.Generator().manual_seed(0)
    stated = torch.rand(200_000, generator=generator)
    sure, honest = Reliability(), Reliability()
    honest.add(stated, torch.rand(stated.shape, generator=generator) < stated)
    sure.add(stated.new_ones(1000), torch.arange(1000) % 2)
    assert honest.error < 0.01
    assert sure.error == pytest.approx(0.5)
    assert len(honest.to_json()["bins"]) == NUM_BINS
    assert sum(item["count"] for item in honest.to_json()["bins"]) == 200_000


def test_perfect_concepts() -> None:
    """Catches a perfect prediction (1/A on each target) that is called badly calibrated."""
    targets = torch.tensor([[3, 5], [0, 1]])
    logits = torch.full((2, 8), -100.0).scatter_(1, targets, 0.0)
    quality = ConceptQuality()
    quality.add(logits, targets, top_k=2)
    body = quality.to_json()
    assert (body["recall_at_A"], body["mean_rank"]) == (1.0, 1.0)
    assert body["calibration"]["expected_calibration_error"] == pytest.approx(0, abs=1e-6)


def test_several_sources_and_bad_ones(
    run: Path, tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches reports that are mixed up, and losses of tokens that mean something else."""
    shutil.copytree(tiny_world / "data", tmp_path / "other")
    assert main([str(run), "--data", str(tiny_world / "data"), "--data", str(tmp_path / "other")]) == 0
    body = json.loads((run / "evaluation" / "validation_00000012.json").read_text())
    assert list(body["sources"]) == ["data", "other"]
    assert body["sources"]["data"] == body["sources"]["other"]
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"other words {number} of another kind " * 9)
    prepare(
        PrepareOptions(
            input=tmp_path / "text", out=tmp_path / "alien", vocab_size=280, val_fraction=0.2, chunk_tokens=64
        )
    )
    capsys.readouterr()
    for argv, message in (
        (["--data", str(tmp_path / "alien")], "losses would mean nothing"),
        (["--data", str(tmp_path / "missing")], "no such folder"),
        (
            ["--data", str(tmp_path / "a/data"), "--data", str(tmp_path / "b/data")],
            "two folders are called data",
        ),
        (["--share", "0"], "share=0.0"),
        (["--batch_size", "0"], "--batch_size 0"),
    ):
        assert main([str(run), *argv]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main([str(tmp_path / "no_run")]) == 2
