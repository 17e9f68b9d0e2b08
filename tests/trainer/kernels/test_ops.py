"""The operators: Triton's kernels and the eager implementation against the dense definitions.

Without a GPU Triton's kernels run in its interpreter (``tests/conftest.py``), on a GPU they are compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.kernels import ops, reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of infinities

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["eager", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations on the device of this machine."""
    name: str = request.param
    if name == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(ops, "triton_serves", lambda tensor: name == "triton")
    return name


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "triton_serves", lambda tensor: True)


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _integers(low: int, high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _distinct(num_rows: int, num_columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rows without equal logits, also in bf16: permutations of so many numbers as bf16 tells apart."""
    assert num_columns <= 256
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_columns, generator=generator) - num_columns // 2 for _ in range(num_rows)]
    return (torch.stack(rows) / 16).to(DEVICE, dtype)


def _targets(num_rows: int, num_targets: int, num_columns: int) -> Tensor:
    """Some masked, some equal, some at the ends."""
    targets = _integers(0, num_columns, num_rows, num_targets, seed=5)
    targets[0] = reference.MASKED_TARGET
    targets[1, -1] = reference.MASKED_TARGET
    targets[2] = num_columns - 1
    targets[3, 0] = 0
    return targets


def _assert_equal_statistics(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    assert torch.equal(found[3], expected[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_columns", "num_valid", "top_k", "num_targets"),
    [
        (53, 53, 5, 3),  # odd in every way, shorter than a block, its last group cut off
        (192, 171, 8, 4),  # padding behind the concepts
        (160, 160, 1, 1),
        (128, 101, 0, 1),  # an LM head
        (40, 38, 9, 2),  # more kept logits than groups of columns
    ],
)
def test_rows_equal_the_dense_definition(
    implementation: str,
    dtype: torch.dtype,
    num_columns: int,
    num_valid: int,
    top_k: int,
    num_targets: int,
) -> None:
    """Catches a wrong mask, group border, order of the kept logits, or gradient of a target given twice."""
    logits = _distinct(4, num_columns, 0, dtype)
    targets = _targets(4, num_targets, num_valid)
    arguments = (None, targets, top_k, num_valid, 0)
    expected = reference.row_statistics(logits, *arguments)
    _assert_equal_statistics(ops.row_statistics(logits, *arguments), expected)
    gradient = logits.clone()
    _assert_equal_statistics(ops.row_loss_(gradient, *arguments), expected)
    dense = reference.row_gradient(logits, None, targets, expected[0], num_valid, 0)
    torch.testing.assert_close(gradient, dense.to(dtype))
    apart = logits.clone()
    ops.row_gradient_(apart, None, targets, expected[0], num_valid, 0)
    torch.testing.assert_close(apart, gradient)


def test_bias_is_added_in_fp32(implementation: str) -> None:
    """Catches a bias that is left out somewhere, or one that is rounded into bf16 logits."""
    logits, bias = _random(4, 70, seed=0, dtype=torch.bfloat16), _random(70, seed=1) / 1024
    targets = _targets(4, 2, 70)
    expected = reference.row_statistics(logits, bias, targets, 6, 70, 0)
    _assert_equal_statistics(ops.row_statistics(logits, bias, targets, 6, 70, 0), expected)
    gradient = logits.clone()
    _assert_equal_statistics(ops.row_loss_(gradient, bias, targets, 6, 70, 0), expected)
    dense = reference.row_gradient(logits, bias, targets, expected[0], 70, 0)
    torch.testing.assert_close(gradient, dense.bfloat16())
    counts = ops.count_above(logits, bias, expected[1], 70)
    real = logits.float() + bias
    assert torch.equal(counts, (real.unsqueeze(1) > expected[1].unsqueeze(2)).sum(2))


@pytest.mark.usefixtures("triton")
def test_rows_of_many_blocks() -> None:
    """Catches an error at a block's border, in the running maximum, or at the paper's K and A."""
    logits = _random(2, 4160, seed=0)
    logits[1, 3000:] += 40  # the maximum rises after the first block
    targets = torch.tensor([[0, 2047, 2048, 4159], [4100, 4100, -1, 2048]], device=DEVICE)
    arguments = (None, targets, 32, 4107, 0)
    expected = reference.row_statistics(logits, *arguments)
    gradient = logits.clone()
    _assert_equal_statistics(ops.row_loss_(gradient, *arguments), expected)
    dense = reference.row_gradient(logits, None, targets, expected[0], 4107, 0)
    torch.testing.assert_close(gradient, dense)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smaller_id_wins_a_tie(dtype: torch.dtype) -> None:
    """Catches ties within a group, between groups or at the K-th place that fall either way."""
    logits = torch.zeros(5, 200, dtype=dtype, device=DEVICE)
    logits[0, [3, 31, 32, 150]] = 1.0
    logits[1, 40:90] = -0.0
    logits[2, :] = -torch.inf
    logits[3] = torch.arange(200, device=DEVICE) // 50
    logits[4, ::2] = -1.0
    targets = torch.zeros(5, 0, dtype=torch.int64, device=DEVICE)
    _, _, values, ids = ops.row_statistics(logits, None, targets, 7, 200, 0)
    expected = reference.row_statistics(logits, None, targets, 7, 200, 0)
    assert torch.equal(ids, expected[3])
    assert torch.equal(values, expected[2])


def test_a_rank_with_padding_only(implementation: str) -> None:
    """Catches NaN from a tensor-parallel rank without a real column, and ids beyond its columns."""
    logits = _random(4, 64, seed=0)
    targets = _targets(4, 2, 64)
    lse, target_logits, values, ids = ops.row_statistics(logits, None, targets, 5, 0, 64)
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    assert torch.equal(target_logits, torch.zeros_like(target_logits))
    assert torch.equal(values, torch.full_like(values, -torch.inf))
    assert ((ids >= 0) & (ids < 64)).all()
    ops.row_gradient_(logits, None, targets, torch.zeros_like(lse), 0, 64)
    assert torch.equal(logits, torch.zeros_like(logits))


def test_columns_split_over_ranks_give_the_whole_rows_gradient(implementation: str) -> None:
    """Catches a target that is looked up, or subtracted, at its place among the columns of another rank."""
    logits, targets = _random(4, 96, seed=0), _targets(4, 3, 90)
    lse, target_logits, *_ = reference.row_statistics(logits, None, targets, 1, 90, 0)
    whole = reference.row_gradient(logits, None, targets, lse, 90, 0)
    picked = torch.zeros_like(target_logits)
    for first in (0, 48):
        part = logits[:, first : first + 48].contiguous()
        num_valid = min(90 - first, 48)
        picked += ops.row_statistics(part, None, targets, 1, num_valid, first)[1]
        ops.row_gradient_(part, None, targets, lse, num_valid, first)
        torch.testing.assert_close(part, whole[:, first : first + 48])
    torch.testing.assert_close(picked, target_logits)


def test_broken_logits_keep_ids_in_range(implementation: str) -> None:
    """Catches an id read from NaN bits, which would fault in the gather behind it."""
    logits = _random(3, 100, seed=0)
    logits[0, 7], logits[1, 50], logits[2] = torch.nan, torch.inf, -torch.nan
    targets = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    lse, _, _, ids = ops.row_statistics(logits, None, targets, 9, 100, 0)
    assert ((ids >= 0) & (ids < 100)).all()
    assert not lse.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 5, 17])
def test_sparse_products_equal_dense_ones(implementation: str, dtype: torch.dtype, top_k: int) -> None:
    """Catches a lost remainder of an unrolled loop, of the width or of the places, and rounded sums."""
    values, ids = _random(6, top_k, seed=0, dtype=dtype), _integers(0, 9, 6, top_k, seed=1)
    weight, rows = _random(9, 300, seed=2, dtype=dtype), _random(6, 300, seed=3, dtype=dtype)
    decoded = ops.sparse_decode(values, ids, weight)
    dense = reference.sparse_decode(values.float(), ids, weight.float())
    torch.testing.assert_close(decoded, dense.to(dtype))
    dots = ops.sparse_dots(rows, ids, weight)
    torch.testing.assert_close(dots, reference.sparse_dots(rows.float(), ids, weight.float()).to(dtype))


@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_equal_dense_ones(implementation: str, dtype: torch.dtype, with_sums: bool) -> None:
    """Catches lost duplicates, ids outside that count somewhere, a concept touched without entries."""
    coefficients, ids = _random(40, 3, seed=0, dtype=dtype), _integers(-2, 13, 40, 3, seed=1)
    ids[ids == 6] = 7  # nobody keeps concept 6
    rows = _random(40, 270, seed=2, dtype=dtype)
    grad, sums = _random(11, 270, seed=3), _random(11, seed=4)
    before, sums_before = grad.clone(), sums.clone()
    ops.add_sparse_grads_(grad, sums if with_sums else None, coefficients, ids, rows)
    here = (ids >= 0) & (ids < 11)
    inside, counted = ids.clamp(0, 10), coefficients.float() * here
    expected = reference.sparse_weight_grad(counted, inside, rows.float(), 11)
    torch.testing.assert_close(grad - before, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(grad[6], before[6])
    ones = torch.ones(40, 1, device=DEVICE)
    added = reference.sparse_weight_grad(counted, inside, ones, 11)
    torch.testing.assert_close(sums - sums_before, added[:, 0] * with_sums, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("triton")
def test_summands_are_added_in_one_order() -> None:
    """Catches atomic sums: they differ from call to call, and resumed runs from uninterrupted ones."""
    coefficients, ids = _random(3000, 2, seed=0), _integers(0, 2, 3000, 2, seed=1)
    rows = _random(3000, 5, seed=2)
    results = []
    for _ in range(3 if DEVICE.type == "cuda" else 2):
        grad, sums = torch.zeros(2, 5, device=DEVICE), torch.zeros(2, device=DEVICE)
        ops.add_sparse_grads_(grad, sums, coefficients, ids, rows)
        results.append((grad, sums))
    expected = reference.sparse_weight_grad(coefficients, ids, rows, 2)
    torch.testing.assert_close(results[0][0], expected, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(grad, results[0][0]) for grad, _ in results)
    assert all(torch.equal(sums, results[0][1]) for _, sums in results)


def _samples() -> list[tuple[Callable[..., object], tuple[object, ...]]]:
    logits, bias, targets = _random(4, 40, seed=0), _random(40, seed=1), _targets(4, 2, 37)
    ids = _integers(0, 9, 4, 3, seed=2)
    values, weight, rows = _random(4, 3, seed=3), _random(9, 16, seed=4), _random(4, 16, seed=5)
    lse = logits.logsumexp(1, keepdim=True)
    return [
        (ops.row_statistics, (logits, bias, targets, 5, 37, 0)),
        (ops.row_loss_, (logits.clone(), None, targets, 5, 37, 0)),
        (ops.row_gradient_, (logits.clone(), bias, targets, lse, 37, 0)),
        (ops.count_above, (logits, bias, _random(4, 2, seed=6), 37)),
        (ops.sparse_decode, (values, ids, weight)),
        (ops.sparse_dots, (rows, ids, weight)),
        (ops.add_sparse_grads_, (weight.clone(), weight[:, 0].clone(), values, ids, rows)),
    ]


@pytest.mark.parametrize("index", range(7))
def test_operators_are_what_they_say(index: int) -> None:
    """Catches a wrong shape function, an undeclared mutation, and what torch.compile cannot trace."""
    operator, arguments = _samples()[index]
    torch.library.opcheck(operator, arguments)


def test_kernels_serve_gpus_where_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a dispatch that takes Triton for CPU tensors, or takes it where it is not installed."""
    with FakeTensorMode():
        on_gpu, on_cpu = torch.empty(1, device="cuda"), torch.empty(1)
        for installed in (True, False):
            monkeypatch.setattr(ops, "has_triton", lambda installed=installed: installed)
            assert ops.triton_serves(on_gpu) is installed
            assert not ops.triton_serves(on_cpu)
