"""FLOPs and parameters: every formula against the products that torch really runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import (
    ConceptsConfig,
    Insertion,
    ModelConfig,
    PauseConfig,
    RegressionInsertion,
    SaeConfig,
)
from trainer.config_io import from_dict, to_dict
from trainer.flops import (
    FlopsPerToken,
    PartFlops,
    SaeShape,
    TeacherShape,
    flops_per_token,
    parameter_count,
    peak_flops,
    sae_flops_per_token,
    sae_parameter_count,
)

T, D, HEADS, LAYERS, V = 6, 8, 2, 4, 22
M, K, INSERT = 40, 3, 1
TEACHER, SAE, SAE_LAYER = TeacherShape(12, 5, 34), SaeShape(56, 5), 2
CONCEPT_POSITIONS = slice(1, None, 2)


def model_config(*, tied_head: bool = True) -> ModelConfig:
    return ModelConfig(
        d_model=D, n_layer=LAYERS, n_head=HEADS, vocab_size=V, n_positions=T, tied_head=tied_head
    )


def concepts_config(insert_layer: int = INSERT, sae_layer: int = SAE_LAYER) -> ConceptsConfig:
    return ConceptsConfig(
        teacher="", sae="", sae_layer=sae_layer, insert_layer=insert_layer, num_concepts=M, top_k=K
    )


def student(*, causal: bool = False, prune: bool = True, insert: int = INSERT) -> FlopsPerToken:
    concepts = concepts_config(insert)
    return flops_per_token(model_config(), concepts, T, TEACHER, SAE, causal=causal, prune_last_block=prune)


class DenseBlock(nn.Module):
    """A GPT-2 block out of plain products; attention masks scores, or (``causal``) never computes them."""

    def __init__(self, width: int, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, queries: slice | list[int] = slice(None)) -> Tensor:
        """x: (S, D) -> (S', D) at the positions that ``queries`` selects."""
        normed = self.norm_1(x)
        projected = (self.query(normed[queries]), *self.key_value(normed).chunk(2, dim=-1))
        heads = zip(*(h.split(x.shape[-1] // HEADS, dim=-1) for h in projected), strict=True)
        positions = range(len(x))[queries] if isinstance(queries, slice) else queries
        mixed = torch.cat([self.attend(q, k, v, positions) for q, k, v in heads], dim=-1)
        x = x[queries] + self.out(mixed)
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm_2(x))))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Sequence[int]) -> Tensor:
        if self.causal:
            rows = [
                torch.softmax(row @ key[: p + 1].T, -1) @ value[: p + 1]
                for row, p in zip(query.split(1), positions, strict=True)
            ]
            return torch.cat(rows)
        hidden = torch.tensor(positions)[:, None] < torch.arange(len(key))
        return torch.softmax((query @ key.T).masked_fill(hidden, -torch.inf), -1) @ value


def residual(positions: int, width: int = D) -> Tensor:
    return torch.randn(positions, width, requires_grad=True)


def count(forward: Callable[[], Tensor], *, backward: bool = True, exact: bool = True) -> PartFlops:
    """FLOPs per token of data that torch counts in ``forward`` and in the backward of its sum."""
    with FlopCounterMode(display=False) as ahead:
        output = forward()
    with FlopCounterMode(display=False) as back:
        if backward:
            output.sum().backward()
    per_token = [divmod(counter.get_total_flops(), T) for counter in (ahead, back)]
    assert not exact or [rest for _, rest in per_token] == [0, 0]
    return PartFlops(per_token[0][0], per_token[1][0])


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_below_the_insertion(causal: bool) -> None:
    """A backward without dX or dW, or an average context that is off by one."""
    block = DenseBlock(D, causal=causal)
    assert (
        student(causal=causal).parts["blocks_below_insertion"] == count(lambda: block(residual(T))) * INSERT
    )


@pytest.mark.parametrize("causal", [False, True])
def test_interleaved_blocks(causal: bool) -> None:
    """Interleaving doubles the linear work and quadruples attention's: forgetting either."""
    block = DenseBlock(D, causal=causal)
    expected = count(lambda: block(residual(2 * T))) * (LAYERS - INSERT)
    assert student(causal=causal, prune=False).parts["blocks_above_insertion"] == expected


@pytest.mark.parametrize("causal", [False, True])
def test_last_block_at_concept_positions_only(causal: bool) -> None:
    """A pruned last block that also drops the token positions' keys, which concepts still read."""
    block = DenseBlock(D, causal=causal)
    pruned = count(lambda: block(residual(2 * T), CONCEPT_POSITIONS))
    assert student(causal=causal, insert=LAYERS - 1).parts["blocks_above_insertion"] == pruned
    whole = count(lambda: block(residual(2 * T))) * (LAYERS - 1 - INSERT)
    assert student(causal=causal).parts["blocks_above_insertion"] == whole + pruned


