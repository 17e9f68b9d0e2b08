"""The fast encoder gives the reference's ids, and is refused where it could give others."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import fast_bpe
from data.fast_bpe import FastEncoder
from data.manifest import DataError
from data.presets import PRESETS, check_vocabulary_is, vocabulary_sha256
from data.tokenizer import EOT, Tokenizer, load_tokenizer, train_bpe
from tests.data.conftest import make_texts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    contractions = ["they're it's we've I'll I'd can't I'm 'tis DON'T it'S"] * 20
    return train_bpe([*make_texts(200), *contractions], 530)


def same_ids(tokenizer: Tokenizer, texts: list[str]) -> bool:
    pairs = zip(FastEncoder(tokenizer).encode_batch(texts), tokenizer.encode_batch(texts), strict=True)
    return all(np.array_equal(found, wanted) and found.dtype == wanted.dtype for found, wanted in pairs)


def test_every_kind_of_character(tokenizer: Tokenizer) -> None:
    """Catches two libraries that disagree on what a letter, a number or a space is.

    Every character below U+3400, where scripts, signs and spaces are, and a sample of the others.
    """
    numbers = [*range(0x3400), *range(0x3400, 0x110000, 97)]
    characters = [chr(number) for number in numbers if not 0xD800 <= number <= 0xDFFF]
    assert same_ids(tokenizer, [f"a{c}b {c}{c}1{c}.{c} \n{c}  {c}'s" for c in characters])


def test_every_short_text_of_some_characters(tokenizer: Tokenizer) -> None:
    """Catches a pattern that cuts white space or contractions elsewhere."""
    texts = ["".join(parts) for size in range(6) for parts in itertools.product(" \n'sl1.é", repeat=size)]
    assert same_ids(tokenizer, texts)


def test_long_runs(tokenizer: Tokenizer) -> None:
    """Catches texts that tiktoken's regular expressions give up on, and merges of long words."""
    generator = random.Random(0)
    runs = [" ", "\n", " \n\t", "a", "ab", "-", "7", "日本"]
    texts = [run * (200_000 // len(run)) + end for run in runs for end in ("", "x")]
    texts.append(" " * 1_500_000)
    words = "".join(generator.choices("abcdefghij", k=20_000))
    assert same_ids(tokenizer, [*texts, words, f"x{EOT}{EOT} y"])


def edited(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    body = json.loads(tokenizer.json_bytes)
    change(body)
    return Tokenizer(json.dumps(body).encode(), "edited.json")


def swap_merges(body: dict[str, Any]) -> None:
    merges = body["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]


def add_unreachable_token(body: dict[str, Any]) -> None:
    """Add a token whose bytes an earlier merge always joins in another way."""
    model = body["model"]
    vocabulary, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    first = next(pair for pair in merges if len(pair[0]) == len(pair[1]) == 1 and pair[0] != pair[1])
    left, right = first[0], first[1]
    new = [(left, left), (left + left, right)]  # "llr" is cut l + lr, as lr comes first
    for pair in new:
        vocabulary[pair[0] + pair[1]] = max(vocabulary.values()) + 1
    model["merges"] = [list(pair) for pair in [*merges, *new]]


OBSTACLES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda body: body["model"].update(byte_fallback=True), "its model is no plain BPE"),
    (lambda body: body["model"].update(end_of_word_suffix="</w>"), "prefixes or suffixes"),
    (lambda body: body.update(normalizer={"type": "NFC"}), "it normalizes the text"),
    (lambda body: body["pre_tokenizer"].update(add_prefix_space=True), "does not cut words as GPT-2 does"),
    (lambda body: body["pre_tokenizer"].update(use_regex=False), "does not cut words as GPT-2 does"),
    (lambda body: body.update(pre_tokenizer={"type": "Whitespace"}), "does not cut words as GPT-2 does"),
    (lambda body: body["added_tokens"][0].update(special=False), "added tokens that are not special"),
    (swap_merges, "its ids do not rise with its merges"),
    (add_unreachable_token, "is not what its merges make of it"),
]


@pytest.mark.parametrize(("change", "reason"), OBSTACLES)
def test_tokenizers_that_need_the_reference(
    tokenizer: Tokenizer, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    """Catches a tokenizer that the fast encoder would silently read in another way."""
    with pytest.raises(DataError, match=rf"edited\.json: no fast encoder, .*{reason}.*; --encoder reference"):
        FastEncoder(edited(tokenizer, change))


def test_unreachable_token_would_change_ids(tokenizer: Tokenizer) -> None:
    """Catches a condition that is checked although nothing depends on it."""
    other = edited(tokenizer, add_unreachable_token)
    token = max(json.loads(other.json_bytes)["model"]["vocab"].items(), key=lambda item: item[1])[0]
    unchecked = FastEncoder(other, check=False)
    assert unchecked.encode_batch([token])[0].tolist() != other.encode(token)


def test_encoder_that_cuts_words_elsewhere_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a comparison that compares nothing."""
    monkeypatch.setattr(fast_bpe, "PATTERN", fast_bpe.PATTERN.replace("'(?:[sdmt]", "'(?:[sdm]"))
    with pytest.raises(DataError, match="a built-in sample: the fast encoder gives other ids"):
        FastEncoder(tokenizer)


# Ids that GPT-2's own encoder gives.
KNOWN_IDS = {
    "Hello world": [15496, 995],
    "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
}


@pytest.mark.skipif("GPT2_TOKENIZER" not in os.environ, reason="GPT2_TOKENIZER names no folder")
def test_real_gpt2() -> None:
    """Catches GPT-2's files read as another vocabulary, and a preset that refuses them.

    GPT2_TOKENIZER=DIR names a folder with GPT-2's vocab.json and merges.txt, or its tokenizer.json.
    """
    gpt2 = load_tokenizer(Path(os.environ["GPT2_TOKENIZER"]))
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    fast = FastEncoder(gpt2)
    for text, ids in KNOWN_IDS.items():
        assert gpt2.encode(text) == fast.encode_batch([text])[0].tolist() == ids
    check_vocabulary_is(gpt2, PRESETS["openwebtext"].vocabulary_sha256)


def test_vocabulary_hash_does_not_depend_on_the_layout(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches a preset that accepts one file of a tokenizer and refuses the other."""
    model = json.loads(tokenizer.json_bytes)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    assert vocabulary_sha256(load_tokenizer(tmp_path)) == vocabulary_sha256(tokenizer)
    other = edited(tokenizer, swap_merges)
    assert vocabulary_sha256(other) != vocabulary_sha256(tokenizer)
    with pytest.raises(
        DataError, match=r"edited\.json: not the preset's tokenizer: its vocabulary hashes to"
    ):
        check_vocabulary_is(other, vocabulary_sha256(tokenizer))
