"""Preparations that others have published: which corpus, which documents for validation, which tokenizer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from data.manifest import DataError
from data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Settings and what must hold for them to mean what they say."""

    val_fraction: float
    seed: int
    split: str
    cleaning: str
    rows: int
    """Documents of the whole corpus."""
    vocabulary_sha256: str
    """See :func:`vocabulary_sha256`."""


GPT2_VOCABULARY_SHA256 = "f43edfac33636658415b555d8c9565b369628e2ae2b143b6e19e119db456b3cf"
PRESETS = {
    # The split of the paper's authors, which is nanoGPT's: train_test_split(test_size=0.0005, seed=2357).
    "openwebtext": Preset(
        val_fraction=0.0005,
        seed=2357,
        split="huggingface",
        cleaning="openwebtext",
        rows=8_013_769,
        vocabulary_sha256=GPT2_VOCABULARY_SHA256,
    ),
}


def find_preset(name: str) -> Preset:
    """Return a preset; ValueError if there is none of this name."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name} is unknown; there is {', '.join(PRESETS)}")
    return PRESETS[name]


def check_vocabulary_is(tokenizer: Tokenizer, sha256: str) -> None:
    """Raise DataError if the tokenizer's tokens and merges are not the ones of this hash."""
    found = vocabulary_sha256(tokenizer)
    if found != sha256:
        raise DataError(
            f"{tokenizer.name}: not the preset's tokenizer: its vocabulary hashes to {found[:12]}..., "
            f"GPT-2's to {sha256[:12]}..."
        )


def vocabulary_sha256(tokenizer: Tokenizer) -> str:
    """Return what identifies the ids of a BPE, whatever the file's layout.

    SHA-256 of the tokens in the order of their ids, special ones left out, then the merges, one per line.
    """
    body = json.loads(tokenizer.json_bytes)
    model, special = body["model"], {token["content"] for token in body.get("added_tokens") or []}
    if not isinstance(model["vocab"], dict):  # no BPE
        return hashlib.sha256(tokenizer.json_bytes).hexdigest()
    tokens = sorted(set(model["vocab"]) - special, key=model["vocab"].__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    return hashlib.sha256("\n".join([*tokens, *merges]).encode()).hexdigest()