def test_heads_of_the_student() -> None:
    """A head whose weight gradient is missing; a compress that is counted dense over M concepts."""
    lm_head, concept_head = nn.Linear(D, V, bias=False), nn.Linear(D, M)
    compress, ids = nn.Parameter(torch.randn(M, D)), torch.randint(M, (T, K))
    values = torch.randn(T, 1, K, requires_grad=True)
    parts = student().parts
    assert parts["lm_head"] == count(lambda: lm_head(residual(T)))
    assert parts["concept_head"] == count(lambda: concept_head(residual(T)))
    assert parts["compress"] == count(lambda: values @ compress[ids])
    assert parts["embeddings"] == PartFlops()


@pytest.mark.parametrize("causal", [False, True])
def test_teacher_pays_for_gradients_to_the_residual_only(causal: bool) -> None:
    """Teacher weight gradients counted, or a backward through the blocks up to the SAE's layer."""
    blocks = [
        DenseBlock(TEACHER.d_model, causal=causal).requires_grad_(False) for _ in range(TEACHER.n_layer)
    ]
    head = nn.Linear(TEACHER.d_model, TEACHER.vocab_size, bias=False).requires_grad_(False)

    def run() -> Tensor:
        x = residual(T, TEACHER.d_model).detach()
        for layer, block in enumerate(blocks):
            x = block(x)
            if layer == SAE_LAYER:
                x.requires_grad_()
        return head(x)

    parts = student(causal=causal).parts
    assert parts["teacher_blocks"] + parts["teacher_head"] == count(run)


def test_extraction_after_the_teacher() -> None:
    """Attribution over all M latents, or a backward through the frozen autoencoder."""
    encoder = nn.Linear(TEACHER.d_model, SAE.num_latents)
    decoder, ids = (
        torch.randn(SAE.num_latents, TEACHER.d_model),
        torch.randint(SAE.num_latents, (T, SAE.top_k)),
    )
    x, gradient = torch.randn(T, TEACHER.d_model), torch.randn(T, TEACHER.d_model, 1)
    parts = student().parts
    assert parts["sae_encoder"] == count(lambda: encoder(x), backward=False)
    assert parts["attribution"] == count(lambda: decoder[ids] @ gradient, backward=False)


def test_ntp_and_cached_targets_pay_for_their_parts_only() -> None:
    """A baseline or a cached run that is charged with the teacher."""
    ntp = flops_per_token(model_config(), None, T, causal=False)
    cached = flops_per_token(model_config(), concepts_config(), T, causal=False)
    block, head = DenseBlock(D), nn.Linear(D, V, bias=False)
    assert ntp.parts["blocks"] == count(lambda: block(residual(T))) * LAYERS
    assert ntp.total == (count(lambda: block(residual(T))) * LAYERS + count(lambda: head(residual(T)))).total
    extractor = {"teacher_blocks", "teacher_head", "sae_encoder", "attribution"}
    assert set(student().parts) - set(cached.parts) == extractor
    assert student().total - cached.total == sum(student().parts[name].total for name in extractor)
    assert cached.total == cached.forward + cached.backward


def varied(**changes: object) -> ConceptsConfig:
    return from_dict(ConceptsConfig, {**to_dict(concepts_config()), **changes}, "varied")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_vector_after_every_so_many_tokens(every: int, causal: bool) -> None:
    """A stream that is charged for vectors it has not, or a last block that reads at the wrong places."""
    stream = [t for token in range(T) for t in ([token] if (token + 1) % every else [token, token])]
    read = [position for position in range(len(stream)) if stream[position:].count(stream[position]) == 1]
    block = DenseBlock(D, causal=causal)
    expected = count(lambda: block(residual(len(stream))), exact=False) * (LAYERS - INSERT - 1)
    expected = expected + count(lambda: block(residual(len(stream)), read), exact=False)
    insertions: list[Insertion] = [
        PauseConfig(insert_layer=INSERT, every=every),
        RegressionInsertion(insert_layer=INSERT, width=12, every=every),
        varied(every=every),
    ]
    for insertion in insertions:
        parts = flops_per_token(model_config(), insertion, T, causal=causal).parts
        above = parts["blocks_above_insertion"]
        # Both round down to whole FLOPs per token; one key more or less is 4 * D / T.
        assert above.forward == pytest.approx(expected.forward, abs=LAYERS - INSERT)
        assert above.backward == pytest.approx(expected.backward, abs=2 * (LAYERS - INSERT))
        assert parts["blocks_below_insertion"] == count(lambda: block(residual(T))) * INSERT


