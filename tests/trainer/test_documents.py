"""``data.mask_documents``: whole runs, and each objective against the documents of its windows one by one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from data.batch import Batch
from data.config import DataConfig
from data.label_cache import settings_from_json
from data.loader import validation_batches
from data.manifest import DataError
from data.source import open_source
from data.stream import read_chunk
from parallel.tensor import TensorGroup
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.analysis.test_generate import write_run
from tests.trainer.model.tiny import randomize
from tests.trainer.test_run import StopAfter, losses
from tests.trainer.tiny_run import tiny_config
from trainer.analysis import evaluate
from trainer.analysis.trained import open_trained
from trainer.build import _build_loss
from trainer.concepts.cache import label_settings, open_labels
from trainer.concepts.extractor import TargetExtractor, load_teacher
from trainer.concepts.label import label
from trainer.concepts.sae_training import SaeLearner, SaeTerms
from trainer.config import RunConfig, SaeConfig
from trainer.kernels.reference import IGNORED_LABEL
from trainer.main import train
from trainer.model.documents import split_windows
from trainer.model.student import build_student
from trainer.objective import NextToken, SaeLoss
from trainer.stop import StopRequest

CPU = torch.device("cpu")
STEPS = 4

# Name: objective and what differs from the tiny run of it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ntp": ("ntp", {}),
    "cocomix": ("cocomix", {}),
    "random, every 2": ("cocomix", {"concepts__targets": "random", "concepts__every": 2}),
    "l2": ("cocomix", {"objective__regression": "l2", "concepts__teacher_width": 12}),
    "kd": ("kd", {"kd__temperature": 2.0}),
    "pause": ("pause", {"pause__insert_layer": 1}),
    "sae": ("sae", {}),
}
ALL = tuple(name for name in VARIANTS if name != "pause")

# Name: ranks, keys, and the variants that are trained so.
LAYOUTS: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "one": (1, {}, ALL),
    "fsdp2": (2, {"recompute": "full", "shard_teacher": True}, ("cocomix",)),
    "hsdp": (2, {"dp_replicate": 2, "recompute": "selective"}, ("cocomix",)),
    "tp2": (2, {"tp": 2}, ALL),
    "tp2, shared": (2, {"tp": 2, "shard_teacher": True, "shard_sae": True}, ("cocomix",)),
}
if importlib.util.find_spec("deepspeed") is not None:
    LAYOUTS["zero2"] = (2, {"engine": "deepspeed", "zero_stage": 2}, ("cocomix",))


def masked(world: Path, run_dir: Path, name: str, **changes: Any) -> RunConfig:
    """A variant's tiny run that keeps documents apart; the last microbatch is a short one."""
    objective, own = VARIANTS[name]
    kd = {"kd__teacher": str(world / "teacher")} if objective == "kd" else {}
    settings = {
        "data__mask_documents": True,
        "train__steps": STEPS,
        "validation__every_steps": STEPS,
        "checkpoint__every_steps": 0,
    }
    return tiny_config(world, run_dir, objective, **{**settings, **kd, **own, **changes})


@pytest.fixture(scope="module", autouse=True)
def _ready_to_fork(request: pytest.FixtureRequest) -> None:
    if "zero2" in LAYOUTS:
        request.getfixturevalue("deepspeed_before_forks")


@pytest.fixture(scope="module")
def runs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of each variant, below ``layout/variant``."""
    root = tmp_path_factory.mktemp("documents")

    def train_all(world: World, layout: str) -> set[str]:
        _, keys, names = LAYOUTS[layout]
        changes = {f"parallel__{key}": value for key, value in keys.items()}
        configs = [masked(tiny_world, root / layout / name, name, **changes) for name in names]
        with StopRequest() as stop:
            return {train(config, world, stop) for config in configs}

    for layout, (num_ranks, *_) in LAYOUTS.items():
        assert run_ranks(train_all, num_ranks, layout, timeout_s=120) == [{"finished"}] * num_ranks
    return root


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, name) for layout in LAYOUTS if layout != "one" for name in LAYOUTS[layout][2]],
)
def test_every_layout_trains_the_same(layout: str, name: str, runs: Path) -> None:
    """Catches means over each rank's own tokens, of which some ranks have fewer, and a part of the sequence
    that takes another part's positions."""
    ours, theirs = losses(runs / layout / name), losses(runs / "one" / name)
    assert len(ours) == STEPS
    for record, expected in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            assert record[key] == (None if value is None else pytest.approx(value, abs=1e-5)), key


