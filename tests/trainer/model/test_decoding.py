"""Cached decoding against the forward that trains."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.trainer.model.tiny import tiny_cocomix, tiny_gpt2
from trainer.model.decoding import Decoder
from trainer.model.gpt2 import GPT2

KINDS = ["gpt2", "cocomix0", "cocomix1", "cocomix2"]
LENGTHS = (1, 7, 4)


def build(kind: str) -> GPT2:
    """A GPT-2, or a CoCoMix whose insertion stands before the first, a middle or the last block."""
    model = tiny_gpt2() if kind == "gpt2" else tiny_cocomix(insert_layer=int(kind[-1]))
    return model.eval().requires_grad_(False)


def rows_of(lengths: Sequence[int], total: int, seed: int = 0) -> tuple[list[list[int]], Tensor]:
    """Prompts of these lengths, and ``total`` further tokens for each, (B, total)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(61, (len(lengths), max(lengths) + total), generator=generator)
    prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    return prompts, ids[:, -total:]


def uncached(model: GPT2, ids: Sequence[int]) -> Tensor:
    """Logits (V,) after a sequence, by the forward over all of it."""
    logits = model(torch.tensor([list(ids)]), last_only=True).logits
    assert logits is not None
    return logits[0, -1]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours.argmax() == theirs.argmax()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(5,), (5, 5), LENGTHS])
def test_every_step_equals_the_uncached_forward(kind: str, lengths: tuple[int, ...]) -> None:
    """Catches a mask that is shifted by the cache, wrong positions, a concept that is missing or seen too
    early, and padding that leaks."""
    model = build(kind)
    prompts, further = rows_of(lengths, 12)
    decoder = Decoder(model, max(lengths) + 12)
    logits = decoder.start(prompts)
    for step in range(12):
        for row, prompt in enumerate(prompts):
            assert_same(logits[row], uncached(model, [*prompt, *further[row, :step].tolist()]))
        logits = decoder.extend(further[:, step : step + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_at_a_time(kind: str) -> None:
    """Catches a mask that is right for one new token only, aligned to the top left."""
    model = build(kind)
    prompts, further = rows_of(LENGTHS, 9)
    decoder = Decoder(model, 16)
    decoder.start(prompts)
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        logits = decoder.extend(further[:, part])
    for row, prompt in enumerate(prompts):
        assert_same(logits[row], uncached(model, [*prompt, *further[row].tolist()]))


@pytest.mark.parametrize("kind", ["gpt2", "cocomix1"])
def test_rows_can_be_selected_and_repeated(kind: str) -> None:
    """Catches a cache, a padding or a presence that does not move with its row."""
    model = build(kind)
    prompts, further = rows_of(LENGTHS, 4)
    decoder = Decoder(model, 11)
    decoder.start(prompts)
    chosen = [2, 0, 2]
    decoder.select(torch.tensor(chosen))
    decoder.extend(further[:, :3])
    logits = decoder.extend(further[:, 3:])
    for row, source in enumerate(chosen):
        assert_same(logits[row], uncached(model, [*prompts[source], *further[row].tolist()]))


def test_the_whole_context_can_be_used_and_no_more() -> None:
    """Catches an off-by-one at the last position."""
    model = build("cocomix1")
    prompts, further = rows_of((3,), 21)
    decoder = Decoder(model, 24)
    decoder.start(prompts)
    logits = decoder.extend(further)
    assert_same(logits[0], uncached(model, [*prompts[0], *further[0].tolist()]))
    with pytest.raises(ValueError, match="25 tokens must be at most 24, the positions of the model"):
        Decoder(model, 25)
