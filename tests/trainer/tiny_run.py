"""A complete tiny run: shards, a random teacher, its SAE and configurations over them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from data.prepare import PrepareOptions, prepare
from tests.trainer.model.tiny import randomize
from trainer.concepts.sae_formats import save_sae
from trainer.concepts.sae_training import SaeLearner, init_sae_parameter
from trainer.config import ModelConfig, RunConfig, SaeConfig
from trainer.config_io import from_dict, to_dict
from trainer.model.formats import save_model
from trainer.model.gpt2 import GPT2

VOCAB_SIZE = 290
NUM_LATENTS = 37


def write_tiny_world(root: Path) -> Path:
    """Write ``data/``, ``teacher/`` and ``sae.pt`` below ``root``; returns ``root``."""
    generator = random.Random(0)
    text = "the cat sat on a mat and saw a dog run over the hills and far away"
    words = text.split()
    (root / "text").mkdir(parents=True)
    for number in range(40):
        text = " ".join(generator.choices(words, k=generator.randint(40, 160)))
        (root / "text" / f"{number:02d}.txt").write_text(text)
    prepare(
        PrepareOptions(
            input=root / "text", out=root / "data", vocab_size=VOCAB_SIZE, val_fraction=0.1, chunk_tokens=64
        )
    )
    sizes = ModelConfig(d_model=12, n_layer=3, n_head=2, vocab_size=VOCAB_SIZE, n_positions=16)
    teacher = GPT2(sizes)
    randomize(teacher, seed=11)
    save_model(root / "teacher", teacher.state_dict(), sizes, None)
    learner = SaeLearner(12, SaeConfig(teacher="", layer=0, num_latents=NUM_LATENTS, top_k=6))
    state = {
        name: init_sae_parameter(name, tensor.shape, tensor.dtype, seed=3, num_latents=NUM_LATENTS)
        for name, tensor in learner.state_dict().items()
    }
    save_sae(root / "sae.pt", learner.to_sae({name: torch.as_tensor(value) for name, value in state.items()}))
    return root


def tiny_config(world: Path, run_dir: Path, objective: str = "cocomix", **changes: Any) -> RunConfig:
    """A run of 12 steps of 6 sequences; ``changes`` are ``section__key=value``."""
    sections: dict[str, Any] = {
        "run": {"dir": str(run_dir), "device": "cpu"},
        "data": {"dir": str(world / "data"), "seq_len": 16, "lanes": 4},
        "objective": {"name": objective},
        "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 2},
        "train": {"steps": 12, "batch_size": 6, "microbatch_size": 2, "precision": "fp32"},
        "validation": {"every_steps": 6},
        "checkpoint": {"every_steps": 4},
        "log": {"every": 1, "tensorboard": False, "peak_tflops": 1.0},
        "parallel": {"timeout_s": 60.0},
    }
    if objective == "sae":
        sections["sae"] = {
            "teacher": str(world / "teacher"),
            "layer": 0,
            "num_latents": NUM_LATENTS,
            "top_k": 6,
            "aux_top_k": 4,
            "dead_after_tokens": 200,
        }
    else:
        sections["model"] = {
            "d_model": 16,
            "n_layer": 3,
            "n_head": 2,
            "vocab_size": VOCAB_SIZE,
            "n_positions": 16,
        }
    if objective == "cocomix":
        sections["concepts"] = {
            "teacher": str(world / "teacher"),
            "sae": str(world / "sae.pt"),
            "sae_layer": 0,
            "insert_layer": 1,
            "num_concepts": NUM_LATENTS,
            "top_k": 5,
            "num_targets": 3,
        }
    for name, value in changes.items():
        section, key = name.split("__")
        sections.setdefault(section, {})[key] = value
    return from_dict(RunConfig, sections, "tiny")


def with_changes(config: RunConfig, **changes: Any) -> RunConfig:
    """A copy of a configuration with ``section__key=value`` changed."""
    sections = to_dict(config)
    for name, value in changes.items():
        section, key = name.split("__")
        sections[section][key] = value
    return from_dict(RunConfig, sections, "changed")