@pytest.mark.dist
def test_a_resumed_run_and_one_with_targets_ahead_have_the_same_bits(
    tiny_world: Path, tmp_path: Path, runs: Path
) -> None:
    """Catches a count of tokens, or documents, that are another microbatch's."""
    configs = [
        masked(tiny_world, tmp_path / str(ahead), "cocomix", concepts__ahead=ahead) for ahead in (False, True)
    ]

    def in_parts(world: World) -> list[str]:
        return [train(config, world, StopAfter(polls)) for config in configs for polls in (2, 99)]

    assert run_ranks(in_parts, 1) == [["stopped", "finished"] * 2]
    for ahead in (False, True):
        assert losses(tmp_path / str(ahead)) == losses(runs / "one" / "cocomix")


@pytest.mark.dist
def test_bf16_stays_near_fp32(tiny_world: Path, tmp_path: Path, runs: Path) -> None:
    """Catches a mask that has not the dtype of the queries, in the student or in a teacher of another one."""
    precisions = [("bf16", "fp32"), ("bf16", "bf16")]
    configs = [
        masked(tiny_world, tmp_path / teacher, "cocomix", train__precision=own, concepts__precision=teacher)
        for own, teacher in precisions
    ]

    def one_rank(world: World) -> set[str]:
        with StopRequest() as stop:
            return {train(config, world, stop) for config in configs}

    assert run_ranks(one_rank, 1) == [{"finished"}]
    for _, teacher in precisions:
        for own, other in zip(losses(tmp_path / teacher), losses(runs / "one" / "cocomix"), strict=True):
            assert own["loss_ntp"] == pytest.approx(other["loss_ntp"], abs=2e-2)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["ntp", "cocomix"])
def test_it_is_another_run_than_without(name: str, tiny_world: Path, tmp_path: Path, runs: Path) -> None:
    """Catches an option without effect."""
    config = masked(tiny_world, tmp_path, name, data__mask_documents=False, train__steps=1)

    def one_rank(world: World) -> str:
        with StopRequest() as stop:
            return train(config, world, stop)

    run_ranks(one_rank, 1)
    first, other = losses(tmp_path)[0], losses(runs / "one" / name)[0]
    assert first["loss_ntp"] != pytest.approx(other["loss_ntp"], abs=1e-4)


def test_an_empty_prompt_is_refused(tiny_world: Path) -> None:
    """Catches samples of what was never trained: the first token of a document."""
    with pytest.raises(ValueError, match="log.sample_prompts must hold no empty prompt") as error:
        masked(tiny_world, tiny_world, "ntp", log__sample_prompts=["", "a"])
    assert "\n" not in str(error.value)
    masked(tiny_world, tiny_world, "ntp", log__sample_prompts=["", "a"], data__mask_documents=False)


# Document by document


def windows_of(world: Path) -> tuple[Tensor, int]:
    """Training windows (B, 17) of which some hold an end-of-text token, and that token."""
    storage, manifest = open_source(DataConfig(dir=str(world / "data"), seq_len=16))
    tokens = read_chunk(storage, manifest.dtype, *manifest.splits["train"].chunks[0])
    end_id = manifest.tokenizer.eot_id
    rows = torch.from_numpy(tokens.astype(np.int64)).unfold(0, 17, 16).clone()
    rows[0, 3] = rows[1, 15] = rows[1, 0] = end_id
    return rows, end_id


