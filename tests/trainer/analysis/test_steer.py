"""Steering against the definition on dense vectors (docs/equations.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.trainer.model.tiny import tiny_cocomix, tiny_gpt2
from trainer.analysis.sampling import Sampling, generate
from trainer.analysis.steer import (
    SteerKept,
    SteerMode,
    SteerRequest,
    SteerResidual,
    Strengths,
    check_concepts,
    combinations,
    parse_steer,
)
from trainer.concepts.sae import TopKSae
from trainer.model.cocomix import CoCoMix
from trainer.model.decoding import Decoder
from trainer.model.gpt2 import GPT2
from trainer.model.mixing import interleave

CPU = torch.device("cpu")
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def dense(values: Tensor, ids: Tensor, num_columns: int) -> Tensor:
    return values.new_zeros(*ids.shape[:-1], num_columns).scatter_(-1, ids, values)


def steered(vector: Tensor, strengths: dict[int, float], mode: SteerMode) -> Tensor:
    """The definition: one coordinate per concept."""
    vector = vector.clone()
    for concept, strength in strengths.items():
        vector[..., concept] = strength * vector[..., concept] if mode == "scale" else strength
    return vector


def student_oracle(model: CoCoMix, ids: list[int], strengths: dict[int, float], mode: SteerMode) -> Tensor:
    """Logits (V,) after ``ids`` with the compressed vector written out over all concepts."""
    mixer = model.mixer
    h = model.run_blocks(model.embed(torch.tensor([ids])), 0, model.insert_layer)
    top = mixer.logits(h).topk(mixer.top_k, dim=-1)
    kept = steered(dense(top.values, top.indices, mixer.num_concepts), strengths, mode)
    _, mean, std = mixer.standardize(h)
    weight = mixer.compress_weight[: mixer.num_concepts]
    q = (kept @ weight + mixer.compress_bias + mixer.pre_bias) * std + mean
    x = model.run_blocks(interleave(h, q), model.insert_layer, model.config.n_layer)
    return model.head_logits(x[:, 1::2], len(ids), last_only=True)[0, -1]


def teacher_oracle(
    model: GPT2, sae: TopKSae, layer: int, ids: list[int], strengths: dict[int, float], mode: SteerMode
) -> Tensor:
    x = model.residual_after(torch.tensor([ids]), layer)
    latents = dense(*sae.encode(x), sae.num_latents)
    x = x + (steered(latents, strengths, mode) - latents) @ sae.decoder * x.std(-1, keepdim=True)
    x = model.run_blocks(x, layer + 1, model.config.n_layer)
    return model.head_logits(x, len(ids), last_only=True)[0, -1]


def tiny_sae(width: int = 16, num_latents: int = 40, top_k: int = 6) -> TopKSae:
    sae = TopKSae(width, num_latents, top_k)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return sae.requires_grad_(False)


def student() -> CoCoMix:
    return tiny_cocomix().eval().requires_grad_(False)


def kept_concepts(model: CoCoMix, ids: list[int]) -> set[int]:
    """Concepts that are kept at some position."""
    return set(model.concept_logits(torch.tensor([ids])).topk(model.mixer.top_k).indices.flatten().tolist())


@pytest.mark.parametrize("mode", ["scale", "set"])
def test_a_steered_student_is_the_definition_at_every_step(mode: SteerMode) -> None:
    """Catches a strength that acts on the wrong row, concept or position, or only on what is new."""
    model = student()
    often = sorted(kept_concepts(model, IDS))[:2]
    rows = [
        {often[0]: -10.0, often[1]: 2.0},
        {often[0]: 0.0, often[1]: 1.0},
        {often[0]: 10.0, often[1]: -3.0},
    ]
    edit = SteerKept(Strengths.of(rows, mode, CPU))
    decoder = Decoder(model, len(IDS) + 1, edit_kept=edit)
    prompts = [IDS[:4], IDS[:2], IDS[:4]]
    logits = decoder.start(prompts)
    seen = [list(prompt) for prompt in prompts]
    for token in [*IDS[4:], None]:
        for row, strengths in enumerate(rows):
            expected = student_oracle(model, seen[row], strengths, mode)
            torch.testing.assert_close(logits[row], expected, atol=3e-5, rtol=0)
        if token is not None:
            logits = decoder.extend(torch.full((3, 1), token))
            seen = [[*ids, token] for ids in seen]
    chosen = [2, 0, 2, 1]
    decoder.select(torch.tensor(chosen))
    logits = decoder.extend(torch.full((4, 1), 7))
    for row, source in enumerate(chosen):
        expected = student_oracle(model, [*seen[source], 7], rows[source], mode)
        torch.testing.assert_close(logits[row], expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("mode", ["scale", "set"])
def test_a_steered_teacher_is_the_definition_at_every_step(mode: SteerMode) -> None:
    """Catches a steered residual without its standard deviation, or with the reconstruction in its place."""
    model = tiny_gpt2().eval().requires_grad_(False)
    sae, layer = tiny_sae(), 1
    active = sae.encode(model.residual_after(torch.tensor([IDS]), layer))[1].flatten().mode().values.item()
    rows = [{int(active): -10.0}, {int(active): 3.0}]
    decoder = Decoder(model, 8, edit_residual=SteerResidual(sae, layer, Strengths.of(rows, mode, CPU)))
    logits = decoder.start([IDS[:5], IDS[:3]])
    seen = [IDS[:5], IDS[:3]]
    for token in (7, 8, 9):
        for row, strengths in enumerate(rows):
            expected = teacher_oracle(model, sae, layer, seen[row], strengths, mode)
            torch.testing.assert_close(logits[row], expected, atol=3e-5, rtol=0)
        logits = decoder.extend(torch.full((2, 1), token))
        seen = [[*ids, token] for ids in seen]


def test_a_strength_of_one_is_no_steering_and_an_absent_concept_cannot_be_scaled() -> None:
    """Catches steering that changes what it should leave; ``set`` must change both."""
    model = student()
    free = Decoder(model, 8).start([IDS])
    kept = kept_concepts(model, IDS)
    absent = min(set(range(model.mixer.num_concepts)) - kept)

    def run(concept: int, strength: float, mode: SteerMode) -> Tensor:
        edit = SteerKept(Strengths.of([{concept: strength}], mode, CPU))
        return Decoder(model, 8, edit_kept=edit).start([IDS])

    assert torch.equal(run(min(kept), 1.0, "scale"), free)
    assert torch.equal(run(absent, 10.0, "scale"), free)
    for changed in (run(min(kept), 0.0, "scale"), run(absent, 5.0, "set"), run(min(kept), 5.0, "set")):
        assert (changed - free).abs().max() > 1e-3


def test_strengths_side_by_side_are_those_of_single_runs() -> None:
    """Catches strengths that are mixed up when rows are repeated for samples or cut into batches."""
    model = student()
    concept = min(kept_concepts(model, IDS))
    rows = combinations([SteerRequest(concept, (-10.0, 0.0, 10.0))])
    sampling = Sampling(temperature=1.2)
    edit = SteerKept(Strengths.of(rows, "set", CPU))

    def run(prompts: list[list[int]], edit: SteerKept, batch_size: int) -> list[list[int]]:
        results = generate(
            model, prompts, sampling, max_new_tokens=9, num_samples=2, edit_kept=edit, batch_size=batch_size
        )
        return [result.ids for result in results]

    together = run([IDS] * 3, edit, 32)
    assert run([IDS] * 3, edit, 4) == together
    single = [run([IDS], SteerKept(Strengths.of([row], "set", CPU)), 32) for row in rows]
    assert [ids for part in single for ids in part] == together
    assert together[0] != together[2] != together[4]


@pytest.mark.parametrize(
    ("text", "concept", "strengths"),
    [
        ("123=5", 123, (5.0,)),
        ("0=-2.5", 0, (-2.5,)),
        ("7=-10:10:5", 7, (-10.0, -5.0, 0.0, 5.0, 10.0)),
        ("7=0:1:0.1", 7, tuple(index * 0.1 for index in range(11))),
        ("7=0:1:0.3", 7, (0.0, 0.3, 0.6, pytest.approx(0.9))),
        ("7=2:2:1", 7, (2.0,)),
    ],
)
def test_requests_are_read(text: str, concept: int, strengths: tuple[float, ...]) -> None:
    """Catches a range that loses its end or gains a step."""
    assert parse_steer(text) == (concept, strengths)


@pytest.mark.parametrize(
    "text",
    ["", "5", "5=", "=5", "x=5", "5=x", "5=1:2", "5=1:2:0", "5=2:1:1", "5=1:2:-1", "5=nan", "5=0:1e9:1"],
)
def test_what_is_no_request_is_refused(text: str) -> None:
    """Catches a typing error that steers something else."""
    with pytest.raises(ValueError, match="must be ID=VALUE or ID=START:STOP:STEP"):
        parse_steer(text)


def test_impossible_requests_are_refused() -> None:
    """Catches an index error on the device, and a product of ranges nobody asked for."""
    with pytest.raises(ValueError, match="--steer 53: concept id must be from 0 to 52"):
        check_concepts([SteerRequest(53, (1.0,))], 53)
    with pytest.raises(ValueError, match="--steer -1: concept id must be from 0"):
        check_concepts([SteerRequest(-1, (1.0,))], 53)
    with pytest.raises(ValueError, match="--steer 2: the concept is given more than once"):
        check_concepts([SteerRequest(2, (1.0,)), SteerRequest(2, (3.0,))], 53)
    with pytest.raises(ValueError, match="--steer 3: only one concept can have a range, 2 has one"):
        check_concepts([SteerRequest(2, (1.0, 2.0)), SteerRequest(3, (3.0, 4.0))], 53)
