"""Exported folders in the transformers library, against this project's own model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported
transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from tests.trainer.model.tiny import randomize  # noqa: E402
from tests.trainer.tiny_run import tiny_config  # noqa: E402
from trainer.analysis.export import export  # noqa: E402
from trainer.analysis.sampling import Sampling, generate  # noqa: E402
from trainer.analysis.trained import TrainedModel  # noqa: E402
from trainer.model.gpt2 import GPT2  # noqa: E402
from trainer.model.student import build_student  # noqa: E402

KINDS = ["ntp", "ntp-untied", "cocomix0", "cocomix1", "cocomix2"]
TEXTS = ["the", "a dog saw the hills", "mat far"]


@pytest.fixture(scope="module", autouse=True)
def _no_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remote code is copied into a cache below the home directory by default."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", list(sys.path))
        transformers.utils.logging.disable_progress_bar()
        yield


class Pair:
    """A model of this project and what transformers makes of its export."""

    def __init__(self, kind: str, world: Path, folder: Path) -> None:
        changes: dict[str, Any] = {"model__tied_head": kind != "ntp-untied"}
        if kind.startswith("cocomix"):
            changes["concepts__insert_layer"] = int(kind[-1])
        config = tiny_config(world, folder / "run", kind.rstrip("012").removesuffix("-untied"), **changes)
        assert config.model is not None
        self.ours: GPT2 = build_student(config.model, config.insertion).eval().requires_grad_(False)
        randomize(self.ours, seed=5)
        from data.tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(world / "data")
        trained = TrainedModel(folder, "test", self.ours, self.tokenizer, config, step=12)
        export(trained, folder / "out", "hf")
        trust = kind.startswith("cocomix")  # a plain GPT-2 must load without
        self.theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "out", trust_remote_code=trust
        ).eval()
        self.their_tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder / "out", trust_remote_code=trust
        )

    def logits(self, ids: list[int]) -> torch.Tensor:
        logits = self.ours(torch.tensor([ids])).logits
        assert logits is not None
        return logits[0]


@pytest.fixture(scope="module")
def pairs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {kind: Pair(kind, tiny_world, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_and_tokens_are_equal(kind: str, pairs: dict[str, Pair]) -> None:
    """Catches any difference between the two models, and text that the tokenizers read differently."""
    pair = pairs[kind]
    for text in [*TEXTS, "the cat  sat\nover £9 ..."]:
        ids = pair.tokenizer.encode(text)
        assert pair.their_tokenizer(text)["input_ids"] == ids
        assert pair.their_tokenizer.decode(ids) == text
    # Long and short: a CoCoMix compresses few tokens in another way than many.
    for length in (2, 16):
        ids = torch.arange(3, 3 + length).tolist()
        theirs = pair.theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(theirs, pair.logits(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(kind: str, side: str, pairs: dict[str, Pair]) -> None:
    """Catches padding that is seen, or that moves positions."""
    pair = pairs[kind]
    batch = pair.their_tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)
    positions = {}
    if kind.startswith("ntp"):  # the library's GPT-2 leaves positions to its caller
        positions = {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)}
    logits = pair.theirs(**batch, **positions).logits
    for row, text in enumerate(TEXTS):
        expected = pair.logits(pair.tokenizer.encode(text))
        torch.testing.assert_close(
            logits[row][batch["attention_mask"][row].bool()], expected, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_writes_what_we_write(kind: str, use_cache: bool, pairs: dict[str, Pair]) -> None:
    """Catches a cache of the library that does not fit two positions per token, and wrong stops."""
    pair = pairs[kind]
    batch = pair.their_tokenizer(TEXTS, return_tensors="pt", padding=True)
    written = pair.theirs.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=use_cache)
    ours = generate(
        pair.ours,
        [pair.tokenizer.encode(text) for text in TEXTS],
        Sampling(top_k=1),
        max_new_tokens=8,
        stop_id=pair.tokenizer.eot_id,
    )
    new = written[:, batch["input_ids"].shape[1] :]
    for row, result in zip(new.tolist(), ours, strict=True):
        padding = [pair.tokenizer.eot_id] * (len(row) - len(result.ids))
        assert row == result.ids + padding


@pytest.mark.parametrize("kind", ["cocomix0", "cocomix1"])
def test_beams_and_continued_caches(kind: str, pairs: dict[str, Pair]) -> None:
    """Catches a cache that is not reordered in step with its rows, or counts concepts as tokens."""
    pair = pairs[kind]
    batch = pair.their_tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    beams = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    cached = pair.theirs.generate(**batch, **beams)
    assert torch.equal(cached, pair.theirs.generate(**batch, **beams, use_cache=False))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    past, logits = None, []
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 7), (7, ids.shape[1])):
            out = pair.theirs(
                ids[:, start:stop], mask[:, :stop], past_key_values=past, use_cache=True, logits_to_keep=0
            )
            past = out.past_key_values
            logits.append(out.logits)
    for row, text in enumerate(TEXTS[:2]):
        actual = torch.cat(logits, dim=1)[row][mask[row].bool()]
        torch.testing.assert_close(actual, pair.logits(pair.tokenizer.encode(text)), atol=1e-5, rtol=0)


def test_what_the_cache_cannot_do_is_refused(pairs: dict[str, Pair]) -> None:
    """Catches text from a cache that is cut to a length in tokens, or has one length for all blocks."""
    pair = pairs["cocomix1"]
    batch = pair.their_tokenizer("the cat", return_tensors="pt")
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        pair.theirs.generate(**batch, max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="StaticCache must be a DynamicCache"):
        pair.theirs.generate(**batch, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1\)"):
        pair.theirs(**{**batch, "attention_mask": torch.zeros(1, 1)})


def test_loss_and_gradients_are_those_of_the_model_that_trained(pairs: dict[str, Pair]) -> None:
    """Catches fine-tuning that leaves the concept path out."""
    pair = pairs["cocomix1"]
    ids = torch.arange(3, 19).view(2, 8)
    pair.theirs.zero_grad()
    loss = pair.theirs(ids, labels=ids).loss
    loss.backward()
    ours = pair.ours.requires_grad_(True)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    expected = ours(ids, labels).loss_ntp / 14
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    grad = pair.theirs.transformer.compress_layer.weight.grad.t()
    torch.testing.assert_close(grad, ours.get_parameter("mixer.compress_weight").grad[: len(grad)])
    bias = pair.theirs.transformer.pre_bias.grad
    torch.testing.assert_close(bias, ours.get_parameter("mixer.pre_bias").grad)
    ours.requires_grad_(False)