def one_by_one(rows: Tensor, end_id: int) -> Iterator[tuple[int, int, Tensor]]:
    """Row, column and tokens (1, n + 1) of each document; the last token is its label alone."""
    for row, ids in enumerate(rows[:, :-1].tolist()):
        start = 0
        for column, token in enumerate(ids):
            if token == end_id or column == len(ids) - 1:
                yield row, start, rows[row : row + 1, start : column + 2]
                start = column + 1


def summed(found: dict[str, float], sums: Mapping[str, Tensor | float]) -> None:
    for name, value in sums.items():
        found[name] = found.get(name, 0.0) + float(value)


@pytest.mark.parametrize("name", ["ntp", "cocomix", "kd", "pause"])
def test_an_objective_sums_over_documents_alone(name: str, tiny_world: Path) -> None:
    """Catches a teacher, a student or a count of tokens that does not know the documents of the others.

    Alone a document is given without its last token, which nothing depends on and which predicts nothing.
    """
    rows, end_id = windows_of(tiny_world)
    config = masked(tiny_world, tiny_world, name)
    assert config.model is not None
    model = build_student(config.model, config.insertion)
    randomize(model, seed=0)
    objective, *_ = _build_loss(config, CPU, TensorGroup(), end_id)
    alone, *_ = _build_loss(config, CPU, TensorGroup(), None)
    terms = objective(model, Batch(rows, len(rows)), step=0, detail=True)
    terms.loss.backward()
    packed = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    sums: dict[str, float] = {}
    for _, _, tokens in one_by_one(rows, end_id):
        length = tokens.shape[1] - int(tokens[0, -2] == end_id)
        if length > 1:
            own = alone(model, Batch(tokens[:, :length], 1), step=0, detail=True)
            own.loss.backward()
            summed(sums, own.sums)
    found: dict[str, float] = {}
    summed(found, terms.sums)
    assert found == pytest.approx(sums, rel=1e-5)
    counted = objective.count(Batch(rows, len(rows)))
    assert counted is not None and int(counted) == found["tokens"] < rows[:, 1:].numel()
    assert int(objective.count(Batch(rows, 2))) == int((rows[:2, :-1] != end_id).sum())  # type: ignore[arg-type]
    for key, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(
                packed[key], weight.grad, atol=1e-5 * float(weight.grad.norm()), rtol=0
            )


def test_without_the_option_nothing_is_masked(tiny_world: Path) -> None:
    """Catches an option that is on by default."""
    rows, end_id = windows_of(tiny_world)
    config = masked(tiny_world, tiny_world, "ntp", data__mask_documents=False)
    assert config.model is not None
    model = build_student(config.model, None)
    randomize(model, seed=0)
    batch = Batch(rows, len(rows))
    terms = NextToken()(model, batch, step=0, detail=True)
    assert torch.equal(terms.loss, model(rows[:, :-1], rows[:, 1:]).loss_ntp)
    assert terms.sums["tokens"] == rows[:, 1:].numel()
    assert NextToken().count(batch) is None
    masked_terms = NextToken(end_id)(model, batch, step=0, detail=True)
    assert masked_terms.loss < terms.loss