@pytest.mark.parametrize("mix", ["add", "none"])
def test_what_needs_no_positions_costs_none(mix: str) -> None:
    """Doubled blocks for vectors that are added, and a compress that nobody reads."""
    parts = flops_per_token(model_config(), varied(mix=mix), T, TEACHER, SAE).parts
    assert parts["blocks"] == flops_per_token(model_config(), None, T).parts["blocks"]
    assert ("compress" in parts) == (mix == "add")
    assert parts["concept_head"] == student().parts["concept_head"]


def test_vectors_are_made_for_their_tokens_only() -> None:
    """A dictionary read at every token although every second one has a concept; a pause that costs a head."""
    whole = flops_per_token(model_config(), varied(), T, TEACHER, SAE).parts
    half = flops_per_token(model_config(), varied(every=2), T, TEACHER, SAE).parts
    for part in ("concept_head", "compress", "sae_encoder", "attribution"):
        assert half[part] * 2 == whole[part]
    assert half["teacher_blocks"] == whole["teacher_blocks"], "every token is read for the loss"
    paused = flops_per_token(model_config(), PauseConfig(insert_layer=INSERT), T)
    assert set(paused.parts) == {"embeddings", "blocks_below_insertion", "blocks_above_insertion", "lm_head"}
    head, back = nn.Linear(D, 12), nn.Linear(12, D)
    state = flops_per_token(model_config(), RegressionInsertion(insert_layer=INSERT, width=12), T).parts
    assert state["state_head"] == count(lambda: head(residual(T)))
    assert state["state_compress"] == count(lambda: back(residual(T, 12)))


def test_without_a_loss_the_concept_head_s_gradient_is_sparse() -> None:
    """A dense backward that the K kept logits do not need."""
    weight, ids = nn.Parameter(torch.randn(M, D)), torch.randint(M, (T, K))
    x = residual(T)
    kept = count(lambda: weight[ids] @ x[:, :, None])
    parts = flops_per_token(model_config(), varied(), T, concept_loss=False).parts
    assert parts["concept_head"].backward == kept.backward
    assert parts["concept_head"].forward == student().parts["concept_head"].forward


@pytest.mark.parametrize("causal", [False, True])
def test_frozen_models_run_no_further_than_they_are_read(causal: bool) -> None:
    """A backward for targets that need no gradient, or blocks above the last one that is read."""
    block = DenseBlock(TEACHER.d_model, causal=causal).requires_grad_(False)
    head = nn.Linear(TEACHER.d_model, TEACHER.vocab_size, bias=False).requires_grad_(False)

    def forward(width: int = TEACHER.d_model) -> Tensor:
        return torch.randn(T, width)

    one = count(lambda: block(forward()), backward=False)
    below = one * (SAE_LAYER + 1)
    kd = flops_per_token(model_config(), None, T, TEACHER, causal=causal).parts
    assert kd["teacher_blocks"] == one * TEACHER.n_layer
    assert kd["teacher_head"] == count(lambda: head(forward()), backward=False)
    regression = RegressionInsertion(insert_layer=INSERT, width=12, sae_layer=SAE_LAYER)
    state = flops_per_token(model_config(), regression, T, TEACHER, causal=causal).parts
    assert state["teacher_blocks"] == below
    assert not {"teacher_head", "sae_encoder", "attribution"} & set(state)
    for targets in ("activation", "random"):
        parts = flops_per_token(model_config(), varied(targets=targets), T, TEACHER, SAE, causal=causal).parts
        assert parts["teacher_blocks"] == below
        assert parts["sae_encoder"] == student().parts["sae_encoder"]
        assert not {"teacher_head", "attribution"} & set(parts)


