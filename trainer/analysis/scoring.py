"""Log-likelihoods of continuations, in batches, with a model of any kind, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.collectives import sum_over_ranks
from parallel.mesh import Mesh


class Request(NamedTuple):
    """A continuation to be scored after its context; token ids, at least one each."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """What the model says about a continuation."""

    log_likelihood: float
    """Of all its tokens together, nats."""
    is_greedy: bool
    """Whether each of its tokens is the most probable one."""


class TokenStatistics(NamedTuple):
    """What logits say about labels; each (B, T)."""

    nats: Tensor
    """fp32 cross entropy."""
    confidence: Tensor
    """fp32 probability of the most probable token."""
    hit: Tensor
    """bool: the most probable token is the label."""


def token_statistics(logits: Tensor, labels: Tensor) -> TokenStatistics:
    """Statistics of logits (B, T, V) and labels (B, T) int64."""
    logits = logits.float()
    total = logits.logsumexp(-1)
    best = logits.max(-1)
    nats = total - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return TokenStatistics(nats, (best.values - total).exp(), best.indices == labels)


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores requests with a model.

    Ranks that share a sharded model must make the same calls: the batches are dealt out to the
    data-parallel ranks, each rank runs equally many, and all get all results.
    """

    model: nn.Module
    """Maps (B, t) token ids to ``logits`` (B, t, V)."""
    max_context: int
    """Positions of the model. Longer requests lose their oldest tokens."""
    device: torch.device
    """Of the model."""
    batch_tokens: int = 2048
    """Positions per forward, padding included; their logits exist at one time."""
    mesh: Mesh | None = None
    """The ranks; ``None`` for a model that is whole."""

    @torch.no_grad()
    def __call__(
        self, requests: Sequence[Request], progress: Callable[[int], None] | None = None
    ) -> list[Score]:
        """Score all requests.

        Args:
            requests: in any order; they are batched by length.
            progress: told how many requests of this rank are done.

        Raises:
            ValueError: an empty context or continuation, or a continuation longer than the model's
                positions.
        """
        for request in requests:
            self._check(request)
        # The longest first, so that what does not fit into memory shows at once.
        order = sorted(range(len(requests)), key=lambda index: -self._length(requests[index]))
        batches = self._batches(requests, order)
        rank, size = (0, 1) if self.mesh is None else (self.mesh.dp_rank, self.mesh.dp_size)
        results = torch.zeros(2, len(requests), dtype=torch.float64, device=self.device)
        for start in range(0, len(batches), size):
            # Where the ranks do not divide the batches, the last one is run again and not counted.
            mine = batches[min(start + rank, len(batches) - 1)]
            scores = self._score([requests[index] for index in mine])
            if start + rank < len(batches):
                results[:, torch.tensor(mine, device=self.device)] = scores
            if progress is not None:
                progress(sum(map(len, batches[: start + size])))
        if self.mesh is not None:
            results = sum_over_ranks(results, self.mesh)
        likelihoods, greedy = results.tolist()
        return [Score(value, flag > 0) for value, flag in zip(likelihoods, greedy, strict=True)]

    def _check(self, request: Request) -> None:
        if not request.context or not request.continuation:
            raise ValueError("a request needs at least one token of context and one of continuation")
        if len(request.continuation) > self.max_context:
            raise ValueError(
                f"a continuation of {len(request.continuation)} tokens is longer than the model's "
                f"{self.max_context} positions"
            )

    def _length(self, request: Request) -> int:
        # The last token is predicted, never read.
        return min(len(request.context) + len(request.continuation) - 1, self.max_context)

    def _batches(self, requests: Sequence[Request], order: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        for index in order:
            if batches:
                longest = self._length(requests[batches[-1][0]])
                if longest * (len(batches[-1]) + 1) <= self.batch_tokens:
                    batches[-1].append(index)
                    continue
            batches.append([index])
        return batches

    def _score(self, batch: Sequence[Request]) -> Tensor:
        """Log-likelihoods and greedy flags, (2, len(batch)) fp64."""
        longest = self._length(batch[0])
        tokens = torch.zeros(len(batch), longest + 1, dtype=torch.int64)
        counted = torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, (context, continuation) in enumerate(batch):
            ids = [*context, *continuation][-(self.max_context + 1) :]
            # Padding behind: causality keeps it from changing anything.
            tokens[row, : len(ids)] = torch.tensor(ids)
            counted[row, len(ids) - 1 - len(continuation) : len(ids) - 1] = True
        tokens, counted = tokens.to(self.device), counted.to(self.device)
        logits = self.model(tokens[:, :-1]).logits
        statistics = token_statistics(logits, tokens[:, 1:])
        likelihoods = -(statistics.nats.double() * counted).sum(1)
        return torch.stack([likelihoods, (statistics.hit | ~counted).all(1).double()])
