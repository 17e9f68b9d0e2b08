"""A small corpus and a shard folder made of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data.manifest import Manifest, read_manifest
from data.prepare import PrepareOptions, prepare

NUM_DOCUMENTS = 300


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Return different texts of a few to a few hundred characters."""
    generator = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "naïve", "日本", "🙂", "x = 1\n", "\ttab", "<|endoftext|>"]
    return [
        f"document {number} " + " ".join(generator.choices(words, k=generator.randint(1, 60)))
        for number in range(count)
    ]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def read_tokens(folder: Path, manifest: Manifest, split: str) -> np.ndarray:
    """Return a split's tokens without overlaps, by memory mapping instead of the project's reader."""
    pieces = []
    chunks = manifest.splits[split].chunks
    for number, (shard, chunk) in enumerate(chunks):
        offset = chunk.offset + 512
        tokens = np.memmap(folder / shard.name, "<u2", "r", offset=offset, shape=(chunk.tokens,))
        pieces.append(tokens if number == len(chunks) - 1 else tokens[:-1])
    return np.concatenate(pieces)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_jsonl(path, make_texts(NUM_DOCUMENTS))
    return path


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """Return a finished folder with chunks of 256 tokens, 4 in a shard. Tests that damage it take a copy."""
    out = tmp_path_factory.mktemp("shards") / "small"
    prepare(
        PrepareOptions(
            input=corpus_file,
            out=out,
            vocab_size=320,
            val_fraction=0.1,
            chunk_tokens=256,
            chunks_per_shard=4,
        )
    )
    return out


@pytest.fixture
def manifest(shard_folder: Path) -> Manifest:
    return read_manifest(shard_folder)
