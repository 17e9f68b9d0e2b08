"""Phases that all ranks pass or fail together, over one gloo group."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from trainer.checkpoint.store import CheckpointError

T = TypeVar("T")
Outcome = tuple[T | None, str | None]


class RankLostError(CheckpointError):
    """Another rank did not take part in a phase: it is gone, or its connection is."""


class Ranks:
    """The ranks of one gloo group, or this process alone where torch.distributed is not initialised.

    Each phase runs a function and tells every rank how it went. If it raised anywhere, it raises
    :class:`CheckpointError` everywhere, so no rank waits for one that has given up. Creating a
    group is collective.

    Args:
        timeout_s: Seconds that a rank waits for the slowest one in a phase.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.size = 0, 1
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def collect(self, phase: str, fn: Callable[[], T]) -> list[T]:
        """Run ``fn`` on every rank; return all results in the order of ranks. They must pickle."""
        outcomes = self._all_gather(self._run(fn))
        self._raise_errors(phase, outcomes)
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def agree(self, phase: str, fn: Callable[[], T]) -> T:
        """Run ``fn`` on every rank; return this rank's result once all have succeeded."""
        result, error = self._run(fn)
        self._raise_errors(phase, self._all_gather((None, error)))
        return result  # type: ignore[return-value]

    def on_main(self, phase: str, fn: Callable[[], T]) -> T:
        """Run ``fn`` on rank 0; return its result on every rank. It must pickle."""
        outcome: Outcome[T] = self._run(fn) if self.rank == 0 else (None, None)
        outcomes = self._all_gather(outcome)
        self._raise_errors(phase, outcomes)
        return outcomes[0][0]  # type: ignore[return-value]

    def leave(self) -> None:
        """Close this rank's connections: whoever waits for it in a phase fails at once."""
        group, self.group = self.group, None
        if group is not None:
            dist.destroy_process_group(group)
            del group
            # gloo closes its connections when the last reference is gone; a dead thread's frames hold some.
            gc.collect()

    def _run(self, fn: Callable[[], T]) -> Outcome[T]:
        try:
            return fn(), None
        except RankLostError:
            raise
        except (Exception, CheckpointException) as error:  # the library's own one is a BaseException
            return None, _describe(error, self.rank)

    def _all_gather(self, outcome: Outcome[T]) -> list[Outcome[T]]:
        if self.size == 1:
            return [outcome]
        if self.group is None:  # None would mean the default group, which the training uses
            raise RankLostError(f"rank {self.rank} has left its group")
        outcomes: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(outcomes, outcome, group=self.group)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise RankLostError(f"rank {self.rank}: another rank is gone: {text}") from error
        return outcomes

    def _raise_errors(self, phase: str, outcomes: list[Outcome[T]]) -> None:
        errors = list(dict.fromkeys(error for _, error in outcomes if error is not None))
        if errors:
            raise CheckpointError(f"{phase}: {'; '.join(errors)}")


def _describe(error: BaseException, rank: int) -> str:
    """One line: which rank, what. An error that the library has already gathered names its own ranks."""
    if isinstance(error, CheckpointException):
        return "; ".join(_describe(cause, failed) for failed, (cause, _) in sorted(error.failures.items()))
    text = " ".join(str(error).split())
    if isinstance(error, CheckpointError):
        return text
    return f"rank {rank}: {type(error).__name__}: {text}"
