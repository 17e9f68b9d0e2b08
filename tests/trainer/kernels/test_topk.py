"""The K largest with equal values in a defined order, on one rank and over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.tensor import TensorGroup
from parallel.world import World
from tests.ranks import run_ranks
from trainer.kernels import topk
from trainer.kernels.columns import LocalColumns
from trainer.kernels.spread_topk import join, merge_top_k, pick
from trainer.kernels.topk import TopK, sorted_by_id, top_k


def scores_with_ties(num_rows: int, num_columns: int, num_levels: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_levels, (num_rows, num_columns), generator=generator) - num_levels / 2


def expected(scores: Tensor, k: int) -> TopK:
    """By a stable sort of whole rows."""
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return TopK(values[:, :k], ids[:, :k])


def assert_same(found: TopK, other: TopK) -> None:
    assert torch.equal(found.values, other.values)
    assert torch.equal(found.ids, other.ids)


@pytest.mark.parametrize("num_levels", [1, 3, 1000])
@pytest.mark.parametrize(("num_columns", "k"), [(1, 1), (40, 1), (40, 7), (40, 39), (40, 40), (3000, 32)])
def test_equal_values_come_by_their_id(num_columns: int, k: int, num_levels: int) -> None:
    """Catches torch's own choice among equal values, at the last place and before it."""
    scores = scores_with_ties(50, num_columns, num_levels)
    assert_same(top_k(scores, k), expected(scores, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_columns", [40, 2**16])
def test_half_precision_ties_as_whole_rows_do(dtype: torch.dtype, num_columns: int) -> None:
    """Catches an order of bits that is not the numbers': below 0, zeros of both signs, infinities."""
    scores = torch.randn(20, num_columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[:, ::3] = 0.0
    scores[:, 1::3] *= -0.0
    scores[0, :5] = torch.inf
    scores[1] = -scores[1].abs()
    scores[2, 7:] = -torch.inf
    for k in (1, 7):
        assert_same(top_k(scores, k), expected(scores, k))


def test_ties_of_half_precision_cost_no_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the way for rare ties taken by a dtype in which most rows have one: it sorts whole rows."""
    monkeypatch.setattr(topk, "order_ties", None)
    top_k(scores_with_ties(5, 300, 3).bfloat16(), 7)


@pytest.mark.gpu
@pytest.mark.parametrize("num_levels", [1, 3, 1000])
@pytest.mark.parametrize(("num_rows", "num_columns", "k"), [(50, 40, 7), (1024, 32768, 32), (4, 32768, 32)])
def test_a_gpu_chooses_the_same(num_rows: int, num_columns: int, k: int, num_levels: int) -> None:
    """Catches a selection on the GPU that does not take equal values by their column."""
    scores = scores_with_ties(num_rows, num_columns, num_levels)
    found = top_k(scores.cuda(), k)
    assert_same(TopK(found.values.cpu(), found.ids.cpu()), expected(scores, k))


def test_order_of_a_selection() -> None:
    """Catches ids that do not follow their values; this is what remains to be done after a GPU's topk."""
    scores = scores_with_ties(50, 40, 5)
    best = expected(scores, 9)
    mixed = torch.rand(50, 9, generator=torch.Generator().manual_seed(1)).argsort(-1)
    assert_same(sorted_by_id(best.values.gather(1, mixed), best.ids.gather(1, mixed)), best)


@pytest.mark.dist
@pytest.mark.parametrize(("num_valid", "k"), [(64, 5), (37, 5), (37, 30), (9, 9)])
def test_over_ranks_it_is_that_of_whole_rows(num_valid: int, k: int) -> None:
    """Catches candidates lost where K is above a rank's columns, chosen padding, and order of ties."""
    scores = scores_with_ties(21, num_valid, 6)
    few = scores.masked_fill(torch.arange(num_valid) % 5 > 0, -torch.inf)
    size = 4

    def work(world: World) -> tuple[list[TopK], int]:
        tp, sent = TensorGroup(dist.group.WORLD), 0
        columns = LocalColumns(num_valid, 64 // size, tp)
        mine = columns.mask_padding_(torch.stack([columns.part_of(row) for row in scores]))
        rare = columns.mask_padding_(torch.stack([columns.part_of(row) for row in few]))
        gather = tp.all_gather

        def counted(x: Tensor) -> Tensor:
            nonlocal sent
            sent += x.numel() * x.element_size()
            return gather(x)

        tp.all_gather = counted  # type: ignore[method-assign]
        chunks = [join([pick(rows, k, columns) for rows in part.split(8)]) for part in (mine, rare)]
        return merge_top_k(chunks, [k, k], tp), sent

    for (all_columns, fewer), sent in run_ranks(work, size):
        assert_same(all_columns, expected(scores, k))
        wanted, real = expected(few, k), expected(few, k).values.isfinite()
        assert torch.equal(fewer.values, wanted.values)
        assert torch.equal(fewer.ids[real], wanted.ids[real])
        assert sent == 21 * 2 * (2 * min(k, 64 // size)) * 4
