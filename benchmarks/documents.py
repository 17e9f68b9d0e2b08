"""Generated documents that tokenize like web text, for measurements where no corpus may be shipped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

NUM_WORDS = 200_000
ZIPF_EXPONENT = 1.0
MEAN_WORDS = 800
ONSETS = (*"bcdfghlmnprstvw", "st", "tr", "ch", "sh", "th")
NUCLEI = (*"aeiouaeiou", "ea", "ou")
CODAS = ("", "", "", "", "n", "r", "s", "t", "l", "m", "nd", "ng")
ENDINGS = ["", "", "", "", "", ",", ",", ".", ".", "?", ";", ":", '"', ")", "'s"]


def generate_documents(characters: int, seed: int = 0) -> Iterator[str]:
    """Yield different documents until they have so many characters; the same ones for the same seed.

    Words are drawn by Zipf's law from made-up ones, frequent words are short, and there are sentences,
    paragraphs, numbers and names. With a BPE of 50,257 tokens trained on them a token has about 4.8 bytes
    (OpenWebText: 4.4) and a document 1,300 tokens (OpenWebText: 1,100).
    """
    generator = np.random.default_rng(seed)
    words = _make_words(np.random.default_rng(0))
    cumulative = np.cumsum(1.0 / np.arange(1, NUM_WORDS + 1) ** ZIPF_EXPONENT)
    done = 0
    while done < characters:
        count = 1 + int(generator.exponential(MEAN_WORDS))
        ranks = np.searchsorted(cumulative, generator.random(count) * cumulative[-1])
        text = _write([words[rank] for rank in ranks.tolist()], generator)
        done += len(text)
        yield text


def _make_words(generator: np.random.Generator) -> list[str]:
    """Return different made-up words, the first of them short."""
    syllables = ["".join(parts) for parts in itertools.product(ONSETS, NUCLEI, CODAS)]
    counts = 1 + generator.poisson(0.12 * np.log1p(np.arange(2 * NUM_WORDS)))
    drawn = iter(generator.integers(len(syllables), size=counts.sum()).tolist())
    words = {"".join(syllables[next(drawn)] for _ in range(count)): None for count in counts.tolist()}
    return list(words)[:NUM_WORDS]


def _write(words: list[str], generator: np.random.Generator) -> str:
    """Return the words as prose."""
    draws = generator.random(len(words)).tolist()
    pieces, capital = [], True
    for word, draw in zip(words, draws, strict=True):
        text = str(int(draw * 1e5)) if draw < 0.01 else word
        text = text.capitalize() if capital or draw > 0.96 else text
        text += ENDINGS[int(draw * 1e4) % len(ENDINGS)] if 0.01 < draw < 0.35 else ""
        capital = text.endswith((".", "?"))
        pieces.append(text + ("\n\n" if capital and draw < 0.05 else " "))
    return "".join(pieces).strip()
