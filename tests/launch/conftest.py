"""A tiny run that lasts long enough for faults to land in its middle."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data.prepare import PrepareOptions, prepare
from tests.launch.runs import RunMaker, read_losses


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand tokens of generated text with a vocabulary of 270."""
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    corpus = folder / "corpus.jsonl"
    texts = (" ".join(words.choices(["red", "blue", "green", "one", "two"], k=30)) for _ in range(200))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = folder / "shards"
    prepare(PrepareOptions(input=corpus, out=out, vocab_size=270, val_fraction=0.2, chunk_tokens=256))
    return out


@pytest.fixture(scope="session")
def runs(shards: Path) -> RunMaker:
    """Writes configurations that differ in their run directory alone."""
    return RunMaker(shards)


@pytest.fixture(scope="session")
def undisturbed(runs: RunMaker, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses by step of a run to which nothing happened, all steps of it."""
    config = runs.write(tmp_path_factory.mktemp("undisturbed"))
    runs.start(config, "--preflight=off").finish(0, timeout_s=120)
    return read_losses(config.parent / "run")
