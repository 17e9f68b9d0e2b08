"""Byte-level BPE tokenizers: load one, or train one on a corpus."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.manifest import TOKENIZER_NAME, DataError

EOT = "<|endoftext|>"
EOT_CANDIDATES = (EOT, "<|end_of_text|>", "</s>", "<eos>")
MIN_VOCAB_SIZE = 257


class Tokenizer:
    """Text to token ids and back, without ever reading special tokens out of a text."""

    def __init__(self, json_bytes: bytes, name: str):
        """Build from the contents of a tokenizer.json.

        Args:
            json_bytes: the file's contents; ``sha256`` is their hash.
            name: the file's name for error messages.

        Raises:
            DataError: not a tokenizer.json, or no end-of-text token in it.
        """
        try:
            inner = tokenizers.Tokenizer.from_str(json_bytes.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise DataError(f"{name}: not a tokenizer.json: {error}") from error
        # A text that spells "<|endoftext|>" must stay text, else documents end in their middle.
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        if getattr(inner.model, "dropout", None):
            inner.model.dropout = None  # BPE dropout would make the ids random
        vocabulary = inner.get_vocab(with_added_tokens=True)
        eot = next((token for token in EOT_CANDIDATES if token in vocabulary), None)
        if eot is None:
            raise DataError(f"{name}: no end-of-text token, none of {', '.join(EOT_CANDIDATES)}")
        self._inner = inner
        self.name = name
        self.json_bytes = json_bytes
        self.sha256 = hashlib.sha256(json_bytes).hexdigest()
        self.vocab_size = max(vocabulary.values()) + 1
        self.eot = eot
        self.eot_id = vocabulary[eot]

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; no end-of-text token is added."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return one uint32 array of ids per text, the same ids as :meth:`encode`."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def num_pieces(self, token: str) -> int:
        """Return how many tokens the merges alone make of a word as the vocabulary spells it."""
        return len(self._inner.model.tokenize(token))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, special tokens spelled out."""
        return str(self._inner.decode([int(token) for token in ids], skip_special_tokens=False))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json, a folder with one, or a folder with GPT-2's vocab.json and merges.txt.

    Raises:
        DataError: nothing loadable at ``path``.
    """
    path = Path(path)
    if path.is_file():
        return Tokenizer(path.read_bytes(), str(path))
    file = path / TOKENIZER_NAME
    if file.is_file():
        return Tokenizer(file.read_bytes(), str(file))
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if vocabulary.is_file() and merges.is_file():
        return _from_gpt2_files(vocabulary, merges)
    raise DataError(f"{path}: no tokenizer.json and no vocab.json with merges.txt")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same texts in the same order always give the same file.

    Args:
        texts: read once, as a stream.
        vocab_size: number of tokens, the 256 bytes and the end-of-text token included.

    Raises:
        ValueError: ``vocab_size`` below 257.
        DataError: the texts are too few for that many merges.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"--vocab_size {vocab_size} is below {MIN_VOCAB_SIZE} (256 bytes and {EOT})")
    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(inner.to_str().encode("utf-8"), "trained tokenizer")
    if tokenizer.vocab_size < vocab_size:
        raise DataError(
            f"the corpus has merges for {tokenizer.vocab_size} tokens only; lower --vocab_size {vocab_size}"
        )
    return tokenizer


def use_one_thread() -> None:
    """Keep the library's own threads off in this process, before it encodes anything.

    Several processes encode at once, so threads inside each would only compete; and the library's thread
    pool does not survive a fork.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _from_gpt2_files(vocabulary: Path, merges: Path) -> Tokenizer:
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # plain Exception, as above
        raise DataError(f"{vocabulary}: not GPT-2's vocabulary and merges: {error}") from error
    inner = _byte_level(model)
    if inner.token_to_id(EOT) is None:
        raise DataError(f"{vocabulary}: no {EOT} in the vocabulary")
    inner.add_special_tokens([EOT])
    return Tokenizer(inner.to_str().encode("utf-8"), str(vocabulary))
