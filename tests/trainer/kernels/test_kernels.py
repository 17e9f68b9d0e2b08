"""Fused operations against their eager definitions: values, every gradient, odd sizes, chunk borders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.kernels import chunks, reference
from trainer.kernels.concept_head import concept_head
from trainer.kernels.lm_head import lm_head_loss
from trainer.kernels.ops import sparse_dots, sparse_weight_grad
from trainer.kernels.reference import IGNORED_LABEL, MASKED_TARGET
from trainer.kernels.sparse_decode import sparse_decode


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, so that a mistake at a chunk's border shows."""
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 500)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _ids(num_rows: int, top_k: int, num_columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(num_columns, generator=generator)[:top_k] for _ in range(num_rows)])


def _assert_gradients_close(fused: Tensor, eager: Tensor, inputs: list[Tensor]) -> None:
    """Gradients of two scalars with respect to the same inputs, relative to their norm."""
    for ours, theirs in zip(
        torch.autograd.grad(fused, inputs), torch.autograd.grad(eager, inputs), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_lm_head_equals_dense_cross_entropy_with_ignored_labels() -> None:
    """Catches a wrong chunk border, a forgotten ignored label, a gradient of the wrong scale."""
    hidden = _random(37, 16, seed=0).float().requires_grad_()
    weight = _random(101, 16, seed=1).float().requires_grad_()
    labels = torch.randint(0, 101, (37,), generator=torch.Generator().manual_seed(2))
    labels[[0, 11, 36]] = IGNORED_LABEL
    fused, eager = lm_head_loss(hidden, weight, labels, 101), reference.lm_head(hidden, weight, labels)
    torch.testing.assert_close(fused, eager)
    _assert_gradients_close(fused * 0.3, eager * 0.3, [hidden, weight])


def test_lm_head_gives_a_frozen_weight_no_gradient() -> None:
    """Catches paying for, or leaking, gradients of the frozen teacher."""
    hidden = _random(9, 8, seed=0).float().requires_grad_()
    weight = _random(21, 8, seed=1).float()
    loss = lm_head_loss(hidden, weight, torch.arange(9), 21)
    loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("with_loss", [True, False])
def test_concept_head_equals_dense_formula_through_loss_and_values(with_loss: bool) -> None:
    """Catches a lost gradient path: dense through the loss, sparse through the K values, or both."""
    hidden = _random(29, 12, seed=0).float().requires_grad_()
    weight = _random(83, 12, seed=1).float().requires_grad_()
    bias = _random(83, seed=2).float().requires_grad_()
    targets = _ids(29, 3, 83)
    targets[4, 1:] = MASKED_TARGET
    targets[28] = MASKED_TARGET
    out = concept_head(hidden, weight, bias, targets if with_loss else None, 5)
    loss, values, ids = reference.concept_head(hidden, weight, bias, targets, 5)
    assert torch.equal(out.ids, ids)
    torch.testing.assert_close(out.values, values)
    mix = _random(29, 5, seed=3).float()
    fused, eager = (out.values * mix).sum(), (values * mix).sum()
    if with_loss:
        torch.testing.assert_close(out.loss, loss)
        fused, eager = fused + 0.1 * out.loss, eager + 0.1 * loss
    _assert_gradients_close(fused, eager, [hidden, weight, bias])


def test_concept_head_loss_alone_trains_it() -> None:
    """Catches a backward that needs a gradient of the values."""
    hidden = _random(6, 4, seed=0).float().requires_grad_()
    weight, bias = _random(19, 4, seed=1).float().requires_grad_(), torch.zeros(19, requires_grad=True)
    targets = _ids(6, 2, 19)
    fused = concept_head(hidden, weight, bias, targets, 3).loss
    _assert_gradients_close(
        fused, reference.concept_head(hidden, weight, bias, targets, 3)[0], [hidden, weight, bias]
    )


def test_concept_head_ranks_targets_among_all_concepts() -> None:
    """Catches ranks that start at 0, that count masked targets, or that look at the top K only."""
    hidden, weight = _random(13, 6, seed=0).float(), _random(40, 6, seed=1).float()
    targets = _ids(13, 2, 40)
    targets[5, 0] = MASKED_TARGET
    out = concept_head(hidden, weight, torch.zeros(40), targets, 4, with_ranks=True)
    order = (hidden @ weight.t()).argsort(dim=1, descending=True)
    ranks = [
        order[row].tolist().index(target) + 1
        for row in range(13)
        for target in targets[row].tolist()
        if target != MASKED_TARGET
    ]
    assert out.rank_sum.item() == sum(ranks)


def test_sparse_products_equal_dense_ones() -> None:
    """Catches lost duplicates: two tokens that keep the same concept must both count."""
    values, ids = _random(50, 4, seed=0).float(), _ids(50, 4, 9)
    weight, rows = _random(9, 16, seed=1).float(), _random(50, 16, seed=2).float()
    torch.testing.assert_close(sparse_dots(rows, ids, weight), reference.sparse_dots(rows, ids, weight))
    torch.testing.assert_close(
        sparse_weight_grad(values, ids, rows, 9)[0], reference.sparse_weight_grad(values, ids, rows, 9)
    )


def test_sparse_decode_equals_dense_formula_with_gradients() -> None:
    """Catches a wrong gradient of the values or of the stored rows."""
    values = _random(20, 4, seed=0).float().requires_grad_()
    weight = _random(9, 16, seed=1).float().requires_grad_()
    ids = _ids(20, 4, 9)
    fused, eager = sparse_decode(values, ids, weight), reference.sparse_decode(values, ids, weight)
    torch.testing.assert_close(fused, eager)
    mix = _random(20, 16, seed=3).float()
    _assert_gradients_close((fused * mix).sum(), (eager * mix).sum(), [values, weight])


def test_bf16_weights_accumulate_their_gradient_in_fp32() -> None:
    """Catches a sum in bf16, which stalls at 256 equal summands: here 2,000 tokens keep one concept."""
    values = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    sparse_decode(values, torch.zeros(2000, 1, dtype=torch.int64), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0, 0].item() == 2000
