"""Drawing tokens, and continuing prompts with and without a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.trainer.model.tiny import tiny_cocomix, tiny_gpt2
from trainer.analysis.sampling import Continuation, Sampling, continue_tokens, draw, generate
from trainer.model.gpt2 import GPT2

PROMPTS = ([5], [7, 1, 2, 3, 30, 31], [9, 9, 4])
ALL = Sampling(temperature=1.0, top_k=0)


def build(kind: str) -> GPT2:
    return (tiny_cocomix() if kind == "cocomix" else tiny_gpt2()).eval().requires_grad_(False)


def shares(logits: Tensor, sampling: Sampling, points: int = 20_000) -> Tensor:
    """How often each token is drawn when the random numbers are spread evenly over [0, 1)."""
    uniforms = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    drawn = draw(logits.expand(points, -1), uniforms, sampling)
    return torch.bincount(drawn, minlength=len(logits)).double() / points


LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -2.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(temperature: float) -> None:
    """Catches a temperature that multiplies, and a distribution that is inverted one token off."""
    expected = (LOGITS.double() / temperature).softmax(-1)
    actual = shares(LOGITS, replace(ALL, temperature=temperature))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_top_k_and_top_p_leave_the_right_tokens_in_proportion() -> None:
    """Catches a cut one token early or late, and probabilities that are not made to sum to 1 again."""
    full = LOGITS.double().softmax(-1)
    best = full.argsort(descending=True)

    def expected(count: int) -> Tensor:
        kept = torch.zeros_like(full).index_copy(0, best[:count], full[best[:count]])
        return kept / kept.sum()

    cumulative = full[best].cumsum(0)
    cases = [
        (replace(ALL, top_k=1), 1),
        (replace(ALL, top_k=3), 3),
        (replace(ALL, top_k=99), 6),
        (replace(ALL, top_p=1e-9), 1),
        (replace(ALL, top_p=float(cumulative[1]) - 1e-6), 2),
        (replace(ALL, top_p=float(cumulative[1]) + 1e-6), 3),
        # Nucleus of what top-k leaves: the two best have 0.79 of four tokens' probability, 0.76 of all.
        (replace(ALL, top_k=4, top_p=0.78), 2),
        (replace(ALL, top_p=0.78), 3),
    ]
    for sampling, count in cases:
        torch.testing.assert_close(shares(LOGITS, sampling), expected(count), atol=1e-4, rtol=0)


def test_a_tiny_temperature_takes_the_best_token() -> None:
    """Catches an overflow to infinity, whose softmax is not a number."""
    assert shares(LOGITS * 1e4, replace(ALL, temperature=1e-30)).argmax() == 2
    assert shares(LOGITS, replace(ALL, temperature=1e-30))[2] == 1


def test_the_last_random_number_takes_a_token_that_is_kept() -> None:
    """Catches a search past the end when a sum rounds to less than 1."""
    almost_one = torch.full((1,), 1 - 2**-53, dtype=torch.float64)
    for top_k in (0, 2, 6):
        assert draw(LOGITS.unsqueeze(0), almost_one, replace(ALL, top_k=top_k)).item() in range(6)
    assert draw(LOGITS.unsqueeze(0), almost_one, replace(ALL, top_k=2)).item() == 4


@pytest.mark.parametrize("kind", ["gpt2", "cocomix"])
@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=1), Sampling(temperature=1.5, top_k=0, top_p=0.9, seed=3)]
)
def test_the_cache_changes_no_token(kind: str, sampling: Sampling) -> None:
    """Catches cached and whole-context sampling that drift apart in logits, draws or seeds."""
    model = build(kind)
    cached = generate(model, PROMPTS, sampling, max_new_tokens=15)
    device = torch.device("cpu")
    whole = continue_tokens(model, PROMPTS, new_tokens=15, max_context=24, device=device, sampling=sampling)
    assert [result.ids for result in cached] == whole


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Catches random numbers, padding or samples that leak from row to row."""
    model = build("cocomix")
    sampling = Sampling(temperature=1.3, seed=5)

    def run(prompts: list[list[int]], batch_size: int) -> dict[tuple[int, ...], list[Continuation]]:
        results = generate(model, prompts, sampling, max_new_tokens=12, num_samples=5, batch_size=batch_size)
        return {tuple(prompt): results[5 * row : 5 * row + 5] for row, prompt in enumerate(prompts)}

    together = run(list(PROMPTS), 32)
    assert run(list(PROMPTS[::-1]), 32) == together
    assert run(list(PROMPTS), 10) == together
    assert run(list(PROMPTS), 2) == together
    assert run([PROMPTS[1]], 5)[tuple(PROMPTS[1])] == together[tuple(PROMPTS[1])]
    samples = together[tuple(PROMPTS[1])]
    assert len({tuple(sample.ids) for sample in samples}) == 5
    other = generate(model, PROMPTS, replace(sampling, seed=6), max_new_tokens=12)
    assert other[1].ids != samples[0].ids
    longer = generate(model, PROMPTS, sampling, max_new_tokens=18)
    assert longer[1].ids[:12] == samples[0].ids


