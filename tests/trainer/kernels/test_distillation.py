"""The distillation head against its eager definition, whole and with the vocabulary spread over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.tensor import TensorGroup
from parallel.world import World
from tests.ranks import run_ranks
from trainer.kernels import chunks, reference
from trainer.kernels.distillation import distillation_loss
from trainer.kernels.reference import IGNORED_LABEL

VOCABULARY, ROWS = 65, 128  # four ranks hold 32 rows each: the third one real row, the last one padding only


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks of a few rows, so that a mistake at a border shows."""
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 1400)
    monkeypatch.setattr(chunks, "_CPU_BLOCK_ELEMENTS", 500)


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "hidden": (37, 16),
        "weight": (ROWS, 16),
        "teacher_hidden": (37, 12),
        "teacher_weight": (ROWS, 12),
    }
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    for name in ("weight", "teacher_weight"):
        tensors[name][VOCABULARY:] = 0
    labels = torch.randint(0, VOCABULARY, (37,), generator=generator)
    labels[[0, 11, 36]] = IGNORED_LABEL
    return {**tensors, "labels": labels}


def _eager(temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both losses, and the gradients of (cross entropy + 0.7 divergence) for hidden and weight."""
    given = _inputs()
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    ce, kl = reference.distillation(
        hidden,
        weight[:VOCABULARY],
        given["teacher_hidden"],
        given["teacher_weight"][:VOCABULARY],
        given["labels"],
        temperature,
    )
    return ce.detach(), kl.detach(), *torch.autograd.grad(ce + 0.7 * kl, [hidden, weight])


def _fused(temperature: float, tp: TensorGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = _inputs()
    hidden = given["hidden"].requires_grad_()
    weight = given["weight"][tp.split(ROWS)].clone().requires_grad_()
    out = distillation_loss(
        hidden,
        weight,
        given["teacher_hidden"],
        given["teacher_weight"],
        given["labels"],
        VOCABULARY,
        divergence_weight=0.7,
        temperature=temperature,
        tp=tp,
    )
    torch.testing.assert_close(out.loss, out.cross_entropy + 0.7 * out.divergence)
    assert not out.cross_entropy.requires_grad
    grad_hidden, grad_weight = torch.autograd.grad(3 * out.loss, [hidden, weight])
    return out.cross_entropy, out.divergence, grad_hidden / 3, grad_weight / 3


def _assert_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert (own - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_dense_formula(temperature: float) -> None:
    """Catches a wrong chunk border, scale or power of the temperature, and padding that counts."""
    _assert_close(_fused(temperature, TensorGroup()), _eager(temperature))


@pytest.mark.dist
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_ranks_with_parts_of_the_vocabulary_compute_the_same(temperature: float) -> None:
    """Catches a log-sum-exp or a divergence of this rank's tokens alone, and NaN on a rank of padding."""

    def on_rank(world: World) -> tuple[Any, ...]:
        return _fused(temperature, TensorGroup(dist.group.WORLD))

    ranks = run_ranks(on_rank, 4)
    ce, kl, _, _ = ranks[0]
    for other in ranks[1:]:
        assert torch.equal(other[0], ce)
        assert torch.equal(other[1], kl)
    # Each rank's gradient of the hidden states is a part of the sum.
    whole = (ce, kl, sum(rank[2] for rank in ranks), torch.cat([rank[3] for rank in ranks]))
    _assert_close(whole, _eager(temperature))


def test_without_gradients_it_keeps_none() -> None:
    """Catches a validation pass that pays for weight gradients, or fails without them."""
    with torch.no_grad():
        given = _inputs()
        out = distillation_loss(
            *(given[name] for name in ("hidden", "weight", "teacher_hidden", "teacher_weight", "labels")),
            VOCABULARY,
            divergence_weight=0.7,
            temperature=1.0,
        )
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.divergence, _eager(1.0)[1])


def test_a_teacher_that_agrees_costs_nothing() -> None:
    """Catches a divergence in the other direction or of unnormalised logits: at the same model it is 0."""
    given = _inputs()
    out = distillation_loss(
        given["hidden"],
        given["weight"],
        given["hidden"],
        given["weight"],
        given["labels"],
        VOCABULARY,
        divergence_weight=1.0,
        temperature=1.0,
    )
    assert out.divergence.abs().item() < 1e-4
