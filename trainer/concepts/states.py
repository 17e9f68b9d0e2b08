"""Tokens -> hidden states of a frozen teacher, for objectives that need no autoencoder."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from parallel.tensor import TensorGroup
from trainer.concepts.extractor import load_frozen, load_teacher, share_rows
from trainer.config import ConceptsConfig, KdConfig
from trainer.model.concept_head import standardize
from trainer.model.documents import Documents
from trainer.model.gpt2 import GPT2, TeacherHead


class StateExtractor:
    """Standardised residuals of a teacher, what ``objective.regression`` predicts.

    Args:
        teacher: frozen GPT-2 on the device of the run.
        config: layer, and which tokens have a state.
        tp: ranks that hold the same tokens; each of them runs the teacher on a share of the rows.
    """

    def __init__(self, teacher: GPT2, config: ConceptsConfig, tp: TensorGroup | None = None) -> None:
        self.teacher = teacher
        self.config = config
        self.tp = tp or TensorGroup()

    @classmethod
    def load(
        cls, config: ConceptsConfig, device: torch.device, tp: TensorGroup | None = None
    ) -> StateExtractor:
        """Read the teacher of ``config``.

        Raises:
            ValueError: layer or width do not fit; the message names the key.
            FileNotFoundError: no model there.
        """
        teacher = load_teacher(config.teacher, config.sae_layer, key="concepts.sae_layer")
        width = teacher.config.d_model
        if width != config.teacher_width:
            raise ValueError(
                f"concepts.teacher_width={config.teacher_width} must be {width}, "
                f"the width of the teacher at {config.teacher}"
            )
        return cls(teacher.to(device, _dtype(config.precision)), config, tp)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, documents: Documents | None = None) -> Tensor:
        """(x - mean) / (std + 1e-5) of the residuals of input_ids (B, T): (B, C, D_t) fp32.

        What an autoencoder reads too. Every token has the same scale: of a residual as it is, the row's
        first tokens, whose norm is many times the others', would be most of a distance.
        """
        mine, my_documents = share_rows(input_ids, documents, self.tp)
        every = self.config.every
        x = self.teacher.residual_after(mine, self.config.sae_layer, my_documents)[:, every - 1 :: every]
        return standardize(self.tp.gather_rows(x, len(input_ids)))[0]


class DistributionExtractor:
    """A teacher's final hidden states, beside the head that makes them a distribution over tokens.

    Args:
        teacher: as for :class:`StateExtractor`, of the student's vocabulary.
        config: weight and temperature of the divergence.
        tp: as for :class:`StateExtractor`.
    """

    def __init__(self, teacher: GPT2, config: KdConfig, tp: TensorGroup | None = None) -> None:
        self.teacher = teacher
        self.config = config
        self.tp = tp or TensorGroup()

    @classmethod
    def load(
        cls, config: KdConfig, vocab_size: int, device: torch.device, tp: TensorGroup | None = None
    ) -> DistributionExtractor:
        """Read the teacher of ``config`` for a student of ``vocab_size``.

        Raises:
            ValueError: its vocabulary is another one; the message names the key.
            FileNotFoundError: no model there.
        """
        teacher = load_frozen(config.teacher, key="kd.teacher")
        if teacher.config.vocab_size != vocab_size:
            raise ValueError(
                f"model.vocab_size={vocab_size} must be {teacher.config.vocab_size}, the vocabulary of the "
                f"teacher at {config.teacher}, for objective.name=kd"
            )
        return cls(teacher.to(device, _dtype(config.precision)), config, tp)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, documents: Documents | None = None) -> TeacherHead:
        """What the teacher says of input_ids (B, T), short of its logits."""
        hidden = self.teacher.final_hidden(*share_rows(input_ids, documents, self.tp))
        hidden = self.tp.gather_rows(hidden, len(input_ids))
        weight = self.teacher.head_weight
        return TeacherHead(hidden, weight, self.config.weight, self.config.temperature)


def _dtype(precision: Literal["fp32", "bf16"]) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32