def test_text_ends_at_the_stop_token_and_not_before() -> None:
    """Catches a row that ends with another one's stop token, or keeps the token in its text."""
    model = build("gpt2")
    free = generate(model, PROMPTS, Sampling(temperature=2.0), max_new_tokens=12)
    stop_id = free[0].ids[4]
    assert any(stop_id not in result.ids for result in free)
    stopped = generate(model, PROMPTS, Sampling(temperature=2.0), max_new_tokens=12, stop_id=stop_id)
    for result, whole in zip(stopped, free, strict=True):
        if stop_id in whole.ids:
            assert result == (whole.ids[: whole.ids.index(stop_id)], True)
        else:
            assert result == (whole.ids, False)


@pytest.mark.parametrize(("kind", "per_token"), [("gpt2", 1), ("cocomix", 2)])
def test_no_position_is_computed_twice(kind: str, per_token: int) -> None:
    """Catches a prompt that is read once per sample, or a context that is run again for a new token."""
    model = build(kind)
    seen = [0, 0]
    for index, block in enumerate((model.blocks[0], model.blocks[-1])):

        def count(module: torch.nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
            seen[index] += args[0].shape[0] * args[0].shape[1]

        block.register_forward_pre_hook(count)
    generate(model, [PROMPTS[1]], Sampling(), max_new_tokens=10, num_samples=4)
    once = len(PROMPTS[1]) + 4 * 9
    assert seen == [once, per_token * once]


def test_what_cannot_be_continued_is_refused() -> None:
    """Catches a position beyond the embedding, an empty prompt, and text made from NaN."""
    model = build("cocomix")
    with pytest.raises(ValueError, match="max_new_tokens=25 must be at most 24 after a prompt of 1 tokens"):
        generate(model, [[1]], Sampling(), max_new_tokens=25)
    assert len(generate(model, [[1]], Sampling(), max_new_tokens=24)[0].ids) == 24
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], Sampling(), max_new_tokens=2)
    model.ln_f.bias[0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, [[1]], Sampling(), max_new_tokens=2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temperature", 0.0, "temperature=0.0 must be above 0; top_k=1 takes the best token"),
        ("temperature", -1.0, "temperature=-1.0 must be above 0"),
        ("temperature", float("nan"), "temperature=nan must be above 0"),
        ("top_k", -1, "top_k=-1 must be at least 0"),
        ("top_p", 0.0, "top_p=0.0 must be above 0 and at most 1"),
        ("top_p", 1.1, "top_p=1.1 must be above 0 and at most 1"),
    ],
)
def test_bad_settings_are_refused(key: str, value: float, message: str) -> None:
    """Catches a setting that would silently mean something else."""
    with pytest.raises(ValueError, match=message):
        Sampling(**{key: value})


def test_the_whole_context_slides_past_the_last_position() -> None:
    """Catches sampling during training that ends at, or breaks on, the model's last position."""
    model = build("cocomix")
    device = torch.device("cpu")
    (ids,) = continue_tokens(
        model, [[1, 2, 3]], new_tokens=30, max_context=24, device=device, sampling=Sampling(top_k=1)
    )
    context = torch.tensor([ids[-25:-1]])
    assert ids[-1] == model(context, last_only=True).logits[0, -1].argmax()
