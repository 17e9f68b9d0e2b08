"""The student against the definition of its method (docs/equations.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.trainer.model.tiny import tiny_cocomix
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.cocomix import CoCoMix
from trainer.model.mixing import interleave


def _tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def dense_forward(
    model: CoCoMix, input_ids: Tensor, labels: Tensor, targets: Tensor, concept_weight: float
) -> Tensor:
    """Summed loss by the formulas as they stand, with every concept logit, from the same parameters."""
    h = model.run_blocks(model.embed(input_ids), 0, model.insert_layer)
    mixer = model.mixer
    mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
    u = (h - mean) / (std + 1e-5) - mixer.pre_bias
    logits = F.linear(u, mixer.predict.weight[:53], mixer.predict.bias[:53])
    kept = logits.topk(mixer.top_k, dim=-1)
    sparse = torch.zeros_like(logits).scatter(-1, kept.indices, kept.values)
    q = (sparse @ mixer.compress_weight[:53] + mixer.compress_bias + mixer.pre_bias) * std + mean
    stream = torch.stack((h, q), dim=2).reshape(h.shape[0], 2 * h.shape[1], -1)
    out = model.run_blocks(stream, model.insert_layer, model.config.n_layer)[:, 1::2]
    head = model.head_logits(out, out.shape[1], last_only=False).flatten(0, 1)
    loss = F.cross_entropy(head, labels.flatten(), reduction="sum")
    for a in range(targets.shape[-1]):
        loss = loss + concept_weight / targets.shape[-1] * F.cross_entropy(
            logits.flatten(0, 1), targets[..., a].flatten(), ignore_index=MASKED_TARGET, reduction="sum"
        )
    return loss


def test_every_gradient_equals_the_dense_formula() -> None:
    """Catches a missing path through the kept values, mean, std, pre_bias or the compress weight."""
    model = tiny_cocomix()
    tokens = _tokens(2, 14)
    targets = torch.randint(-1, 53, (2, 13, 3), generator=torch.Generator().manual_seed(1))
    dense = dense_forward(model, tokens[:, :-1], tokens[:, 1:], targets, 0.1)
    expected = torch.autograd.grad(dense, list(model.parameters()))
    out = model(tokens[:, :-1], tokens[:, 1:], targets)
    total = out.loss_ntp + 0.1 * out.loss_concept
    torch.testing.assert_close(total, dense)
    for (name, _), ours, theirs in zip(
        model.named_parameters(), torch.autograd.grad(total, list(model.parameters())), expected, strict=True
    ):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9, name


@pytest.mark.parametrize("insert_layer", [0, 1, 2])
def test_changing_a_token_changes_no_logit_before_it(insert_layer: int) -> None:
    """Catches an interleaving that lets a position see a later token or a later concept."""
    model = tiny_cocomix(insert_layer=insert_layer)
    tokens = _tokens(1, 12)
    with torch.no_grad():
        before = model(tokens).logits
        for t in range(12):
            changed = tokens.clone()
            changed[0, t] = (changed[0, t] + 1) % 61
            after = model(changed).logits
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


def test_a_token_sees_earlier_concepts_but_not_its_own() -> None:
    """Catches concepts put before their token: then h_t would see q_t."""
    model = tiny_cocomix(insert_layer=1)
    h, q = torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    with torch.no_grad():
        base = model.run_blocks(interleave(h, q), 1, 3)
        moved = q.clone()
        moved[:, 3] += 1
        after = model.run_blocks(interleave(h, moved), 1, 3)
    first_changed = int((base != after).any(-1)[0].nonzero()[0])
    assert first_changed == 2 * 3 + 1


def test_mixed_concept_changes_the_prediction() -> None:
    """Catches a concept path that is computed but not read."""
    model = tiny_cocomix()
    tokens = _tokens(1, 8)
    with torch.no_grad():
        before = model(tokens).logits
        model.mixer.compress_weight += 1.0
        assert not torch.allclose(before, model(tokens).logits)


def test_last_only_is_the_last_of_all_logits() -> None:
    """Catches generation from a wrong position of the interleaved stream."""
    model = tiny_cocomix()
    tokens = _tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, last_only=True).logits, model(tokens).logits[:, -1:])


def test_recall_counts_targets_among_the_a_largest_logits() -> None:
    """Catches recall over all K kept concepts, or masked targets that count."""
    model = tiny_cocomix()
    tokens = _tokens(1, 7)
    with torch.no_grad():
        best = model.concept_logits(tokens[:, :-1]).topk(3, dim=-1).indices
        targets = best.clone()
        targets[0, 0, 0] = MASKED_TARGET
        targets[0, 1] = (best[0, 1] + 1) % 53
        pairs = zip(targets[0].tolist(), best[0].tolist(), strict=True)
        expected = sum(len(set(chosen) & set(largest)) for chosen, largest in pairs)
        counts = model(tokens[:, :-1], tokens[:, 1:], targets).concepts
    assert counts is not None
    assert counts.num_targets.item() == 6 * 3 - 1
    assert counts.num_recalled.item() == expected
