"""Sizes of the frozen teacher, read from its config.json without its weights (torch-free)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from launch.planning.layout import Parameter, Unit, block_parameters
from trainer.config import ConceptsConfig, KdConfig, RunConfig
from trainer.flops import TeacherShape
from trainer.model.padding import padded


@dataclass(frozen=True, slots=True)
class Teacher:
    """A GPT-2 with a sparse autoencoder on one of its residual streams."""

    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    vocab_size: int = 50257
    n_positions: int = 1024
    assumed: bool = True
    """No config.json was found, so these are the sizes of GPT-2 124M."""
    element: int = 4
    """Bytes of a weight and of an activation."""

    @property
    def shape(self) -> TeacherShape:
        """As ``trainer.flops`` takes it."""
        return TeacherShape(self.d_model, self.n_layer, self.vocab_size)

    @property
    def block(self) -> Unit:
        """Weights of one block."""
        return Unit(block_parameters(self.d_model))

    @property
    def root(self) -> Unit:
        """Embeddings with the padded vocabulary and final norm; the head is tied."""
        width = self.d_model
        rows = (padded(self.vocab_size), self.n_positions)
        norm = Parameter((width,))
        return Unit((*(Parameter((count, width)) for count in rows), norm, norm))

    @property
    def elements(self) -> int:
        """Weights."""
        return self.shard_elements(1)

    def shard_elements(self, ranks: int) -> int:
        """Weights on the first of ``ranks`` that hold one teacher between them."""
        blocks = self.n_layer * self.block.shard_elements(1, ranks)
        return blocks + self.root.shard_elements(1, ranks)


def teacher_of(config: RunConfig) -> Teacher | None:
    """The teacher that a student's run loads; GPT-2 124M where there is no readable config.json.

    Raises:
        ValueError: the file is there but lacks a size, the SAE's layer is not below its last block, or a
            distillation's vocabulary is not the student's.
    """
    key = next((key for key in config.frozen_models if key.endswith(".teacher")), None)
    if key is None:
        return None
    path = config.frozen_models[key]
    at = Path(path)
    places = (at / "model" / "config.json", at / "config.json", at.parent / "config.json")
    teacher = next((_read(place) for place in places if place.is_file()), Teacher())
    section = config.kd if key == "kd.teacher" else config.concepts
    assert section is not None
    if isinstance(section, ConceptsConfig) and section.sae_layer > teacher.n_layer - 2:
        raise ValueError(
            f"concepts.sae_layer={section.sae_layer} must be from 0 to {teacher.n_layer - 2}: "
            f"the teacher at {path} has {teacher.n_layer} blocks and one must follow the residual"
        )
    assert config.model is not None
    if isinstance(section, KdConfig) and teacher.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be {teacher.vocab_size}, the vocabulary of the "
            f"teacher at {path}, for objective.name=kd"
        )
    return replace(teacher, element=2 if section.precision == "bf16" else 4)


def _read(path: Path) -> Teacher:
    keys = ("n_embd", "n_layer", "n_head", "vocab_size", "n_positions")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        width, blocks, heads, vocabulary, positions = (int(found[key]) for key in keys)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no GPT-2 configuration with {', '.join(keys)} ({error!r})") from error
    return Teacher(width, blocks, heads, vocabulary, positions, assumed=False)
