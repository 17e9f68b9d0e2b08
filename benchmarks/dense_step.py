"""The training step of the dense oracle, on the weights of a student that trains beside it.

Its optimizer, clipping and mixed precision are torch's own: fused AdamW, ``clip_grad_norm_`` and, for a
student in bf16, autocast over fp32 weights. The teacher is fp32 whatever the student is, as the authors'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import reference_dense
from benchmarks.reference_dense import DenseCoCoMix, DenseExtractor, DenseGPT2, Targets
from benchmarks.students import Student
from data.batch import Batch
from parallel.engine import allocate_state
from trainer.concepts.extractor import TargetExtractor
from trainer.concepts.sae import TopKSae
from trainer.model.formats import Layout, to_hf
from trainer.objective import CoCoMixLoss, split_tokens


class DenseResult(NamedTuple):
    """What one step computed."""

    targets: Targets
    loss: Tensor
    """() mean over tokens, nats."""
    grad_norm: Tensor
    """() before clipping."""


@dataclass(frozen=True, slots=True)
class DenseStep:
    """The oracle with its optimizer.

    Args:
        extractor, student: on weights of their own, which require gradients, also the teacher's.
        optimizer: over the student's weights; its state is allocated.
        concept_weight: lambda.
        clip_norm: largest gradient norm.
        mixed_precision: whether the student computes in bf16.
    """

    extractor: DenseExtractor
    student: DenseCoCoMix
    optimizer: torch.optim.AdamW
    concept_weight: float
    clip_norm: float
    mixed_precision: bool

    @classmethod
    def like(cls, student: Student) -> DenseStep:
        """The oracle of a CoCoMix student with copies of its weights, of its teacher's and autoencoder's."""
        config = student.config
        assert config.model is not None
        assert config.concepts is not None
        layout = Layout(config.model, config.concepts.num_concepts)
        weights = _trained(to_hf(student.engine.gather(), layout))
        trunk = DenseGPT2(weights, config.model.n_layer, config.model.n_head, config.model.layer_norm_eps)
        optim = config.optim
        optimizer = torch.optim.AdamW(
            weights.values(),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        allocate_state(optimizer, weights.values())
        return cls(
            extractor=dense_extractor(extractor_of(student)),
            student=DenseCoCoMix(trunk, config.concepts.insert_layer, config.concepts.top_k),
            optimizer=optimizer,
            concept_weight=config.objective.concept_weight,
            clip_norm=optim.clip_norm,
            mixed_precision=config.train.precision == "bf16",
        )

    def __call__(self, batch: Batch) -> DenseResult:
        """One optimizer step over all rows of a batch at once."""
        input_ids, labels = split_tokens(batch)[:2]
        targets = self.extractor(input_ids, labels)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed_precision):
            total = reference_dense.cocomix_loss(
                self.student, input_ids, labels, targets.ids, self.concept_weight
            )
        loss = total / labels.numel()
        self.backward(loss)
        return DenseResult(targets, loss.detach(), self.update())

    def backward(self, loss: Tensor) -> None:
        """Gradients of all weights of the student."""
        loss.backward()

    def update(self) -> Tensor:
        """Clip, update and clear the gradients; returns their norm."""
        norm = nn.utils.clip_grad_norm_(self.student.trunk.weights.values(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def extractor_of(student: Student) -> TargetExtractor:
    """Teacher and autoencoder of a CoCoMix student."""
    assert isinstance(student.objective, CoCoMixLoss)
    assert student.objective.extractor is not None
    return student.objective.extractor


def dense_extractor(extractor: TargetExtractor) -> DenseExtractor:
    """The oracle of an extractor, with fp32 copies of its weights."""
    teacher, concepts = extractor.teacher, extractor.config
    weights = to_hf({name: w.float() for name, w in teacher.state_dict().items()}, Layout.of(teacher))
    sizes = teacher.config
    return DenseExtractor(
        teacher=DenseGPT2(_trained(weights), sizes.n_layer, sizes.n_head, sizes.layer_norm_eps),
        sae=_published(extractor.sae),
        layer=concepts.sae_layer,
        top_k=concepts.top_k,
        num_targets=concepts.num_targets,
    )


def _trained(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}


def _published(sae: TopKSae) -> dict[str, Tensor]:
    rows = slice(sae.num_latents)
    return {
        "pre_bias": sae.pre_bias.detach().clone(),
        "latent_bias": sae.latent_bias.detach()[rows].clone(),
        "encoder.weight": sae.encoder.weight.detach()[rows].clone(),
        "decoder.weight": sae.decoder.detach()[rows].t().contiguous(),
    }
