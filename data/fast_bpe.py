"""The fast path: tiktoken with the merges of a byte-level BPE, the same ids five times as fast.

tiktoken joins the two neighbours whose joint bytes have the lowest id; a BPE joins the two whose merge comes
first. Both are the same if ids rise with the merges and each token is what the BPE makes of its own bytes:
then any two neighbours whose joint bytes are a token are the halves of its merge. This is checked for each
tokenizer; that the two libraries cut words alike is checked on texts, here and on the corpus itself.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tiktoken

from data.manifest import DataError
from data.tokenizer import Tokenizer

# GPT-2's pattern. Its order matters only between contractions and the signs after them; the group keeps
# what needs no look-ahead together, which tiktoken's regular expressions then match 1.4 times as fast.
PATTERN = (
    r"(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)"  # words, 's, numbers, signs
    r"|\s+(?!\S)|\s+"  # white space, but its last character where a word follows
)
SAMPLE_CHARACTERS = 2048
SAMPLES = (
    "Hello world, it's 1,000.50 o'clock: they'll we've you're I'd can't 'S' 'LL' ''s",
    " \t\n\n  indented\r\n\x0b\x0c\x1c\x85\u00a0\u1680\u2003\u2028\u2029\u3000\u200b\ufeff end  \n ",
    "naïve ﬁ Ǆ ß İ ǆ e\u0301 Ⅷ ²½ ٣४ 日本語テキスト 한국어 עברית العربية 🙂",
    "👩\u200d👩\u200d👧 \U000323af\U0010ffff\x00\x7f",
    "<|endoftext|>" + "ab" * 200 + "." * 300 + "7" * 300 + " " * 300 + "_x",
)


class FastEncoder:
    """Ids of a :class:`Tokenizer` from tiktoken."""

    def __init__(self, tokenizer: Tokenizer, *, check: bool = True):
        """Build from the same tokenizer.json.

        Args:
            tokenizer: the reference; it also encodes what tiktoken's regular expressions give up on, such as
                a million spaces in a row.
            check: prove that the ids are the reference's; leave out where another process has done it.

        Raises:
            DataError: the tokenizer is none for which both are the same.
        """
        body = json.loads(tokenizer.json_bytes)
        merges = _merges(body)
        obstacle = _obstacle(body, merges) or (_unreachable(tokenizer, merges) if check else None)
        if obstacle:
            raise DataError(f"{tokenizer.name}: no fast encoder, {obstacle}; --encoder reference")
        ranks = _ranks(body["model"]["vocab"], merges)
        self._reference = tokenizer
        # Without any special token tiktoken would look for the empty string everywhere.
        special = {tokenizer.eot: tokenizer.eot_id}
        self._encoding = tiktoken.Encoding(
            tokenizer.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        if check:
            for text in SAMPLES:
                self.compare(text, "a built-in sample")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return one uint32 array of ids per text, as :meth:`Tokenizer.encode_batch` does."""
        return [self._encode(text) for text in texts]

    def compare(self, text: str, where: str) -> None:
        """Raise DataError if the beginning of a text has other ids than the reference gives."""
        text = text[:SAMPLE_CHARACTERS]
        found, wanted = self._encode(text), self._reference.encode_batch([text])[0]
        if not np.array_equal(found, wanted):
            raise DataError(
                f"{where}: the fast encoder gives other ids than the reference ({len(found)} and "
                f"{len(wanted)} tokens); --encoder reference"
            )

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its regular expressions have a limit of steps
            return self._reference.encode_batch([text])[0]


def _merges(body: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in body["model"].get("merges") or [])
    return [(left, right) for left, right in pairs]


def _obstacle(body: dict[str, Any], merges: list[tuple[str, str]]) -> str | None:
    """Return why tiktoken could give other ids, as far as the file tells."""
    model, words = body["model"], body.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        return "its model is no plain BPE"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its tokens have prefixes or suffixes"
    if body.get("normalizer"):
        return "it normalizes the text"
    if words.get("type") != "ByteLevel" or not words.get("use_regex", True) or words["add_prefix_space"]:
        return "it does not cut words as GPT-2 does"
    if any(not token["special"] for token in body.get("added_tokens") or []):
        return "it has added tokens that are not special"
    vocabulary = model["vocab"]
    if not set(_byte_characters()) <= set(vocabulary):
        return "its vocabulary lacks some bytes"
    ids = [vocabulary[left + right] for left, right in merges]
    if any(later <= earlier for earlier, later in itertools.pairwise(ids)):
        return "its ids do not rise with its merges"
    return None


def _unreachable(tokenizer: Tokenizer, merges: list[tuple[str, str]]) -> str | None:
    for left, right in merges:
        if tokenizer.num_pieces(left + right) != 1:
            return f"its token {left + right!r} is not what its merges make of it"
    return None


def _ranks(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[bytes, int]:
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    tokens = [*byte_of, *(left + right for left, right in merges)]
    return {bytes(byte_of[character] for character in token): vocabulary[token] for token in tokens}


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in GPT-2's files.

    Printable Latin-1 characters stand for themselves, the others are numbered from U+0100.
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]