def test_the_autoencoder_s_residuals(tiny_world: Path) -> None:
    """Catches an autoencoder that learns from residuals which the student's targets will not come from."""
    rows, end_id = windows_of(tiny_world)
    seen: list[Tensor] = []

    class Learner(SaeLearner):
        def forward(self, residual: Tensor) -> SaeTerms:
            seen.append(residual)
            return super().forward(residual)

    teacher = load_teacher(str(tiny_world / "teacher"), 0, key="sae.layer")
    learner = Learner(12, SaeConfig(teacher="", layer=0, num_latents=37, top_k=6))
    SaeLoss(teacher, 0, 1, document_end=end_id)(learner, Batch(rows, len(rows)), step=0, detail=True)
    for row, start, tokens in one_by_one(rows, end_id):
        own = teacher.residual_after(tokens[:, :-1], 0)
        found = seen[0][row : row + 1, start : start + own.shape[1]]
        torch.testing.assert_close(found, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("selection", ["attribution", "activation", "random"])
def test_targets_are_those_of_each_document_alone(selection: str, tiny_world: Path) -> None:
    """Catches a teacher that reads, or a gradient that flows, across a boundary."""
    rows, end_id = windows_of(tiny_world)
    concepts = masked(tiny_world, tiny_world, "cocomix", concepts__targets=selection).concepts
    assert concepts is not None
    extractor = TargetExtractor.load(concepts, CPU)
    inputs = split_windows(rows, end_id)
    packed = extractor(*inputs)
    assert (packed >= 0).float().mean() > 0.3
    for row, start, tokens in one_by_one(rows, end_id):
        labels = tokens[:, 1:].masked_fill(tokens[:, :-1] == end_id, IGNORED_LABEL)
        alone = extractor(tokens[:, :-1], labels)
        assert torch.equal(packed[row : row + 1, start : start + alone.shape[1]], alone)
    across = extractor(rows[:, :-1], rows[:, 1:])
    assert not torch.equal(across, packed)


@pytest.mark.dist
def test_stored_targets(tiny_world: Path, tmp_path: Path, runs: Path) -> None:
    """Catches stored targets that a boundary was ignored for, read by a run that minds it."""
    place = {"concepts__labels": str(tmp_path / "labels")}
    config = masked(tiny_world, tmp_path / "cached", "cocomix", **place)
    cached = masked(tiny_world, tmp_path / "cached", "cocomix", **place, concepts__source="cache")
    plain = masked(tiny_world, tmp_path / "no", "cocomix", **place, data__mask_documents=False)

    def one_rank(world: World) -> str:
        assert label(config, world)
        with StopRequest() as stop:
            return train(cached, world, stop)

    assert run_ranks(one_rank, 1) == ["finished"]
    assert losses(tmp_path / "cached") == losses(runs / "one" / "cocomix")
    assert plain.concepts is not None
    with pytest.raises(DataError, match="mask_documents was True and is False;") as error:
        open_labels(plain.concepts, plain.data, [open_source(plain.data).manifest])
    assert "\n" not in str(error.value)


def test_labels_of_before_the_option_were_made_without_it(tiny_world: Path) -> None:
    """Catches finished labels that are refused because they do not say what they could not know."""
    config = masked(tiny_world, tiny_world, "cocomix", data__mask_documents=False)
    assert config.concepts is not None
    settings = label_settings(config.concepts, config.data, open_source(config.data).manifest)
    body = dataclasses.asdict(settings)
    del body["mask_documents"]
    assert settings_from_json(body) == settings


def test_evaluation_reads_documents_as_training_did(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an evaluation across boundaries, a label behind one that counts, and losses by the position in
    the window."""
    run = write_run(tiny_world, tmp_path / "run", "cocomix", data__mask_documents=True)
    assert evaluate.main([str(run), "--batch_size", "3"]) == 0
    report = json.loads((run / "evaluation" / "validation_00000012.json").read_text())["sources"]["data"]
    trained = open_trained(run)
    assert trained.config is not None
    end_id = trained.tokenizer.eot_id
    nats: dict[int, list[float]] = {}
    batches = validation_batches(trained.config.data, share=1.0, rows=1, rank=0, world_size=1)
    for batch in batches:
        for _, _, tokens in one_by_one(batch.tokens.long(), end_id):
            with torch.no_grad():
                probability = trained.model(tokens[:, :-1]).logits[0].double().log_softmax(-1)
            for place, (token, label_id) in enumerate(zip(tokens[0], tokens[0, 1:], strict=False)):
                if token != end_id:
                    nats.setdefault(place, []).append(-float(probability[place, label_id]))
    every = [value for values in nats.values() for value in values]
    assert report["tokens"] == len(every)
    assert report["loss"] == pytest.approx(sum(every) / len(every), rel=1e-5)
    for group in report["by_position"]:
        own = [value for place in range(group["first"], group["last"] + 1) for value in nats.get(place, [])]
        assert group["loss"] == pytest.approx(sum(own) / len(own), rel=1e-5)
