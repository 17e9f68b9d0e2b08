"""The tokenizer loses nothing and never reads special tokens out of a text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data.manifest import DataError
from data.tokenizer import EOT, Tokenizer, load_tokenizer, train_bpe
from tests.data.conftest import make_texts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(make_texts(100), 400)


def random_unicode(generator: random.Random) -> str:
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(generator.randint(0, 40)))


def test_round_trip_of_random_unicode(tokenizer: Tokenizer) -> None:
    """Catches a normalizer, a missing byte or a decoder that changes the text."""
    generator = random.Random(0)
    for text in ["", " ", "\r\n\x00", "  a  ", *(random_unicode(generator) for _ in range(500))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_token_in_a_text_stays_text(tokenizer: Tokenizer) -> None:
    """Catches documents that are cut in two because their text spells the end-of-text token."""
    for ids in (tokenizer.encode(f"a{EOT}b"), tokenizer.encode_batch([f"a{EOT}b"])[0].tolist()):
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == f"a{EOT}b"


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    """Catches padding or truncation that the batch path would apply."""
    texts = make_texts(50, seed=1)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [
        tokenizer.encode(text) for text in texts
    ]


def test_settings_of_a_given_file_that_change_ids_are_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches truncation, padding or BPE dropout that a tokenizer.json brings along."""
    body = json.loads(tokenizer.json_bytes)
    body["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    body["model"]["dropout"] = 0.9
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(body))
    text = make_texts(1)[0] * 3
    assert load_tokenizer(path).encode(text) == tokenizer.encode(text)


def test_training_is_deterministic_across_processes(tokenizer: Tokenizer) -> None:
    """Catches merges that depend on hash seeds or thread timing."""
    code = (
        "from data.tokenizer import train_bpe; from tests.data.conftest import make_texts;"
        "print(train_bpe(make_texts(100), 400).sha256)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == tokenizer.sha256


def test_gpt2_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches GPT-2's two-file layout being read with other ids than the same tokenizer.json."""
    model = json.loads(tokenizer.json_bytes)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    for text in [*make_texts(20), f"a{EOT}b"]:
        assert loaded.encode(text) == tokenizer.encode(text)


def test_hash_is_that_of_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches a hash of a re-serialised form, which would change with the library's version."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer.json_bytes + b"\n")
    assert load_tokenizer(path).sha256 != tokenizer.sha256
    assert load_tokenizer(path).json_bytes == path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a tokenizer.json"), ('{"model": 3}', "not a tokenizer.json")],
)
def test_bad_file(tmp_path: Path, content: str, message: str) -> None:
    """Catches library exceptions that escape without the file's name."""
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        load_tokenizer(tmp_path)


def test_nothing_to_load_and_bad_sizes(tmp_path: Path) -> None:
    """Catches silent defaults where the user asked for something impossible."""
    with pytest.raises(DataError, match=r"no tokenizer\.json and no vocab\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="--vocab_size 256 is below 257"):
        train_bpe(["a"], 256)
    with pytest.raises(DataError, match="merges for .* tokens only; lower --vocab_size 5000"):
        train_bpe(["abc abc"], 5000)
