"""A tiny world for runs of seconds: token shards, a random teacher, its autoencoder, configurations."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from data.prepare import PrepareOptions, prepare
from trainer.concepts.sae_formats import save_sae
from trainer.concepts.sae_training import SaeLearner, init_sae_parameter
from trainer.config import ModelConfig, RunConfig, SaeConfig
from trainer.config_io import from_dict
from trainer.metrics.json_lines import read_json_lines
from trainer.model.formats import save_model
from trainer.model.gpt2 import GPT2
from trainer.model.init import initial_value

VOCAB_SIZE = 290
NUM_LATENTS = 37
SEQ_LEN = 16
TEACHER = ModelConfig(d_model=12, n_layer=3, n_head=2, vocab_size=VOCAB_SIZE, n_positions=SEQ_LEN)
SAE = SaeConfig(teacher="", layer=0, num_latents=NUM_LATENTS, top_k=6)

_TIMING_KEYS = frozenset({"tokens_per_s", "mfu", "seconds", "memory_peak_bytes", "data_wait_s"})
_SENTENCE = "the cat sat on a mat and saw a dog run over the hills and far away"


@dataclass(frozen=True, slots=True)
class TinyWorld:
    """Files that runs only read, below one folder."""

    root: Path

    @property
    def shards(self) -> Path:
        """Token shards with their manifest."""
        return self.root / "shards"

    @property
    def teacher(self) -> Path:
        """A GPT-2 with random weights."""
        return self.root / "teacher"

    @property
    def sae(self) -> Path:
        """An autoencoder of the teacher's residuals, in the published format."""
        return self.root / "sae.pt"

    def config(self, run_dir: Path, objective: str = "cocomix", **changes: Any) -> RunConfig:
        """A run of a student of 15,000 weights.

        Args:
            run_dir: where it lives.
            objective: ``cocomix`` or ``ntp``.
            changes: ``section__key=value``.
        """
        sections: dict[str, dict[str, Any]] = {
            "run": {"dir": str(run_dir), "device": "cpu"},
            "data": {"dir": str(self.shards), "seq_len": SEQ_LEN, "lanes": 4},
            "objective": {"name": objective},
            "model": {
                "d_model": 16,
                "n_layer": 3,
                "n_head": 2,
                "vocab_size": VOCAB_SIZE,
                "n_positions": SEQ_LEN,
            },
            "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 2},
            "train": {"steps": 60, "batch_size": 12, "microbatch_size": 6, "precision": "fp32"},
            "validation": {"every_steps": 20},
            "checkpoint": {"every_steps": 8, "keep_last": 2},
            "log": {"every": 1, "tensorboard": False, "peak_tflops": 1.0},
            "parallel": {"timeout_s": 60.0},
        }
        if objective == "cocomix":
            sections["concepts"] = {
                "teacher": str(self.teacher),
                "sae": str(self.sae),
                "sae_layer": SAE.layer,
                "insert_layer": 1,
                "num_concepts": NUM_LATENTS,
                "top_k": 5,
                "num_targets": 3,
            }
        for name, value in changes.items():
            section, key = name.split("__")
            sections.setdefault(section, {})[key] = value
        return from_dict(RunConfig, sections, "the tiny run")

    @staticmethod
    def moved(config: RunConfig, run_dir: Path) -> RunConfig:
        """The same run in another run directory."""
        return replace(config, run=replace(config.run, dir=str(run_dir)))


def write_world(root: Path, seed: int = 0) -> TinyWorld:
    """Write shards, teacher and autoencoder below the new folder ``root``."""
    world = TinyWorld(root)
    generator = random.Random(seed)
    (root / "text").mkdir(parents=True)
    for number in range(40):
        text = " ".join(generator.choices(_SENTENCE.split(), k=generator.randint(40, 160)))
        (root / "text" / f"{number:02d}.txt").write_text(text)
    options = PrepareOptions(
        input=root / "text", out=world.shards, vocab_size=VOCAB_SIZE, val_fraction=0.1, chunk_tokens=64
    )
    with contextlib.redirect_stderr(io.StringIO()):
        prepare(options)
    save_model(world.teacher, _teacher_weights(seed), TEACHER, None)
    learner = SaeLearner(TEACHER.d_model, SAE)
    weights = {
        name: init_sae_parameter(name, tensor.shape, tensor.dtype, seed=seed, num_latents=SAE.num_latents)
        for name, tensor in learner.state_dict().items()
    }
    save_sae(world.sae, learner.to_sae(weights))
    return world


def _teacher_weights(seed: int) -> dict[str, Tensor]:
    """Ten times the usual spread: each token then has another residual, and other concepts."""
    return {
        name: initial_value(name, tensor.shape, tensor.dtype, seed=seed, n_layer=TEACHER.n_layer)
        * (10.0 if tensor.ndim > 1 else 1.0)
        for name, tensor in GPT2(TEACHER).state_dict().items()
    }


def logged_values(run_dir: Path) -> list[dict[str, Any]]:
    """Everything a run logged that does not measure time or memory.

    Floats are logged by ``repr``: equal values are bitwise equal.
    """
    records = read_json_lines(run_dir / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in _TIMING_KEYS} for record in records]


def first_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Say in one line where two logs part; empty when they are equal."""
    for mine, other in zip(ours, theirs, strict=False):
        for key in sorted(mine.keys() | other.keys()):
            if mine.get(key) != other.get(key):
                return f"step {other.get('step')}: {key}={mine.get(key)!r}, undisturbed {other.get(key)!r}"
    if len(ours) != len(theirs):
        return f"{len(ours)} records, undisturbed {len(theirs)}"
    return ""


def read_events(run_dir: Path, kind: str | None = None) -> list[Mapping[str, Any]]:
    """Events of a run, oldest first; of one kind if it is given."""
    return [
        event for event in read_json_lines(run_dir / "events.jsonl") if kind is None or event["kind"] == kind
    ]
