"""Tensor-parallel collectives and heads against the same computation on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.tensor import TensorGroup
from parallel.world import World
from tests.ranks import run_ranks
from trainer.kernels.concept_head import concept_head
from trainer.kernels.lm_head import lm_head_loss
from trainer.kernels.reference import IGNORED_LABEL, MASKED_TARGET


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _group() -> TensorGroup:
    return TensorGroup(dist.group.WORLD)


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3])
def test_collectives_are_each_others_gradients(size: int) -> None:
    """Catches parts in the wrong order and gradients that are not summed or are summed twice."""

    def work(world: World) -> None:
        tp = _group()
        whole = _random(2, 6 * size, 3 * size, seed=0)
        mine = whole[:, tp.split(6 * size)].clone().requires_grad_()
        gathered = tp.gather_sequence(mine)
        assert torch.equal(gathered, whole)
        weights = _random(size, *whole.shape, seed=1)
        (gathered * weights[tp.rank]).sum().backward()
        torch.testing.assert_close(mine.grad, weights.sum(0)[:, tp.split(6 * size)])

        partial = _random(size, *whole.shape, seed=2)[tp.rank].requires_grad_()
        summed = tp.sum_to_sequence(partial)
        expected = _random(size, *whole.shape, seed=2).sum(0)
        torch.testing.assert_close(summed, expected[:, tp.split(6 * size)])
        back = _random(*whole.shape, seed=3)
        summed.backward(back[:, tp.split(6 * size)])
        torch.testing.assert_close(partial.grad, back)

        columns = whole[..., tp.split(3 * size)].clone().requires_grad_()
        exchanged = tp.columns_to_sequence(columns)
        assert torch.equal(exchanged, whole[:, tp.split(6 * size)])
        exchanged.backward(back[:, tp.split(6 * size)])
        assert torch.equal(columns.grad, back[..., tp.split(3 * size)])

    run_ranks(work, size)


@pytest.mark.dist
@pytest.mark.parametrize("num_rows", [0, 1, 6, 7])
def test_shares_of_rows_come_back(num_rows: int) -> None:
    """Catches rows that are lost, swapped or doubled where the ranks do not divide them."""
    whole = _random(num_rows, 4, seed=0)

    def work(world: World) -> tuple[int, Tensor]:
        tp = _group()
        mine = tp.share_rows(whole)
        return len(mine), tp.gather_rows(2 * mine, num_rows)

    for share, gathered in run_ranks(work, 3):
        assert share == -(-num_rows // 3)
        assert torch.equal(gathered, 2 * whole)


@pytest.mark.dist
def test_summed_parts_get_the_gradient_of_the_sum() -> None:
    """Catches a gradient that is summed over ranks which all computed the same loss."""

    def work(world: World) -> None:
        tp = _group()
        part = _random(3, 5, 4, seed=0)[tp.rank].requires_grad_()
        summed = tp.sum_parts(part)
        torch.testing.assert_close(summed, _random(3, 5, 4, seed=0).sum(0))
        back = _random(5, 4, seed=1)
        summed.backward(back)
        assert torch.equal(part.grad, back)

    run_ranks(work, 3)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


@pytest.mark.dist
@pytest.mark.parametrize("num_valid", [61, 30, 64])
def test_lm_head_over_ranks_equals_one(num_valid: int) -> None:
    """Catches padding that gets probability, also on a rank that holds padding only (30 of 64 on 4)."""
    hidden, labels = _random(11, 5, seed=0), torch.arange(11) % num_valid
    labels[3] = IGNORED_LABEL
    weight = _padded(_random(num_valid, 5, seed=1), 64)

    def work(world: World) -> tuple[Any, ...]:
        tp = _group()
        rows = tp.split(64)
        h, w = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
        loss = lm_head_loss(h, w, labels, num_valid, tp)
        (loss * 0.5).backward()
        assert h.grad is not None
        return loss.detach(), tp.sum(h.grad), w.grad

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = lm_head_loss(h, w, labels, num_valid)
    (expected * 0.5).backward()
    results = run_ranks(work, 4)
    for loss, grad_hidden, _ in results:
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad_hidden, h.grad)
    torch.testing.assert_close(torch.cat([grad for *_, grad in results]), w.grad)


@pytest.mark.dist
@pytest.mark.parametrize("num_valid", [53, 20])
def test_concept_head_over_ranks_equals_one(num_valid: int) -> None:
    """Catches a top-K that is not global, ids that are local, and gradients of values that stay partial."""
    hidden = _random(9, 6, seed=0)
    weight, bias = _padded(_random(num_valid, 6, seed=1), 64), _padded(_random(num_valid, seed=2), 64)
    targets = torch.randint(-1, num_valid, (9, 3), generator=torch.Generator().manual_seed(3))
    targets[4] = MASKED_TARGET
    mix = _random(4, 9, 18, seed=5)

    def run(tp: TensorGroup, rows: slice, weights: Tensor) -> tuple[Any, ...]:
        parameters = [t.clone().requires_grad_() for t in (hidden, weight[rows], bias[rows])]
        out = concept_head(
            *parameters,
            targets,
            18,
            num_concepts=num_valid,
            tp=tp,
            with_ranks=True,  # type: ignore[misc]
        )
        # Each rank reads the values with weights of its own, as it does with its columns of compress.
        ((out.values * weights).sum() + 0.1 * out.loss).backward()
        grads = [parameter.grad for parameter in parameters]
        return out.loss.detach(), out.values.detach(), out.ids, out.rank_sum, *grads

    def work(world: World) -> tuple[Any, ...]:
        tp = _group()
        *facts, grad_hidden, grad_weight, grad_bias = run(tp, tp.split(64), mix[tp.rank])
        return *facts, tp.sum(grad_hidden), grad_weight, grad_bias

    expected = run(TensorGroup(), slice(None), mix.sum(0))
    results = run_ranks(work, 4)
    for result in results:
        assert torch.equal(result[2], expected[2])
        for ours, theirs in zip(result[:5], expected[:5], strict=True):
            torch.testing.assert_close(ours, theirs)
    for index in (5, 6):
        together = torch.cat([result[index] for result in results])
        torch.testing.assert_close(together, expected[index])


@pytest.mark.dist
def test_concept_head_sends_one_gather_per_chunk_of_the_stated_size() -> None:
    """Catches logits, or a second message, on the wire: 2 + 2K numbers of 4 bytes per token and rank."""

    def work(world: World) -> list[int]:
        tp = _group()
        sent: list[int] = []
        gather = tp.all_gather
        tp.all_gather = lambda x: (sent.append(x.numel() * x.element_size()), gather(x))[1]  # type: ignore[method-assign]
        concept_head(
            _random(10, 4, seed=0),
            _random(64, 4, seed=1)[tp.split(64)],
            torch.zeros(32),
            torch.zeros(10, 2, dtype=torch.int64),
            8,
            tp=tp,
        )
        return sent

    assert run_ranks(work, 2) == [[10 * (2 + 2 * 8) * 4]] * 2


def test_uneven_parts_are_refused() -> None:
    """Catches a last part that is silently shorter."""
    tp = TensorGroup()
    tp.size = 3
    with pytest.raises(ValueError, match="10 cannot be split evenly over 3 tensor-parallel ranks"):
        tp.split(10)
