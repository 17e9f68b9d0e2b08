"""Products by oneDNN against torch's own: values, gradients, strides, and when they are used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.kernels.matmul import linear, matmul


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class _Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operations() -> Iterator[_Operations]:
    with _Operations() as mode:
        yield mode


def _strided(rows: int, columns: int, layout: str, seed: int) -> Tensor:
    """The same numbers for every layout."""
    x = _random(rows, columns, seed=seed)
    match layout:
        case "columns":
            return x.t().contiguous().t()
        case "every second row":
            return x.repeat_interleave(2, 0)[::2]
        case "a part of wider rows":
            return F.pad(x, (3, 5))[:, 3:-5]
    return x


LAYOUTS = ("rows", "columns", "every second row", "a part of wider rows")


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_matmul_of_any_strides(left: str, right: str) -> None:
    """Catches strides that oneDNN reads as if they were not there, above and below the threshold."""
    for n in (128, 4):
        a, b = _strided(n, 96, left, seed=0), _strided(96, 130, right, seed=1)
        expected = a.double() @ b.double()
        torch.testing.assert_close(matmul(a, b).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_and_its_gradients_equal_torch(with_bias: bool) -> None:
    """Catches a lost or transposed gradient, and inputs with gaps between their rows."""
    inputs = [_random(2, 80, 128, seed=0), _random(96, 128, seed=1), _random(96, seed=2)][: 2 + with_bias]
    mix = _random(2, 40, 96, seed=3)
    gradients = []
    for function in (linear, F.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(leaves[0][:, ::2], *leaves[1:])
        gradients.append([out, *torch.autograd.grad(out[:, :, :], leaves, mix)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("frozen", ["weight", "x"])
def test_what_is_frozen_costs_neither_gradient_nor_memory(frozen: str) -> None:
    """Catches a frozen teacher that pays for weight gradients or keeps their inputs until backward."""
    x, weight = _random(128, 128, seed=0), _random(128, 128, seed=1)
    (weight if frozen == "x" else x).requires_grad_()
    out = linear(x, weight)
    saved = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]  # type: ignore[union-attr]
    assert [tensor.data_ptr() for tensor in saved] == [(x if frozen == "x" else weight).data_ptr()]
    out.sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (frozen == "weight")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_large_fp32_products_go_to_onednn_and_others_do_not(
    operations: _Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a dispatch that never happens, or that takes bf16 and tiny products along."""
    large, small = torch.ones(128, 128), torch.ones(8, 8)
    matmul(large, large)
    linear(large, large)
    assert operations.names.count("mkldnn::_linear_pointwise") == 2
    operations.names.clear()
    matmul(small, small)
    linear(large.bfloat16(), large.bfloat16())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    matmul(large, large)
    assert "mkldnn::_linear_pointwise" not in operations.names
