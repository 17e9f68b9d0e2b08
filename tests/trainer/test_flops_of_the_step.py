"""FLOPs by formula against what the code that trains really multiplies, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.model.tiny import randomize
from trainer.concepts.attribution import attribution, residual_and_gradient
from trainer.concepts.sae import TopKSae
from trainer.config import ConceptsConfig, ModelConfig
from trainer.flops import SaeShape, TeacherShape, flops_per_token
from trainer.kernels import ops  # noqa: F401  (registers the operators)
from trainer.model.cocomix import CoCoMix
from trainer.model.gpt2 import GPT2
from trainer.model.padding import PADDING

B, T, D, HEADS, LAYERS, V, M, K, A = 2, 8, 16, 2, 4, PADDING, 2 * PADDING, 5, 3
INSERT = 1
TEACHER, SAE_LAYER = TeacherShape(24, 5, 2 * PADDING), 2


SPARSE: dict[Any, Callable[..., int]] = {
    torch.ops.cocomix.sparse_sums: lambda values, ids, weight, **_: 2 * ids[0] * ids[1] * weight[1],
    torch.ops.cocomix.sparse_dots: lambda rows, ids, weight, **_: 2 * ids[0] * ids[1] * weight[1],
    torch.ops.cocomix.sparse_weight_grad: lambda coefficients, ids, rows, *_, **__: (
        2 * ids[0] * ids[1] * rows[1]
    ),
}
"""FLOPs of the operators with K entries per token, which torch's counter does not know."""


@pytest.fixture(autouse=True)
def products_that_are_counted() -> Iterator[None]:
    """Torch's own products: its counter knows neither oneDNN's nor the CPU's flash attention."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.mkldnn.enabled = before


def concepts() -> ConceptsConfig:
    return ConceptsConfig(
        teacher="",
        sae="",
        sae_layer=SAE_LAYER,
        insert_layer=INSERT,
        num_concepts=M,
        top_k=K,
        num_targets=A,
    )


def sizes(d_model: int, n_layer: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(d_model=d_model, n_layer=n_layer, n_head=HEADS, vocab_size=vocab_size, n_positions=T)


def counted(run: Callable[[], object]) -> FlopCounterMode:
    with FlopCounterMode(display=False, custom_mapping=SPARSE) as counter:
        run()
    return counter


def per_token(counter: FlopCounterMode) -> float:
    return counter.get_total_flops() / (B * T)


def of_module(counter: FlopCounterMode, name: str, operation: str = "") -> float:
    counts = counter.get_flop_counts()[name]
    chosen = [count for key, count in counts.items() if operation in ("", key.__name__)]
    return sum(chosen) / (B * T)


def tokens(vocab_size: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def expected(*, causal: bool = False) -> dict[str, float]:
    found = flops_per_token(sizes(D, LAYERS, V), concepts(), T, TEACHER, SaeShape(M, K), causal=causal)
    return {name: part.total for name, part in found.parts.items()}


def test_extraction() -> None:
    """Catches a teacher that runs backward too far or for its weights, and a dense attribution."""
    teacher = GPT2(sizes(TEACHER.d_model, TEACHER.n_layer, TEACHER.vocab_size))
    randomize(teacher, seed=0)
    teacher.requires_grad_(False)
    sae = TopKSae(TEACHER.d_model, M, K).requires_grad_(False)
    torch.nn.init.normal_(sae.encoder.weight)
    ids, labels = tokens(V)
    parts = expected()

    def read() -> None:
        # As residual_and_gradient does; torch's counter cannot follow modules through autograd.grad.
        with torch.no_grad():
            x = teacher.residual_after(ids, SAE_LAYER)
        teacher.loss_from_residual(x.requires_grad_(), labels, SAE_LAYER).backward()
        gradients.append(x.grad)

    gradients: list[Tensor | None] = []
    assert per_token(counted(read)) == parts["teacher_blocks"] + parts["teacher_head"]
    residual = residual_and_gradient(teacher, ids, labels, SAE_LAYER)
    assert gradients[0] is not None
    assert torch.equal(gradients[0], residual.grad)
    assert per_token(counted(lambda: sae.encode(residual.x))) == parts["sae_encoder"]
    values, latents = sae.encode(residual.x)
    scored = counted(lambda: attribution(residual.grad, values, latents, sae.decoder))
    assert per_token(scored) == parts["attribution"]


def test_cocomix() -> None:
    """Catches formulas that are not what is multiplied: interleaved and pruned blocks, both heads."""
    model = CoCoMix(sizes(D, LAYERS, V), concepts())
    randomize(model, seed=0)
    ids, labels = tokens(V)
    targets = torch.randint(M, (B, T, A), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        out = model(ids, labels, targets)
        (out.loss_ntp + out.loss_concept).backward()

    counter, parts = counted(step), expected()
    blocks = [of_module(counter, f"CoCoMix.blocks.{index}") for index in range(LAYERS)]
    assert sum(blocks[:INSERT]) == parts["blocks_below_insertion"]
    assert sum(blocks[INSERT:]) == parts["blocks_above_insertion"]
    dense = [of_module(counter, "CoCoMix.mixer", operation) for operation in ("addmm", "mm")]
    assert sum(dense) == parts["concept_head"]
    sparse = sum(of_module(counter, "Global", operation.__name__) for operation in SPARSE)
    # Gradients of the K kept logits come on top of the dense ones: K rows for the input, K for the weight.
    kept = 2 * 2 * K * D
    assert sparse == parts["compress"] + kept
    student = [
        "blocks_below_insertion",
        "blocks_above_insertion",
        "concept_head",
        "compress",
        "lm_head",
    ]
    assert per_token(counter) == sum(parts[name] for name in student) + kept


def test_next_token_prediction() -> None:
    """Catches a baseline that is charged more or less than it multiplies."""
    model = GPT2(sizes(D, LAYERS, V))
    randomize(model, seed=0)
    ids, labels = tokens(V)
    counter = counted(lambda: model(ids, labels).loss_ntp.backward())
    parts = flops_per_token(sizes(D, LAYERS, V), None, T, causal=False).parts
    blocks = sum(of_module(counter, f"GPT2.blocks.{index}") for index in range(LAYERS))
    assert blocks == parts["blocks"].total
    assert per_token(counter) == blocks + parts["lm_head"].total
