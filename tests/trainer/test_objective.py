"""Every objective and ablation: its definition, its refusals, and the same run on every layout of ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from data.batch import Batch
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.model.tiny import randomize
from tests.trainer.test_run import StopAfter
from tests.trainer.tiny_run import tiny_config
from trainer.concepts.attribution import random_scores
from trainer.concepts.extractor import TargetExtractor
from trainer.concepts.states import DistributionExtractor, StateExtractor
from trainer.config import ConceptsConfig, KdConfig, ObjectiveConfig, RegressionInsertion, RunConfig
from trainer.kernels.reference import MASKED_TARGET
from trainer.main import train
from trainer.metrics.json_lines import read_json_lines
from trainer.model.cocomix import CoCoMix
from trainer.model.documents import Documents
from trainer.model.formats import load_model
from trainer.model.gpt2 import GPT2
from trainer.model.student import build_student
from trainer.objective import CoCoMixLoss, DistillationLoss, NextToken, RegressionLoss, concept_weight
from trainer.stop import StopRequest

CPU = torch.device("cpu")

# Name: objective and what differs from the tiny run of it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "kd": ("kd", {"kd__temperature": 2.0, "kd__weight": 0.5}),
    "pause": ("pause", {"pause__insert_layer": 1, "pause__every": 4}),
    "activation": ("cocomix", {"concepts__targets": "activation", "concepts__mix": "add"}),
    "random": ("cocomix", {"concepts__targets": "random", "concepts__mix": "none"}),
    "every 2": (
        "cocomix",
        {"concepts__every": 2, "objective__concept_weight_schedule": "linear"},
    ),
    "no concept loss": ("cocomix", {"objective__concept_weight": 0.0}),
    "cosine": (
        "cocomix",
        {"objective__regression": "cosine", "concepts__teacher_width": 12, "concepts__every": 4},
    ),
    "l1, alone": (
        "cocomix",
        {"objective__regression": "l1", "concepts__teacher_width": 12, "concepts__mix": "none"},
    ),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "fsdp2": (2, {"parallel__recompute": "full"}),
    "tp2": (2, {"parallel__tp": 2}),
}
STEPS = 5


def variant(world: Path, run_dir: Path, name: str, **changes: Any) -> RunConfig:
    """The tiny run of a variant; 3 rows per rank of two in microbatches of 2, a short one last."""
    objective, own = VARIANTS[name]
    kd = {"kd__teacher": str(world / "teacher")} if objective == "kd" else {}
    settings = {"train__steps": STEPS, "validation__every_steps": 0, "checkpoint__every_steps": 0}
    return tiny_config(world, run_dir, objective, **{**settings, **kd, **own, **changes})


def train_all(configs: list[RunConfig], num_ranks: int) -> None:
    """Train one run after the other in the same ranks."""

    def one_rank(world: World) -> list[str]:
        with StopRequest() as stop:
            return [train(config, world, stop) for config in configs]

    for outcomes in run_ranks(one_rank, num_ranks, timeout_s=240):
        assert set(outcomes) == {"finished"}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What must be equal between two runs: losses, gradient norms and settings, as written."""
    kept = ("step", "tokens", "grad_norm", "concept_weight")
    return [
        {key: value for key, value in record.items() if key in kept or "loss" in key or "recall" in key}
        for record in read_json_lines(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def runs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of each variant on each layout, below ``layout/variant``."""
    root = tmp_path_factory.mktemp("variants")
    for layout, (num_ranks, changes) in LAYOUTS.items():
        train_all(
            [variant(tiny_world, root / layout / name, name, **changes) for name in VARIANTS], num_ranks
        )
    return root


@pytest.mark.dist
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layout", ["fsdp2", "tp2"])
def test_every_layout_trains_the_same(layout: str, name: str, runs: Path) -> None:
    """Catches a loss or gradient that a layout loses, doubles or averages."""
    ours, theirs = records(runs / layout / name), records(runs / "one" / name)
    assert len(ours) == STEPS
    for record, expected in zip(ours, theirs, strict=True):
        assert record.keys() == expected.keys()
        for key, value in expected.items():
            assert record[key] == (None if value is None else pytest.approx(value, abs=1e-5)), key


@pytest.mark.dist
def test_split_teachers_and_dictionaries_give_the_same_targets(
    tiny_world: Path, tmp_path: Path, runs: Path
) -> None:
    """Catches a draw or a ranking over a part of the dictionary, and a teacher that is not whole."""
    split = {"parallel__tp": 2, "parallel__shard_teacher": True}
    changes: dict[str, dict[str, Any]] = {
        "activation": {"parallel__shard_sae": True},
        "random": {"parallel__shard_sae": True},
        "every 2": {"parallel__shard_sae": True},
        "cosine": {},
    }
    train_all([variant(tiny_world, tmp_path / name, name, **split, **changes[name]) for name in changes], 2)
    for name in changes:
        for record, expected in zip(records(tmp_path / name), records(runs / "one" / name), strict=True):
            assert record == pytest.approx(expected, abs=1e-5), name


@pytest.mark.dist
@pytest.mark.parametrize("name", ["kd", "every 2", "cosine"])
def test_resumed_run_equals_the_uninterrupted_one_bitwise(
    name: str, tiny_world: Path, tmp_path: Path, runs: Path
) -> None:
    """Catches a lambda that starts anew, or a weight that a checkpoint does not hold."""
    config = variant(tiny_world, tmp_path / "parts", name)

    def in_parts(world: World) -> list[str]:
        return [train(config, world, StopAfter(polls)) for polls in (1, 99)]

    assert run_ranks(in_parts, 1) == [["stopped", "finished"]]
    assert records(tmp_path / "parts") == records(runs / "one" / name)
    published = [root / "model" / "model.safetensors" for root in (tmp_path / "parts", runs / "one" / name)]
    assert published[0].read_bytes() == published[1].read_bytes()


def test_what_is_published_is_what_was_trained(runs: Path) -> None:
    """Catches a student that comes back as another one; a distilled one is a plain GPT-2."""
    kinds = {name: type(load_model(runs / "one" / name)).__name__ for name in VARIANTS}
    assert Counter(kinds.values()) == {"GPT2": 1, "PauseGPT2": 1, "CoCoMix": 4, "RegressionGPT2": 2}
    assert kinds["kd"] == "GPT2"


# Losses


def batch_of(num_rows: int) -> Batch:
    """Three rows of 17 tokens, of which so many count."""
    return Batch(torch.randint(0, 290, (3, 17), generator=torch.Generator().manual_seed(5)), num_rows)


def trained(config: RunConfig) -> GPT2:
    assert config.model is not None
    model = build_student(config.model, config.insertion)
    randomize(model, seed=0)
    return model


def cross_entropy(model: GPT2, batch: Batch) -> Tensor:
    """Summed over the rows that count."""
    logits = model(batch.tokens[: batch.num_rows, :-1]).logits
    return F.cross_entropy(
        logits.flatten(0, 1), batch.tokens[: batch.num_rows, 1:].flatten(), reduction="sum"
    )


def test_distillation_adds_the_weighted_divergence(tiny_world: Path) -> None:
    """Catches a teacher that reads other tokens, and rows that do not count."""
    kd = KdConfig(teacher=str(tiny_world / "teacher"), weight=0.3, temperature=2.0)
    model, batch = trained(variant(tiny_world, tiny_world, "kd")), batch_of(2)
    objective = DistillationLoss(DistributionExtractor.load(kd, 290, CPU))
    terms = objective(model, batch, step=0, detail=False)
    teacher = load_model(tiny_world / "teacher")
    p, q = ((net(batch.tokens[:2, :-1]).logits / 2).softmax(-1) for net in (teacher, model))
    divergence = 4 * (p * (p / q).log()).sum()
    torch.testing.assert_close(terms.loss, cross_entropy(model, batch) + 0.3 * divergence)
    assert terms.sums["kd_nats"] == pytest.approx(divergence.item(), rel=1e-5)
    assert terms.sums["tokens"] == 2 * 16


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_concept_loss_is_weighted_by_the_step_s_lambda(every: int, step: int, tiny_world: Path) -> None:
    """Catches a lambda that does not fall, and a concept loss whose weight depends on how many there are."""
    config = tiny_config(tiny_world, tiny_world, concepts__every=every)
    assert config.concepts is not None
    weighting = ObjectiveConfig(name="cocomix", concept_weight=0.4, concept_weight_schedule="linear")
    extractor = TargetExtractor.load(config.concepts, CPU)
    objective = CoCoMixLoss(extractor, weighting, total_steps=5, every=every)
    model, batch = trained(config), batch_of(2)
    assert isinstance(model, CoCoMix)
    terms = objective(model, batch, step=step, detail=True)
    input_ids = batch.tokens[:, :-1]
    targets = extractor(input_ids, batch.tokens[:, 1:])[:2]
    log_probs = model.concept_logits(input_ids[:2]).log_softmax(-1)
    picked = log_probs.gather(-1, targets.clamp_min(0)).masked_fill(targets == MASKED_TARGET, 0)
    mean = -picked.sum() / 3 / (2 * 16 / every)
    total = cross_entropy(model, batch) / 32 + 0.4 * (1 - step / 4) * mean
    torch.testing.assert_close(terms.loss / 32, total)
    assert terms.sums["concept_nats"] / 32 == pytest.approx(mean.item(), rel=1e-5)
    assert objective.settings(step)["concept_weight"] == pytest.approx(0.4 * (1 - step / 4))


def test_lambda_0_mixes_without_targets(tiny_world: Path) -> None:
    """Catches a teacher that is needed for nothing, and concept usage that is no longer seen."""
    config = variant(tiny_world, tiny_world, "no concept loss", concepts__teacher="nowhere")
    assert config.frozen_models == {}
    model, batch = trained(config), batch_of(2)
    terms = NextToken()(model, batch, step=0, detail=True)
    torch.testing.assert_close(terms.loss, cross_entropy(model, batch))
    assert terms.concepts is not None
    assert terms.concepts.targets.shape == (3, 16, 0)
    assert terms.concepts.kept.shape == (3, 16, 5)


@pytest.mark.parametrize("every", [1, 2])
def test_regression_predicts_the_standardised_residual(every: int, tiny_world: Path) -> None:
    """Catches a residual of another layer or token, none standardised, and rows beyond the last."""
    config = variant(tiny_world, tiny_world, "cosine", objective__regression="l2", concepts__every=every)
    assert config.concepts is not None
    assert isinstance(config.insertion, RegressionInsertion)
    model, batch = trained(config), batch_of(2)
    extractor = StateExtractor.load(config.concepts, CPU)
    objective = RegressionLoss(extractor, config.objective, total_steps=5, every=every)
    terms = objective(model, batch, step=0, detail=False)
    teacher, input_ids = load_model(tiny_world / "teacher"), batch.tokens[:2, :-1]
    x = teacher.blocks[0](teacher.wte(input_ids) + teacher.wpe.weight[:16])
    target = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True).sqrt() + 1e-5)
    h = model.run_blocks(model.embed(input_ids), 0, 1)
    u = (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-5) - model.mixer.pre_bias
    distance = (model.mixer.to_state(u) - target).square().mean(-1)[:, every - 1 :: every].mean()
    torch.testing.assert_close(terms.loss / 32, cross_entropy(model, batch) / 32 + 0.1 * distance)


def test_lambda_is_a_function_of_the_step() -> None:
    """Catches a schedule that ends a step early, or one that a single step divides by zero."""

    def weights(schedule: Any, steps: int) -> list[float]:
        config = ObjectiveConfig(name="cocomix", concept_weight=0.2, concept_weight_schedule=schedule)
        return [concept_weight(step, steps, config) for step in range(steps)]

    assert weights("constant", 3) == [0.2] * 3
    assert weights("linear", 5) == pytest.approx([0.2, 0.15, 0.1, 0.05, 0])
    assert weights("cosine", 5) == pytest.approx([0.2, 0.1 + 0.1 * 2**-0.5, 0.1, 0.1 - 0.1 * 2**-0.5, 0])
    assert weights("linear", 1) == [0.2]


# Targets


def targets_of(world: Path, rows: Tensor, **changes: Any) -> tuple[Tensor, TargetExtractor]:
    config = tiny_config(world, world, **{f"concepts__{key}": value for key, value in changes.items()})
    assert config.concepts is not None
    extractor = TargetExtractor.load(config.concepts, CPU)
    return extractor(rows[:, :-1], rows[:, 1:]), extractor


def latents(extractor: TargetExtractor, rows: Tensor) -> Tensor:
    """All M activations (B, T, M) of rows of tokens."""
    x = extractor.teacher.residual_after(rows[:, :-1], 0)
    sae = extractor.sae
    centered = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5) - sae.pre_bias
    scores = F.linear(centered, sae.encoder.weight, sae.latent_bias)
    kth = scores.topk(6, dim=-1).values[..., -1:]
    return scores.where(scores >= kth, 0).relu()


def test_activation_targets_are_the_most_active_latents(tiny_world: Path) -> None:
    """Catches a ranking that still looks at the gradient."""
    rows = batch_of(3).tokens
    targets, extractor = targets_of(tiny_world, rows, targets="activation")
    best = latents(extractor, rows).topk(3, dim=-1)
    assert torch.equal(targets, best.indices.masked_fill(best.values <= 0, MASKED_TARGET))


def test_random_targets_are_active_latents_of_the_window_alone(tiny_world: Path) -> None:
    """Catches a draw that depends on the batch, prefers some latents, or takes one that is not active."""
    rows = torch.randint(0, 290, (40, 17), generator=torch.Generator().manual_seed(6))
    targets, extractor = targets_of(tiny_world, rows, targets="random")
    for half in (slice(0, 20), slice(20, 40)):
        assert torch.equal(extractor(rows[half, :-1], rows[half, 1:]), targets[half])
    active = latents(extractor, rows)
    chosen = torch.zeros_like(active).scatter_(-1, targets.clamp_min(0), 1.0)
    assert (active.gather(-1, targets.clamp_min(0)) > 0)[targets >= 0].all()
    assert (chosen.sum(-1)[(targets >= 0).all(-1)] == 3).all(), "drawn without replacement"
    # 6 latents are active, 3 are drawn: each place in the ranking half of the time, to 4 standard errors.
    ranked = chosen.gather(-1, active.argsort(-1, descending=True)[..., :6]).flatten(0, 1)
    full = (active > 0).sum(-1).flatten() == 6
    shares = ranked[full].mean(0)
    assert (shares - 0.5).abs().max() < 4 * 0.5 / int(full.sum()) ** 0.5
    other = rows.clone()
    other[:, 16] = (other[:, 16] + 1) % 290
    assert torch.equal(extractor(other[:, :-1], other[:, 1:]), targets), "the label is not part of the window"
    other[:, 3] = (other[:, 3] + 1) % 290
    redrawn = extractor(other[:, :-1], other[:, 1:])
    assert (redrawn[:, :3] != targets[:, :3]).any(), "the window's other tokens are"


@pytest.mark.parametrize("apart", [False, True])
def test_a_draw_is_the_token_s_whatever_tokens_have_concepts(apart: bool) -> None:
    """Catches targets on the fly that are not those of labels, which are made for every token."""
    input_ids = torch.arange(24).view(2, 12)
    documents = Documents.ended_by(input_ids, 5) if apart else None
    values, ids = torch.ones(2, 12, 5), torch.arange(5).expand(2, 12, 5)
    everywhere = random_scores(input_ids, values, ids, documents)
    assert torch.equal(
        random_scores(input_ids, values[:, 2::3], ids[:, 2::3], documents), everywhere[:, 2::3]
    )
    assert len(everywhere.unique()) == everywhere.numel()


def test_latents_without_activation_are_never_drawn() -> None:
    """Catches a draw among the K selected latents of which the ReLU left fewer."""
    input_ids = torch.arange(24).view(2, 12)
    values = torch.zeros(2, 12, 5)
    values[..., 1::2] = 1.0
    scores = random_scores(input_ids, values, torch.arange(5).expand(2, 12, 5))
    assert ((scores > 0) == (values > 0)).all()
    assert scores.max() <= 1
    assert scores[values > 0].unique().numel() == 2 * 12 * 2


@pytest.mark.parametrize("selection", ["attribution", "activation"])
def test_targets_of_every_third_token_are_those_of_that_token(selection: str, tiny_world: Path) -> None:
    """Catches targets that are cut at other tokens than the student's concepts."""
    rows = batch_of(3).tokens[:, :16]
    everywhere, extractor = targets_of(tiny_world, rows, targets=selection)
    extractor.config = dataclasses.replace(extractor.config, every=3)
    assert torch.equal(extractor(rows[:, :-1], rows[:, 1:]), everywhere[:, 2::3])


# Refusals

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "cocomix",
        {"concepts__ahead": True, "objective__regression": "l1"},
        "needs targets that are concepts: objective.regression=none, not l1",
    ),
    (
        "cocomix",
        {"concepts__ahead": True, "objective__concept_weight": 0.0},
        "and objective.concept_weight above 0, not 0.0",
    ),
    ("kd", {}, "kd: section is missing, objective.name=kd needs it"),
    ("pause", {}, "pause: section is missing"),
    ("kd", {"kd__teacher": "t", "kd__weight": 0.0}, "kd.weight=0.0 must be above 0"),
    ("kd", {"kd__teacher": "t", "kd__temperature": -1.0}, "kd.temperature=-1.0 must be above 0"),
    ("pause", {"pause__insert_layer": 3}, "pause.insert_layer=3 must be below model.n_layer=3"),
    ("pause", {"pause__insert_layer": 1, "pause__every": 5}, "pause.every=5 must divide data.seq_len=16"),
    ("cocomix", {"concepts__every": 3}, "concepts.every=3 must divide data.seq_len=16"),
    (
        "cocomix",
        {"concepts__every": 8, "parallel__tp": 4},
        "concepts.every=8 x parallel.tp=4 must divide data.seq_len=16",
    ),
    ("cocomix", {"concepts__every": 2, "concepts__mix": "add"}, "every=2 must be 1 with mix=add"),
    (
        "cocomix",
        {"concepts__targets": "random", "concepts__attribution": "abs"},
        "attribution=abs has no meaning",
    ),
    (
        "cocomix",
        {"concepts__mix": "none", "objective__concept_weight": 0.0},
        "concepts.mix=none needs objective.concept_weight above 0",
    ),
    (
        "cocomix",
        {"objective__regression": "l1", "objective__concept_weight": 0.0},
        "objective.regression=l1 needs objective.concept_weight above 0",
    ),
    (
        "cocomix",
        {"objective__regression": "l1", "concepts__targets": "activation"},
        "objective.regression=l1 does not fit concepts.targets=activation",
    ),
    (
        "kd",
        {"kd__teacher": "t", "parallel__shard_teacher": True},
        "parallel.shard_teacher=true does not fit objective.name=kd: the loss reads the teacher's whole head",
    ),
    ("pause", {"pause__insert_layer": 1, "parallel__shard_teacher": True}, "there is no teacher"),
    (
        "cocomix",
        {"objective__regression": "l1", "parallel__shard_sae": True, "parallel__tp": 2},
        "parallel.shard_sae=true does not fit",
    ),
    ("ntp", {"objective__regression": "l1"}, "objective.regression=l1 needs objective.name=cocomix, not ntp"),
    (
        "ntp",
        {"objective__concept_weight_schedule": "linear"},
        "objective.concept_weight_schedule=linear needs objective.name=cocomix, not ntp",
    ),
]


@pytest.mark.parametrize(("objective", "changes", "message"), REFUSED)
def test_what_has_no_meaning_is_refused_in_one_line(
    objective: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Catches a setting without effect, or a traceback in the first step."""
    with pytest.raises(ValueError, match="must|needs|fit|meaning|missing") as refused:
        tiny_config(tmp_path, tmp_path / "run", objective, **changes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_teacher_that_does_not_fit_is_refused(tiny_world: Path) -> None:
    """Catches distributions over different vocabularies, and a state of another width."""
    path = str(tiny_world / "teacher")
    with pytest.raises(ValueError, match=r"model.vocab_size=300 must be 290, the vocabulary of the teacher"):
        DistributionExtractor.load(KdConfig(teacher=path), 300, CPU)
    config = tiny_config(tiny_world, tiny_world).concepts
    assert isinstance(config, ConceptsConfig)
    with pytest.raises(ValueError, match=r"concepts.teacher_width=768 must be 12, the width of the teacher"):
        StateExtractor.load(config, CPU)
