"""The dense oracle: docs/equations.md written down straight, as the measure of correctness and of speed.

Nothing is left out and nothing is clever: all M latents and concept logits are formed and kept, the
compress product runs over all M columns, every target gets a cross entropy of its own, and the teacher's
backward makes the gradients of its frozen weights too, which nobody reads. Used by tests and benchmarks
only; it shares no code with the path that trains.

Weights are a mapping of published names (``transformer.h.0.attn.c_attn.weight``, linear weights of the
blocks (in, out)) to tensors. Legend: B rows, T tokens, D width, D_t teacher width, V vocabulary,
M concepts, K active latents and kept logits, A targets per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]

NO_LABEL = -100
NO_TARGET = -1


@dataclass(frozen=True, slots=True)
class DenseGPT2:
    """A GPT-2 with a tied head (pre-LN, learned positions, gelu-tanh).

    Args:
        weights: by published name.
        n_layer, n_head: blocks and attention heads.
        eps: of the LayerNorms.
    """

    weights: Weights
    n_layer: int
    n_head: int
    eps: float = 1e-5

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        tokens = F.embedding(input_ids, self.weights["transformer.wte.weight"])
        return tokens + F.embedding(positions, self.weights["transformer.wpe.weight"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm ``name`` of (B, T, D)."""
        weight, bias = self.weights[f"transformer.{name}.weight"], self.weights[f"transformer.{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Product x W + b with W (in, out); x (B, T, in)."""
        weight, bias = self.weights[f"transformer.{name}.weight"], self.weights[f"transformer.{name}.bias"]
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)

    def block(self, x: Tensor, index: int) -> Tensor:
        """One block over all positions of (B, T, D)."""
        name = f"h.{index}"
        qkv = self.linear(self.norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        query, key, value = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.linear(mixed.transpose(1, 2).flatten(2), f"{name}.attn.c_proj")
        inner = self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        return x + self.linear(F.gelu(inner, approximate="tanh"), f"{name}.mlp.c_proj")

    def blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Blocks ``start`` to ``stop - 1``."""
        for index in range(start, stop):
            x = self.block(x, index)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """All next-token logits (B, T, V) of the last block's output."""
        return F.linear(self.norm(x, "ln_f"), self.weights["transformer.wte.weight"])


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy in nats; logits (B, T, V), labels (B, T), ``NO_LABEL`` for none."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )


def standardize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / (unbiased std + 1e-5) over the last dimension, mean and std; fp32."""
    x = x.float()
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), mean, std


def keep_largest(x: Tensor, top_k: int) -> Tensor:
    """All but the K largest entries of x (..., M) at 0."""
    best = x.topk(top_k, dim=-1)
    return torch.zeros_like(x).scatter(-1, best.indices, best.values)


class Targets(NamedTuple):
    """What the teacher says about tokens (B, T)."""

    ids: Tensor
    """(B, T, A) int64, best first; ``NO_TARGET`` where the attribution is not positive."""
    latents: Tensor
    """(B, T, M)."""
    attribution: Tensor
    """(B, T, M)."""
    residual: Tensor
    """(B, T, D_t)."""
    gradient: Tensor
    """(B, T, D_t) of the summed loss."""
    loss: Tensor
    """() summed, nats."""


@dataclass(frozen=True, slots=True)
class DenseExtractor:
    """Teacher and autoencoder.

    Args:
        teacher: its weights require gradients, as in the authors' code.
        sae: ``pre_bias`` (D_t), ``latent_bias`` (M), ``encoder.weight`` (M, D_t) and ``decoder.weight``
            (D_t, M).
        layer: block l after which the residual is read.
        top_k: active latents K.
        num_targets: A.
    """

    teacher: DenseGPT2
    sae: Weights
    layer: int
    top_k: int
    num_targets: int

    def __call__(self, input_ids: Tensor, labels: Tensor) -> Targets:
        """Targets of (B, T) tokens whose next tokens are labels (B, T)."""
        residual, loss = self.forward(input_ids, labels)
        gradient = self.backward(residual, loss)
        return self.select(residual.detach(), gradient, loss.detach())

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Residual with the graph of the whole teacher, and its summed loss."""
        residual = self.teacher.blocks(self.teacher.embed(input_ids), 0, self.layer + 1)
        residual.retain_grad()
        logits = self.teacher.logits(self.teacher.blocks(residual, self.layer + 1, self.teacher.n_layer))
        return residual, next_token_loss(logits, labels)

    def backward(self, residual: Tensor, loss: Tensor) -> Tensor:
        """Gradient of the residual; all teacher weights get one too, which is thrown away."""
        loss.backward()
        for weight in self.teacher.weights.values():
            weight.grad = None
        assert residual.grad is not None
        return residual.grad

    def select(self, residual: Tensor, gradient: Tensor, loss: Tensor) -> Targets:
        """Latents, attribution over all M of them, and the A best."""
        normed, _, _ = standardize(residual)
        pre = F.linear(normed - self.sae["pre_bias"], self.sae["encoder.weight"], self.sae["latent_bias"])
        latents = keep_largest(pre, self.top_k).relu()
        attribution = (gradient.float() @ self.sae["decoder.weight"]) * latents
        best = attribution.topk(self.num_targets, dim=-1)
        ids = best.indices.masked_fill(best.values <= 0, NO_TARGET)
        return Targets(ids, latents, attribution, residual, gradient, loss)


class StudentOutput(NamedTuple):
    """One forward of the student."""

    logits: Tensor
    """(B, T, V)."""
    concept_logits: Tensor
    """(B, T, M)."""


@dataclass(frozen=True, slots=True)
class DenseCoCoMix:
    """The student: concepts of all tokens interleaved before block ``insert_layer``.

    Args:
        trunk: its blocks, embeddings and head; its weights hold the concept path's too.
        insert_layer: i.
        top_k: concept logits K that are kept.
    """

    trunk: DenseGPT2
    insert_layer: int
    top_k: int

    def mix(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Concept logits (B, T, M) of a stream (B, T, D), and the continuous concepts (B, T, D)."""
        weights = self.trunk.weights
        pre_bias = weights["transformer.pre_bias"]
        normed, mean, std = standardize(h)
        concept_logits = F.linear(
            normed - pre_bias,
            weights["transformer.concept_predictor.weight"],
            weights["transformer.concept_predictor.bias"],
        )
        mixed = F.linear(
            keep_largest(concept_logits, self.top_k),
            weights["transformer.compress_layer.weight"],
            weights["transformer.compress_layer.bias"],
        )
        return concept_logits, (mixed + pre_bias) * std + mean

    def __call__(self, input_ids: Tensor) -> StudentOutput:
        """input_ids: (B, T)."""
        trunk = self.trunk
        h = trunk.blocks(trunk.embed(input_ids), 0, self.insert_layer)
        concept_logits, q = self.mix(h)
        x = torch.stack((h, q.to(h.dtype)), dim=2).flatten(1, 2)
        x = trunk.blocks(x, self.insert_layer, trunk.n_layer)
        return StudentOutput(trunk.logits(x[:, 1::2]), concept_logits)


def concept_loss(concept_logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of the mean over A targets of the cross entropy, target by target.

    concept_logits (B, T, M), targets (B, T, A) with ``NO_TARGET`` for none.
    """
    rows = concept_logits.flatten(0, 1).float()
    losses = [
        F.cross_entropy(rows, column, ignore_index=NO_TARGET, reduction="sum")
        for column in targets.flatten(0, 1).unbind(1)
    ]
    return torch.stack(losses).mean()


def cocomix_loss(
    student: DenseCoCoMix, input_ids: Tensor, labels: Tensor, targets: Tensor, concept_weight: float
) -> Tensor:
    """Summed next-token loss + lambda times the summed concept loss."""
    out = student(input_ids)
    return next_token_loss(out.logits, labels) + concept_weight * concept_loss(out.concept_logits, targets)
