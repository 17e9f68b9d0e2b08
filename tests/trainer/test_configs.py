"""The files in configs/: each loads, round-trips and holds the paper's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import ModelConfig, RunConfig
from trainer.config_io import dump_config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"

# D, L, H, insertion layer, width of the NTP baseline, lr, min_lr, sequences per step, warm-up, steps.
PAPER = {
    "69m": (512, 8, 8, 3, 624, 6e-4, 6e-5, 512, 130, 40_000),
    "386m": (1024, 24, 16, 5, 1072, 3e-4, 3e-5, 512, 130, 40_000),
    "1b": (2048, 24, 16, 5, 2096, 2e-4, 2e-5, 1024, 65, 20_000),
}


def load(name: str) -> RunConfig:
    return load_config(RunConfig, CONFIGS / f"{name}.yaml")


def test_expected_files_exist() -> None:
    """Catches a config that is missing, so that the parametrised tests would pass without it."""
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    demo = {"demo", "demo_ntp", "demo_sae", "demo_teacher"}
    assert names >= demo | set(PAPER) | {f"{size}_ntp" for size in PAPER}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    """Catches a config that no longer fits the dataclasses, and a dump that changes a value."""
    config = load_config(RunConfig, path)
    copy = tmp_path / path.name
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(RunConfig, copy) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_batch_divides(path: Path) -> None:
    """Catches microbatches that do not fill a step on the ranks that the file is written for."""
    train = load_config(RunConfig, path).train
    ranks = 2 if path.stem.startswith("demo") else 8
    assert train.batch_size % (ranks * train.microbatch_size) == 0


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("objective", ["cocomix", "ntp"])
def test_paper_hyper_parameters(size: str, objective: str) -> None:
    """Catches a typo in a number of the paper."""
    width, layers, heads, insert, ntp_width, lr, min_lr, batch, warmup, steps = PAPER[size]
    config = load(size if objective == "cocomix" else f"{size}_ntp")
    model, optim, train = config.model, config.optim, config.train
    assert model is not None
    assert config.objective.name == objective
    assert (model.d_model, model.n_layer, model.n_head) == (
        width if objective == "cocomix" else ntp_width,
        layers,
        heads,
    )
    assert (model.vocab_size, model.n_positions, config.data.seq_len, model.tied_head) == (
        50257,
        1024,
        1024,
        True,
    )
    assert (optim.lr, optim.min_lr, optim.warmup_steps, optim.schedule) == (lr, min_lr, warmup, "cosine")
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip_norm) == ((0.9, 0.95), 1e-8, 0.1, 1.0)
    assert (train.batch_size, train.steps, train.precision) == (batch, steps, "bf16")
    assert (config.concepts is None) == (objective == "ntp")
    if config.concepts is not None:
        concepts = config.concepts
        assert (concepts.insert_layer, concepts.sae_layer) == (insert, 5)
        assert (concepts.num_concepts, concepts.top_k, concepts.num_targets) == (32768, 32, 4)
        assert (concepts.attribution, config.objective.concept_weight) == ("signed", 0.1)


def test_paper_pairs_differ_in_width_only() -> None:
    """Catches a comparison that changes more than it says."""
    for size in PAPER:
        ours, baseline = load(size), load(f"{size}_ntp")
        for section in ("data", "optim", "validation", "parallel", "log"):
            assert getattr(ours, section) == getattr(baseline, section), f"{size}: {section}"


def trunk_parameters(model: ModelConfig) -> int:
    """Weights of a GPT-2 with tied head: V D + P D + L (12 D^2 + 13 D) + 2 D."""
    width = model.d_model
    embeddings = (model.vocab_size + model.n_positions) * width
    return embeddings + model.n_layer * (12 * width**2 + 13 * width) + 2 * width


def test_demo_stages_fit_together() -> None:
    """Catches a demo whose student, SAE and teacher do not belong to each other."""
    teacher, sae, student, ntp = (load(name) for name in ("demo_teacher", "demo_sae", "demo", "demo_ntp"))
    assert teacher.model is not None
    assert sae.sae is not None
    assert student.concepts is not None
    assert len({config.data.dir for config in (teacher, sae, student, ntp)}) == 1
    assert (student.concepts.teacher, student.concepts.sae_layer) == (sae.sae.teacher, sae.sae.layer)
    assert sae.sae.teacher == f"{teacher.run.dir}/model"
    assert student.concepts.sae.startswith(sae.run.dir)
    assert student.concepts.num_concepts == sae.sae.num_latents
    assert sae.sae.layer < teacher.model.n_layer


def test_demo_comparison_is_fair() -> None:
    """Catches a demo whose students see other tokens or differ in parameters by more than 2%."""
    student, ntp = load("demo"), load("demo_ntp")
    assert student.model is not None
    assert ntp.model is not None
    assert student.concepts is not None
    assert (student.data, student.train, student.optim) == (ntp.data, ntp.train, ntp.optim)
    width, concepts = student.model.d_model, student.concepts.num_concepts
    parameters = trunk_parameters(student.model) + 2 * concepts * width + concepts + 2 * width
    assert trunk_parameters(ntp.model) == pytest.approx(parameters, rel=0.02)
