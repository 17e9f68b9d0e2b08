"""The TopK autoencoder against the golden latents and against its dense formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.tensor import TensorGroup
from parallel.world import World
from tests.ranks import run_ranks
from trainer.concepts.sae import TopKSae
from trainer.concepts.sae_formats import load_sae

GOLDEN = Path(__file__).parents[2] / "golden"


def random_sae(width: int = 24, num_latents: int = 64, top_k: int = 5, *, normalize: bool = True) -> TopKSae:
    generator = torch.Generator().manual_seed(3)
    sae = TopKSae(width, num_latents, top_k, normalize=normalize)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return sae


def dense_latents(sae: TopKSae, x: Tensor) -> Tensor:
    """Latents (N, M) straight from the definition, in fp64."""
    x = x.double()
    if sae.normalize:
        centered = x - x.mean(-1, keepdim=True)
        std = (centered.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
        x = centered / (std + 1e-5)
    scores = (x - sae.pre_bias.double()) @ sae.encoder.weight.double().T + sae.latent_bias.double()
    smallest_kept = scores.sort(dim=-1, descending=True).values[:, sae.top_k - 1 : sae.top_k]
    return torch.where(scores >= smallest_kept, scores.clamp_min(0), 0.0)


def scatter(sae: TopKSae, values: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros(*values.shape[:-1], sae.num_latents).scatter_(-1, ids, values)


def test_latents_equal_the_golden_ones() -> None:
    """Catches a biased standard deviation, an epsilon inside the root, or a wrong order of the biases."""
    sae, expected = load_sae(GOLDEN / "sae.pt"), load_file(GOLDEN / "expected.safetensors")
    values, ids = sae.encode(expected["teacher.resid_hf"])
    assert ids.dtype == torch.int64
    torch.testing.assert_close(scatter(sae, values, ids), expected["sae.latents"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_latents_and_reconstruction_equal_the_dense_formula(normalize: bool) -> None:
    """Catches latents selected after the ReLU, and a reconstruction left in standardised units."""
    sae = random_sae(normalize=normalize)
    x = 3 * torch.randn(40, sae.width, generator=torch.Generator().manual_seed(0)) + 2
    dense = dense_latents(sae, x)
    torch.testing.assert_close(scatter(sae, *sae.encode(x)).double(), dense, atol=1e-5, rtol=1e-5)
    expected = dense @ sae.decoder.double() + sae.pre_bias.double()
    if normalize:
        expected = expected * x.double().std(-1, keepdim=True) + x.double().mean(-1, keepdim=True)
    torch.testing.assert_close(sae.reconstruct(x).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_rows", [1, 7, 30])
def test_chunks_do_not_change_latents(chunk_rows: int) -> None:
    """Catches rows that are lost or reordered where the last chunk is short or holds everything."""
    sae = random_sae()
    x = torch.randn(3, 10, sae.width, generator=torch.Generator().manual_seed(1))
    values, ids = sae.encode(x, chunk_rows)
    assert values.shape == ids.shape == (3, 10, sae.top_k)
    expected = dense_latents(sae, x.reshape(30, -1)).view(3, 10, -1)
    torch.testing.assert_close(scatter(sae, values, ids).double(), expected, atol=1e-5, rtol=1e-5)


def test_encode_never_holds_all_preactivations() -> None:
    """Catches memory that grows as tokens x latents: the largest tensor must stay one chunk."""
    sae = random_sae(num_latents=512)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        sae.encode(torch.randn(256, sae.width), chunk_rows=16)
    assert largest <= max(16 * 512, 512 * sae.width)


def test_bf16_weights_select_on_fp32_scores() -> None:
    """Catches pre-activations rounded to bf16, where hundreds of latents tie and others are chosen."""
    sae = random_sae(num_latents=2048, top_k=16).to(torch.bfloat16)
    x = torch.randn(20, sae.width, generator=torch.Generator().manual_seed(2)).bfloat16()
    values, ids = sae.encode(x)
    assert values.dtype == torch.float32
    expected = dense_latents(sae, x)
    torch.testing.assert_close(scatter(sae, values, ids).double(), expected, atol=1e-4, rtol=1e-4)
    assert sae.reconstruct(x).dtype == torch.bfloat16


def test_decode_is_differentiable_in_latents_and_weights() -> None:
    """Catches a decoder whose sparse sum loses a gradient."""
    sae = random_sae(width=6, num_latents=9, top_k=3)
    values = torch.rand(4, 3, requires_grad=True)
    ids = torch.randint(9, (4, 3), generator=torch.Generator().manual_seed(4))
    upstream = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    inputs = (values, sae.decoder, sae.pre_bias)
    sparse = torch.autograd.grad(sae.decode(values, ids), inputs, upstream)
    dense = torch.autograd.grad(
        (values[..., None] * sae.decoder[ids]).sum(1) + sae.pre_bias, inputs, upstream
    )
    torch.testing.assert_close(sparse, dense)


@pytest.mark.dist
@pytest.mark.parametrize(("num_latents", "top_k", "size"), [(64, 5, 2), (37, 5, 4), (7, 6, 3)])
def test_a_dictionary_over_ranks_is_one(num_latents: int, top_k: int, size: int) -> None:
    """Catches latents chosen per rank, rows that no rank holds, and a bias that every rank adds.

    All numbers are small and whole: sums have no rounding, and many pre-activations tie across ranks.
    """
    whole = random_sae(num_latents=num_latents, top_k=top_k, normalize=False)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_((2 * parameter).round())
    x = torch.randn(3, 10, whole.width, generator=torch.Generator().manual_seed(1)).round()

    def work(world: World) -> tuple[Tensor, Tensor, Tensor, int]:
        part = random_sae(num_latents=num_latents, top_k=top_k, normalize=False)
        part.load_state_dict(whole.state_dict())
        part.split(TensorGroup(dist.group.WORLD))
        values, ids = part.encode(x, chunk_rows=7)
        return values, ids, part.reconstruct(x), part.decoder.numel()

    values, ids = whole.encode(x)
    assert (values[..., 1:] == values[..., :-1]).any()
    for found, chosen, reconstructed, elements in run_ranks(work, size):
        assert torch.equal(chosen, ids)
        assert torch.equal(found, values)
        torch.testing.assert_close(reconstructed, whole.reconstruct(x), atol=1e-5, rtol=1e-5)
        assert elements == -(-num_latents // size) * whole.width


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 4, 1), "width=0 must be at least 2"), ((3, 4, 5), "top_k=5 must be at most num_latents=4")],
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    """Catches a K above M, which would fail later inside topk."""
    with pytest.raises(ValueError, match=message):
        TopKSae(*sizes)
