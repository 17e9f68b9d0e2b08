"""Continue token sequences: how a token is drawn, and the loop that draws one after the other.

Each row has its own random numbers, made from the seed, its prompt and the number of its sample. So a
continuation does not depend on what else is in the batch, and two models, layouts or strengths that
continue the same prompt use the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer.model.decoding import Decoder, EditKept, EditResidual
from trainer.model.gpt2 import GPT2
from trainer.model.init import generator_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn from logits: temperature first, then top-k, then top-p of what is left."""

    temperature: float = 0.8
    """Divides the logits."""
    top_k: int = 50
    """Draw among the k most probable tokens: 1 always takes the best, 0 draws among all."""
    top_p: float = 1.0
    """Draw among the fewest tokens that have this much probability together (nucleus sampling)."""
    seed: int = 0
    """Of the random numbers."""

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be above 0; top_k=1 takes the best token")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


class Continuation(NamedTuple):
    """What was sampled after one prompt."""

    ids: list[int]
    """New tokens, without the end-of-text token."""
    ended: bool
    """Whether the model ended the text."""


class NextTokens(Protocol):
    """Next-token logits of growing rows."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Take prompts in; logits (B, V)."""
        ...

    def extend(self, tokens: Tensor) -> Tensor:
        """Take tokens (B, 1) int64 in; logits (B, V)."""
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (N,) int64."""
        ...


class WholeContext:
    """Runs the whole context again for every token, through the root forward of a model of any kind.

    For models that are sharded: their weights are whole only inside that forward, so nothing can be
    computed for the new position alone. Ranks that share a model must make the same calls.

    Args:
        model: maps (1, t) token ids to ``logits`` (1, 1, V) with ``last_only=True``.
        max_context: positions of the model; older tokens are dropped.
        device: of the model.
    """

    def __init__(self, model: nn.Module, max_context: int, device: torch.device) -> None:
        self.model = model
        self.max_context = max_context
        self.device = device
        self.rows: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See :class:`NextTokens`."""
        self.rows = [list(prompt) for prompt in prompts]
        return self._logits()

    def extend(self, tokens: Tensor) -> Tensor:
        """See :class:`NextTokens`."""
        for row, new in zip(self.rows, tokens.tolist(), strict=True):
            row.extend(new)
        return self._logits()

    def select(self, rows: Tensor) -> None:
        """See :class:`NextTokens`."""
        self.rows = [list(self.rows[row]) for row in rows.tolist()]

    def _logits(self) -> Tensor:
        logits = []
        for row in self.rows:
            context = torch.tensor([row[-self.max_context :]], device=self.device)
            logits.append(self.model(context, last_only=True).logits[:, -1])
        return torch.cat(logits)


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """One token per row by inverting the distribution function, so that equal numbers give equal tokens.

    Args:
        logits: (B, V) of any floating dtype.
        uniforms: (B,) fp64 in [0, 1).
        sampling: how.

    Returns:
        (B,) int64.
    """
    # Relative to the largest: a tiny temperature must not overflow.
    scaled = (logits.float() - logits.float().amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k:
        values, ids = scaled.topk(min(sampling.top_k, scaled.shape[-1]), dim=-1)
    else:
        values, ids = scaled.sort(dim=-1, descending=True)
    cumulative = values.softmax(-1, dtype=torch.float64).cumsum(-1)
    # Those before which top_p is not yet reached; the first one always.
    num_kept = (cumulative < sampling.top_p).sum(-1, keepdim=True).add(1).clamp_max(cumulative.shape[-1])
    total = cumulative.gather(-1, num_kept - 1)
    choice = torch.searchsorted(cumulative, uniforms.unsqueeze(-1) * total, right=True)
    return ids.gather(-1, choice.clamp(max=num_kept - 1)).squeeze(-1)


def uniform_numbers(
    prompts: Sequence[Sequence[int]], samples: Sequence[int], count: int, seed: int
) -> Tensor:
    """Random numbers (prompts * samples, count) fp64, sample after sample of each prompt."""
    return torch.stack(
        [
            torch.rand(count, generator=generator_for(seed, f"{sample}:{list(prompt)}"), dtype=torch.float64)
            for prompt in prompts
            for sample in samples
        ]
    )


@torch.no_grad()
def sample_from(
    source: NextTokens,
    logits: Tensor,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    samples: Sequence[int] = (0,),
    stop_id: int | None = None,
) -> list[Continuation]:
    """Continue prompts that ``source`` has taken in, all samples side by side.

    Args:
        source: where logits come from.
        logits: (prompts, V) of the first new tokens.
        prompts: token ids.
        sampling: how tokens are drawn.
        max_new_tokens: at least 1.
        samples: numbers of the samples; the same number gives the same sample again.
        stop_id: end-of-text token; nothing ends a text when ``None``.

    Returns:
        Sample after sample of each prompt.
    """
    device = logits.device
    if len(samples) > 1:
        repeated = torch.arange(len(prompts), device=device).repeat_interleave(len(samples))
        source.select(repeated)
        logits = logits[repeated]
    uniforms = uniform_numbers(prompts, samples, max_new_tokens, sampling.seed).to(device)
    tokens = torch.empty(uniforms.shape, dtype=torch.int64, device=device)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=device)
    for made in range(max_new_tokens):
        if made > 0:
            logits = source.extend(tokens[:, made - 1 : made])
        tokens[:, made] = draw(logits, uniforms[:, made], sampling)
        if stop_id is not None:
            ended |= tokens[:, made] == stop_id
            if bool(ended.all()):
                break
    return [_up_to(row, stop_id) for row in tokens[:, : made + 1].tolist()]


