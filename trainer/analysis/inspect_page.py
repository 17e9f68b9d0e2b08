"""The concept page: what it shows as plain JSON, and the one HTML file that carries it.

The file holds its data, style and script and asks for nothing else. Whatever comes from tokens travels as
JSON whose ``<`` is escaped and becomes text nodes in the browser; a content security policy allows this one
script only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from trainer import analysis
from trainer.analysis.inspect_collect import NO_TOKEN, TOKENS_BEFORE, Contexts

SMALL_NORM = 1e-2
"""Columns of W_comp below it are called sparse (CoCoMix, arXiv 2502.08524)."""

_LEVELS = 9
_REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to
_BINS_PER_DECADE = 6
_CHART = (640, 200)  # width and height in CSS pixels
_MARGIN = 24


class Pieces:
    """Texts of tokens, each stored once and named by a number."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.texts: list[str] = []
        self._tokenizer = tokenizer
        self._numbers: dict[str, int] = {}
        self._decoded: dict[int, str] = {}

    def of_token(self, token: int) -> int:
        """Number of a token's own text."""
        return self._number(self._text(token))

    def of_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Numbers of the texts of successive tokens.

        Where a character is spread over several tokens, the first of them shows it and the others nothing.
        """
        texts = [self._text(token) for token in tokens]
        first = 0
        while first < len(texts):
            stop = first
            while stop < len(texts) and _REPLACEMENT in texts[stop]:
                stop += 1
            if stop > first + 1:
                texts[first:stop] = [self._tokenizer.decode(tokens[first:stop]), *[""] * (stop - first - 1)]
            first = stop + 1
        return [self._number(text) for text in texts]

    def _text(self, token: int) -> str:
        if token not in self._decoded:
            self._decoded[token] = self._tokenizer.decode([token])
        return self._decoded[token]

    def _number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def contexts_json(contexts: Contexts, pieces: Pieces, *, from_zero: bool) -> list[dict[str, Any]]:
    """Contexts with a digit per token: 0 where the concept is not active, else 1 (weakest) to 9.

    Args:
        contexts: of one concept.
        pieces: takes their texts in.
        from_zero: whether strengths begin at 0; otherwise at the smallest one that there is.
    """
    strengths = contexts.strengths
    active = ~strengths.isnan()
    shown = strengths[active]
    low = 0.0 if from_zero or not len(shown) else float(shown.min())
    high = float(shown.max()) if len(shown) else 1.0
    scaled = (strengths - low) / max(high - low, 1e-12)
    levels = (1 + scaled * (_LEVELS - 1)).round().clamp(1, _LEVELS).nan_to_num(0).int()
    rows = []
    for ids, level, values in zip(contexts.tokens.tolist(), levels.tolist(), strengths.tolist(), strict=True):
        there = [index for index, token in enumerate(ids) if token != NO_TOKEN]
        rows.append(
            {
                "pieces": pieces.of_tokens([ids[index] for index in there]),
                "levels": "".join(str(level[index]) for index in there),
                "focus": there.index(TOKENS_BEFORE),
                "value": round(values[TOKENS_BEFORE], 3),
            }
        )
    return rows


def small_norm_share(norms: Tensor) -> float:
    """Share of the columns (M) of W_comp whose norm is below ``SMALL_NORM``."""
    return float((norms < SMALL_NORM).double().mean())


def norm_histogram(norms: Tensor) -> str:
    """Inline SVG: how many columns of W_comp have which norm, on a logarithmic axis.

    Args:
        norms: (M); those below 1e-4 are counted in the first bar.
    """
    low = math.floor(math.log10(max(min(float(norms.min()), SMALL_NORM / 10), 1e-4)))
    high = max(math.ceil(math.log10(max(float(norms.max()), 1e-4)) + 1e-9), -1)
    bins = (high - low) * _BINS_PER_DECADE
    index = ((norms.double().clamp_min(1e-12).log10() - low) * _BINS_PER_DECADE).long().clamp(0, bins - 1)
    counts = torch.bincount(index, minlength=bins).tolist()
    width, height = _CHART
    step, floor = (width - 2 * _MARGIN) / bins, height - _MARGIN
    parts = []
    for number, count in enumerate(counts):
        if not count:
            continue
        tall = max(1.0, (floor - 22) * count / max(counts))
        edges = [10 ** (low + edge / _BINS_PER_DECADE) for edge in (number, number + 1)]
        kind = "small" if edges[1] <= SMALL_NORM * 1.0001 else "bar"
        parts.append(
            f'<rect class="{kind}" x="{_MARGIN + number * step + 0.5:.1f}" y="{floor - tall:.1f}" '
            f'width="{step - 1:.1f}" height="{tall:.1f}"><title>{edges[0]:.2g} to {edges[1]:.2g}: '
            f"{count:,} columns</title></rect>"
        )
    for exponent in range(low, high + 1):
        x = _MARGIN + (exponent - low) * _BINS_PER_DECADE * step
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">1e{exponent}</text>')
    parts.append(f'<text x="{_MARGIN}" y="12">up to {max(counts):,} columns in a bar</text>')
    x = _MARGIN + (math.log10(SMALL_NORM) - low) * _BINS_PER_DECADE * step
    parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{floor}"/>')
    parts.append(f'<line class="axis" x1="{_MARGIN}" x2="{width - _MARGIN}" y1="{floor}" y2="{floor}"/>')
    label = f"Norms of the {len(norms):,} columns of W_comp, {small_norm_share(norms):.1%} below {SMALL_NORM}"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def render(title: str, data: Mapping[str, Any], chart: str) -> str:
    """The page as text.

    Args:
        title: any text.
        data: see ``_payload`` in ``trainer.analysis.inspect``; strings may hold anything.
        chart: SVG from :func:`norm_histogram`.
    """
    template = resources.files(analysis).joinpath("inspect.html").read_text(encoding="utf-8")
    script = template.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"title": html.escape(title), "data": _embedded(data), "chart": chart, "script_hash": digest}
    # One pass, so that a token which spells a placeholder stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end its element: every other character is harmless inside a data block."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")
