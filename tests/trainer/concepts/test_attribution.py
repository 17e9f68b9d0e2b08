"""Targets against a full backward pass and the dense formula."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.trainer.model.tiny import tiny_gpt2
from trainer.concepts.attribution import attribution, residual_and_gradient, select_targets
from trainer.concepts.sae import TopKSae
from trainer.kernels.reference import IGNORED_LABEL, MASKED_TARGET


def _batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(3))
    labels = tokens[:, 1:].clone()
    labels[1, -1] = IGNORED_LABEL
    return tokens[:, :-1], labels


def _sae() -> TopKSae:
    sae = TopKSae(16, 53, 6)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return sae.requires_grad_(False)


def test_residual_gradient_equals_a_full_backward_and_touches_no_weight() -> None:
    """Catches a short cut that changes the gradient, and gradients left on the frozen teacher."""
    input_ids, labels = _batch()
    teacher = tiny_gpt2(seed=1, n_layer=4)
    x = teacher.residual_after(input_ids, 1)
    x.retain_grad()
    teacher.loss_from_residual(x, labels, 1).backward()
    assert x.grad is not None
    frozen = tiny_gpt2(seed=1, n_layer=4).requires_grad_(False)
    residual = residual_and_gradient(frozen, input_ids, labels, 1)
    torch.testing.assert_close(residual.grad, x.grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(residual.x, x.detach())
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert not residual.x.requires_grad


def test_attribution_of_active_latents_equals_the_dense_product() -> None:
    """Catches looking at active latents only where an inactive one could count."""
    input_ids, labels = _batch()
    teacher, sae = tiny_gpt2(seed=1, n_layer=4).requires_grad_(False), _sae()
    residual = residual_and_gradient(teacher, input_ids, labels, 1)
    values, ids = sae.encode(residual.x)
    scores = attribution(residual.grad, values, ids, sae.decoder)
    latents = torch.zeros(2, 11, 53).scatter_(-1, ids, values)
    dense = (residual.grad @ sae.decoder.t()) * latents
    torch.testing.assert_close(torch.zeros_like(dense).scatter_(-1, ids, scores), dense)
    expected = dense.topk(3, dim=-1)
    chosen = select_targets(scores, ids, 3)
    assert torch.equal(chosen, expected.indices.masked_fill(expected.values <= 0, MASKED_TARGET))
    assert (chosen[1, -1] == MASKED_TARGET).all(), "a position without a next token has no target"


def test_rankings_masking_and_too_few_latents() -> None:
    """Catches a ranking by the wrong sign, and masks that follow the raw sign instead of the ranked one."""
    scores = torch.tensor([[[0.5, -2.0, 0.0, 1.0]]])
    ids = torch.tensor([[[10, 11, 12, 13]]])
    assert select_targets(scores, ids, 2).tolist() == [[[13, 10]]]
    assert select_targets(scores, ids, 2, ranking="abs").tolist() == [[[11, 13]]]
    assert select_targets(scores, ids, 2, ranking="negative").tolist() == [[[11, MASKED_TARGET]]]
    assert select_targets(scores, ids, 3).tolist() == [[[13, 10, MASKED_TARGET]]]
    assert select_targets(scores, ids, 3, mask_non_positive=False).tolist() == [[[13, 10, 12]]]
    assert select_targets(scores, ids, 5).tolist() == [
        [[13, 10, MASKED_TARGET, MASKED_TARGET, MASKED_TARGET]]
    ]