def _up_to(ids: list[int], stop_id: int | None) -> Continuation:
    if stop_id is None or stop_id not in ids:
        return Continuation(ids, ended=False)
    return Continuation(ids[: ids.index(stop_id)], ended=True)


def generate(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    stop_id: int | None = None,
    edit_kept: EditKept | None = None,
    edit_residual: EditResidual | None = None,
    batch_size: int = 32,
) -> list[Continuation]:
    """Continue prompts of any lengths with cached keys and values.

    Args:
        model: whole on this rank, in evaluation.
        prompts: token ids; with an edit as many as it has rows.
        sampling: how tokens are drawn.
        max_new_tokens: at least 1.
        num_samples: samples of each prompt.
        stop_id: end-of-text token; nothing ends a text when ``None``.
        edit_kept, edit_residual: as :class:`trainer.model.decoding.Decoder`.
        batch_size: continuations at a time; it bounds the memory and changes nothing else.

    Returns:
        Sample after sample of each prompt.

    Raises:
        ValueError: an empty prompt, logits that are not finite, or more tokens than the model has
            positions. (They are learned: a context that slides would move every token to another
            position, so that nothing cached could be kept.)
    """
    _check_fits(prompts, max_new_tokens, model.config.n_positions)
    num_prompts = max(1, batch_size // num_samples)
    results = []
    for first in range(0, len(prompts), num_prompts):
        part = prompts[first : first + num_prompts]
        rows = torch.arange(first, first + len(part), device=model.wte.weight.device)
        for first_sample in range(0, num_samples, batch_size):
            decoder = Decoder(
                model,
                max(map(len, part)) + max_new_tokens - 1,  # the last token is not read again
                edit_kept=None if edit_kept is None else edit_kept.select(rows),
                edit_residual=None if edit_residual is None else edit_residual.select(rows),
            )
            logits = decoder.start(part)
            if not bool(logits.isfinite().all()):
                raise ValueError("the model's logits are not finite: it diverged, or its weights are damaged")
            results += sample_from(
                decoder,
                logits,
                part,
                sampling,
                max_new_tokens=max_new_tokens,
                samples=range(first_sample, min(first_sample + batch_size, num_samples)),
                stop_id=stop_id,
            )
    return results


def _check_fits(prompts: Sequence[Sequence[int]], max_new_tokens: int, positions: int) -> None:
    if not all(prompts):
        raise ValueError("a prompt must have at least one token")
    longest = max(map(len, prompts))
    if longest > positions:
        raise ValueError(f"a prompt of {longest} tokens is longer than the model's {positions} positions")
    room = positions - longest + 1
    if max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be at most {room} after a prompt of {longest} tokens: "
            f"the model has {positions} positions"
        )


def continue_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    max_context: int,
    device: torch.device,
    sampling: Sampling,
) -> list[list[int]]:
    """The ``new_tokens`` ids that a model, sharded or not, writes after each prompt.

    Without a cache, see :class:`WholeContext`. Ranks that share a sharded model must call this together
    with equal arguments; they then draw equal tokens.

    Raises:
        ValueError: an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt must have at least one token")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        source = WholeContext(model, max_context, device)
        logits = source.start(prompts)
    results = sample_from(source, logits, prompts, sampling, max_new_tokens=new_tokens)
    model.train(was_training)
    return [result.ids for result in results]
