"""The operators: Triton's kernels and plain torch against the dense definitions.

Without a GPU Triton's kernels run in its interpreter (``tests/conftest.py``), on a GPU they are compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.trainer.model.tiny import tiny_cocomix
from trainer.kernels import ops, reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of infinities

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["torch", "triton"])
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


def _distinct(num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Rows without equal logits, also in bf16: permutations of so many numbers as bf16 tells apart."""
    assert num_columns <= 256
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(num_columns, generator=generator) - num_columns // 2 for _ in range(num_rows)]
    return (torch.stack(rows) / 16).to(DEVICE, dtype)


def _targets(num_rows: int, num_targets: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index, weights and their sums: rows without targets, with one left out, given twice, at the ends."""
    index = _integers(0, num_columns, num_rows, num_targets, seed=5)
    weights = torch.full((num_rows, num_targets), 1 / num_targets, device=DEVICE)
    weights[0] = 0
    weights[1, -1] = 0
    index[2] = num_columns - 1
    index[3, 0] = 0
    return index, weights, weights.sum(1, keepdim=True)


def _assert_equal_summaries(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    assert torch.equal(found[3], expected[3])


@pytest.mark.parametrize("dtype", DTYPES)
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
    logits = _distinct(4, num_columns, dtype)
    logits[:, num_valid:] = -torch.inf
    index, weights, total = _targets(4, num_targets, num_valid)
    expected = reference.summarise(logits, index, weights, top_k)
    _assert_equal_summaries(ops.summarise(logits, index, weights, top_k), expected)
    gradient = logits.clone()
    _assert_equal_summaries(ops.logit_pass_(gradient, index, weights, total, top_k), expected)
    dense = reference.logit_gradient(logits, expected[0], index, weights, total)
    torch.testing.assert_close(gradient, dense.to(dtype))
    ops.logit_gradient_(logits, expected[0], index, weights, total)
    torch.testing.assert_close(logits, gradient)


@pytest.mark.usefixtures("triton")
def test_rows_of_many_blocks() -> None:
    """Catches an error at a block's border, in the running maximum, or at the paper's K and A."""
    logits = _random(2, 8256, seed=0)
    logits[1, 8200:] += 40  # the maximum rises after the first block
    index = torch.tensor([[0, 8191, 8192, 8255], [8200, 8200, 7, 8192]], device=DEVICE)
    weights = torch.tensor([[0.25] * 4, [0.25, 0.25, 0.0, 0.25]], device=DEVICE)
    total = weights.sum(1, keepdim=True)
    expected = reference.summarise(logits, index, weights, 32)
    gradient = logits.clone()
    _assert_equal_summaries(ops.logit_pass_(gradient, index, weights, total, 32), expected)
    dense = reference.logit_gradient(logits, expected[0], index, weights, total)
    torch.testing.assert_close(gradient, dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smaller_id_wins_a_tie(implementation: str, dtype: torch.dtype) -> None:
    """Catches ties within a group, between groups or at the K-th place that fall either way."""
    logits = torch.zeros(4, 200, dtype=dtype, device=DEVICE)
    logits[0, [3, 31, 32, 150]] = 1.0
    logits[1, :40:2] = -0.0
    logits[2] = torch.arange(200, device=DEVICE) // 50
    logits[3, ::2] = -1.0
    index, weights, total = _targets(4, 1, 200)
    expected = reference.summarise(logits, index, weights, 7)
    _assert_equal_summaries(ops.summarise(logits, index, weights, 7), expected)
    best = ops.top_k(logits, 7)
    assert torch.equal(best[0], expected[2])
    assert torch.equal(best[1], expected[3])
    _assert_equal_summaries(ops.logit_pass_(logits, index, weights, total, 7), expected)


def test_a_rank_with_padding_only(implementation: str) -> None:
    """Catches NaN from a tensor-parallel rank without a real column, and ids beyond its columns."""
    logits = torch.full((4, 64), -torch.inf, device=DEVICE)
    index, weights = torch.zeros(4, 2, dtype=torch.int64, device=DEVICE), torch.zeros(4, 2, device=DEVICE)
    lse, target_sum, values, ids = ops.summarise(logits, index, weights, 5)
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    assert torch.equal(target_sum, torch.zeros_like(target_sum))
    assert torch.equal(values, torch.full_like(values, -torch.inf))
    assert ((ids >= 0) & (ids < 64)).all()
    ops.logit_gradient_(logits, torch.zeros_like(lse), index, weights, torch.ones_like(lse))
    assert torch.equal(logits, torch.zeros_like(logits))


def test_broken_logits_keep_ids_in_range(implementation: str) -> None:
    """Catches an id read from NaN bits, which would fault in the gather behind it, and a finite loss."""
    logits = _random(3, 100, seed=0)
    logits[0, 7], logits[1, 50], logits[2] = torch.nan, torch.inf, -torch.nan
    index, weights = torch.ones(3, 1, dtype=torch.int64, device=DEVICE), torch.ones(3, 1, device=DEVICE)
    lse, _, _, ids = ops.summarise(logits, index, weights, 9)
    assert ((ids >= 0) & (ids < 100)).all()
    assert not lse.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 5, 17])
def test_sparse_products_equal_dense_ones(implementation: str, dtype: torch.dtype, top_k: int) -> None:
    """Catches a lost remainder of an unrolled loop, of the width or of the places, and rounded sums."""
    values, ids = _random(6, top_k, seed=0, dtype=dtype), _integers(0, 9, 6, top_k, seed=1)
    weight, rows = _random(9, 300, seed=2, dtype=dtype), _random(6, 300, seed=3, dtype=dtype)
    sums = ops.sparse_sums(values, ids, weight)
    dense = reference.sparse_decode(values.float(), ids, weight.float())
    torch.testing.assert_close(sums, dense.to(dtype))
    dots = ops.sparse_dots(rows, ids, weight)
    torch.testing.assert_close(dots, reference.sparse_dots(rows.float(), ids, weight.float()).to(dtype))


@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_gradients_equal_dense_ones(implementation: str, dtype: torch.dtype, with_sums: bool) -> None:
    """Catches lost duplicates, ids outside that count somewhere, a row without entries left unwritten."""
    coefficients, ids = _random(40, 3, seed=0, dtype=dtype), _integers(-2, 13, 40, 3, seed=1)
    ids[ids == 6] = 7  # nobody keeps concept 6
    rows = _random(40, 270, seed=2, dtype=dtype)
    grad, sums = ops.sparse_weight_grad(coefficients, ids, rows, 11, with_sums)
    inside, counted = ids.clamp(0, 10), coefficients.float() * ((ids >= 0) & (ids < 11))
    expected = reference.sparse_weight_grad(counted, inside, rows.float(), 11)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    assert not grad[6].any()
    added = reference.sparse_weight_grad(counted, inside, torch.ones(40, 1, device=DEVICE), 11)
    torch.testing.assert_close(sums, added[: 11 * with_sums, 0], rtol=1e-5, atol=1e-5)


def test_summands_are_added_in_one_order(implementation: str) -> None:
    """Catches atomic sums: they differ from call to call, and resumed runs from uninterrupted ones."""
    coefficients, ids = _random(3000, 2, seed=0), _integers(0, 2, 3000, 2, seed=1)
    rows = _random(3000, 5, seed=2)
    found = [ops.sparse_weight_grad(coefficients, ids, rows, 2, True) for _ in range(3)]
    expected = reference.sparse_weight_grad(coefficients, ids, rows, 2)
    torch.testing.assert_close(found[0][0], expected, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(grad, found[0][0]) and torch.equal(sums, found[0][1]) for grad, sums in found)


def test_a_students_losses_and_gradients_do_not_depend_on_the_implementation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a call that hands a kernel what only torch understands: strides, types, broadcasts."""
    pytest.importorskip("triton")
    tokens = _integers(0, 61, 2, 7, seed=0)
    targets = _integers(0, 53, 2, 6, 3, seed=1)
    targets[0, :2] = reference.MASKED_TARGET
    found = []
    for serves in (False, True):
        monkeypatch.setattr(ops, "triton_serves", lambda tensor, serves=serves: serves)
        model = tiny_cocomix().to(DEVICE)
        out = model(tokens[:, :-1], tokens[:, 1:], targets)
        assert out.loss_ntp is not None
        assert out.loss_concept is not None
        (out.loss_ntp + 0.1 * out.loss_concept).backward()
        found.append([out.loss_ntp, out.loss_concept, *(weight.grad for weight in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _samples() -> list[tuple[Callable[..., object], tuple[object, ...]]]:
    logits, ids = _random(4, 40, seed=0), _integers(0, 9, 4, 3, seed=2)
    index, weights, total = _targets(4, 2, 37)
    values, weight, rows = _random(4, 3, seed=3), _random(9, 16, seed=4), _random(4, 16, seed=5)
    lse = logits.logsumexp(1, keepdim=True)
    return [
        (ops.logit_pass_, (logits.clone(), index, weights, total, 5)),
        (ops.logit_pass_, (logits.clone(), index, weights, total, 0)),
        (ops.summarise, (logits, index, weights, 5)),
        (ops.top_k, (logits, 5)),
        (ops.logit_gradient_, (logits.clone(), lse, index, weights, total)),
        (ops.sparse_sums, (values, ids, weight)),
        (ops.sparse_dots, (rows, ids, weight)),
        (ops.sparse_weight_grad, (values, ids, rows, 9, True)),
        (ops.sparse_weight_grad, (values, ids, rows, 9, False)),
    ]


@pytest.mark.parametrize("number", range(9))
def test_operators_are_what_they_say(number: int) -> None:
    """Catches a wrong shape function, an undeclared mutation, and what torch.compile cannot trace."""
    operator, arguments = _samples()[number]
    torch.library.opcheck(operator, arguments)


def test_kernels_serve_gpus_where_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a dispatch that takes Triton for CPU tensors, or takes it where it is not installed."""
    with FakeTensorMode():
        on_gpu, on_cpu = torch.empty(1, device="cuda"), torch.empty(1)
        for installed in (True, False):
            monkeypatch.setattr(ops, "has_triton", lambda installed=installed: installed)
            assert ops.triton_serves(on_gpu) is installed
            assert not ops.triton_serves(on_cpu)