def test_sae_training() -> None:
    """An SAE step that is charged with a dense backward or with teacher blocks above its layer."""
    config = SaeConfig(teacher="", layer=SAE_LAYER, num_latents=M, top_k=K, aux_top_k=2)
    encoder, decoder = nn.Parameter(torch.randn(M, D)), nn.Parameter(torch.randn(M, D))
    bias, x = nn.Parameter(torch.zeros(D)), torch.randn(T, D)
    parts = sae_flops_per_token(config, TeacherShape(D, 5, V), T, causal=False).parts

    def latents(active: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(M, (T, active))
        return encoder[ids] @ (x - bias)[:, :, None], ids

    def decode(active: int) -> Callable[[], Tensor]:
        values, ids = torch.randn(T, 1, active, requires_grad=True), torch.randint(M, (T, active))
        return lambda: values @ decoder[ids]

    block = DenseBlock(D)
    teacher = count(lambda: block(residual(T)), backward=False)
    assert parts["teacher_blocks"] == teacher * (SAE_LAYER + 1)
    assert parts["sae_encoder"].forward == count(lambda: x @ encoder.T, backward=False).forward
    assert parts["sae_encoder"].backward == count(lambda: latents(K)[0]).backward
    assert parts["sae_decoder"] == count(decode(K))
    auxiliary = count(decode(2))
    assert parts["sae_auxiliary"] == auxiliary + PartFlops(0, count(lambda: latents(2)[0]).backward)


PAPER_RATIOS = {  # width, baseline's width, blocks, heads, insertion: on the fly, from a cache
    "69M": (512, 624, 8, 8, 3, 2.4, 1.24),
    "386M": (1024, 1072, 24, 16, 5, 1.9, 1.70),
    "1.38B": (2048, 2096, 24, 16, 5, 1.8, 1.73),
}


@pytest.mark.parametrize("size", PAPER_RATIOS)
def test_cost_against_the_paper_baseline(size: str) -> None:
    """The published shapes give the known cost of CoCoMix over the parameter-matched NTP baseline."""
    width, baseline_width, n_layer, n_head, insert, on_the_fly, cached = PAPER_RATIOS[size]

    def model(d_model: int) -> ModelConfig:
        return ModelConfig(
            d_model=d_model, n_layer=n_layer, n_head=n_head, vocab_size=50257, n_positions=1024
        )

    concepts = ConceptsConfig(
        teacher="", sae="", sae_layer=5, insert_layer=insert, num_concepts=32768, top_k=32
    )
    baseline = flops_per_token(model(baseline_width), None, 1024).total
    live = flops_per_token(model(width), concepts, 1024, (768, 12, 50257), (32768, 32)).total
    from_cache = flops_per_token(model(width), concepts, 1024).total
    assert live / baseline == pytest.approx(on_the_fly, abs=0.05)
    assert from_cache / baseline == pytest.approx(cached, abs=0.005)


@pytest.mark.parametrize(
    ("sae_layer", "teacher", "sae", "message"),
    [
        (5, TEACHER, SAE, r"concepts\.sae_layer=5"),
        (2, TEACHER, None, "must be given together"),
        (2, None, SAE, "must be given together"),
    ],
)
def test_bad_shapes(sae_layer: int, teacher: TeacherShape | None, sae: SaeShape | None, message: str) -> None:
    """A layer outside the teacher that would count a negative number of blocks."""
    with pytest.raises(ValueError, match=message):
        flops_per_token(model_config(), concepts_config(sae_layer=sae_layer), T, teacher, sae)
    config = SaeConfig(teacher="", layer=5, num_latents=M, top_k=K)
    with pytest.raises(ValueError, match=r"sae\.layer=5"):
        sae_flops_per_token(config, TEACHER, T)


def size_of(*parts: nn.Module | nn.Parameter) -> int:
    tensors = [[p] if isinstance(p, nn.Parameter) else list(p.parameters()) for p in parts]
    return sum(tensor.numel() for group in tensors for tensor in group)


def test_parameter_count() -> None:
    """A forgotten bias or norm, or a tied head that is counted twice."""
    inserted = (varied(mix="none"), PauseConfig(insert_layer=1))
    predicted, paused = (parameter_count(model_config(), insertion) for insertion in inserted)
    assert "compress" not in predicted
    assert predicted["concept_head"] == size_of(nn.Linear(D, M))
    assert paused["pause"] == D
    state = parameter_count(model_config(), RegressionInsertion(insert_layer=1, width=12))
    assert state["state_head"] + state["state_compress"] == size_of(nn.Linear(D, 12), nn.Linear(12, D))
    counts = parameter_count(model_config(), concepts_config())
    embedding, positions = nn.Embedding(V, D), nn.Embedding(T, D)
    assert counts["token_embedding"] == size_of(embedding)
    assert counts["position_embedding"] == size_of(positions)
    assert counts["blocks"] == LAYERS * size_of(DenseBlock(D))
    assert counts["final_norm"] == size_of(nn.LayerNorm(D))
    assert counts["concept_head"] == size_of(nn.Linear(D, M))
    assert counts["compress"] == size_of(nn.Linear(M, D))
    assert counts["concept_pre_bias"] == D
    assert counts["lm_head"] == 0
    untied = parameter_count(model_config(tied_head=False), None)
    assert untied["lm_head"] == size_of(nn.Linear(D, V, bias=False))
    assert "concept_head" not in untied
    tied_decoder = nn.Parameter(torch.empty(M, D))
    assert sae_parameter_count(D, M) == size_of(nn.Linear(D, M), tied_decoder, nn.Parameter(torch.empty(D)))


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "tf32", 156e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H20", "bf16", 148e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA H200 MIG 1g.18gb", "bf16", None),
        ("NVIDIA Quadro P400", "bf16", None),
    ],
)
def test_peak_flops(
    name: str, precision: Literal["bf16", "fp16", "tf32", "fp32"], expected: float | None
) -> None:
    """A name that is a part of another (H20 in H200, L4 in L40S), a variant's or a MIG slice's peak."""
    assert peak_flops(name, precision) == expected
