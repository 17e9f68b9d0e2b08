"""fp32 products on tensor cores: precise enough to choose latents by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.trainer.concepts.test_sae import random_sae
from trainer.kernels.split_bf16 import SplitWeight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_errors_are_those_of_the_term_left_out() -> None:
    """Catches a term that is missing or taken twice, which costs eight bits."""
    rows, weight = _random(64, 256, seed=0), _random(512, 256, seed=1)
    exact = rows.double() @ weight.double().t()
    error = SplitWeight(weight).product(rows) - exact
    scale = rows.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    assert (error.abs() / scale).max() < 2**-16
    rounded = rows.bfloat16().double() @ weight.bfloat16().double().t() - exact
    assert (rounded.abs() / scale).max() > 2**-11


def test_the_same_latents_are_chosen() -> None:
    """Catches a loss of precision that selects others: bf16 products do in every seventh token."""
    rows, weight = _random(128, 256, seed=0), _random(8192, 256, seed=1)
    exact = (rows.double() @ weight.double().t()).topk(32).indices.sort(-1).values
    split = SplitWeight(weight).product(rows).topk(32).indices.sort(-1).values
    rounded = (rows.bfloat16().float() @ weight.bfloat16().float().t()).topk(32).indices.sort(-1).values
    assert torch.equal(split, exact)
    assert (rounded != exact).any(1).float().mean() > 0.05


@pytest.mark.gpu
def test_a_gpu_encodes_as_a_cpu() -> None:
    """Catches a product on the GPU that is not the CPU's: its result in bf16, or a transposed part."""
    sae = random_sae(num_latents=2048, top_k=16)
    x = torch.randn(200, sae.width, generator=torch.Generator().manual_seed(2))
    values, ids = sae.encode(x)
    sae.cuda().split_products = True
    on_gpu, ids_on_gpu = sae.encode(x.cuda())
    torch.testing.assert_close(on_gpu.cpu(), values, rtol=1e-4, atol=1e-4)
    assert (ids_on_gpu.cpu() == ids).float().mean() > 0.99
