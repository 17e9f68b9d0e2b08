"""Targets one microbatch ahead: the same ids, each computed once, whatever happens in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from data.batch import Batch
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.test_run import StopAfter, losses
from tests.trainer.tiny_run import tiny_config
from trainer.concepts.ahead import TargetsAhead
from trainer.concepts.extractor import TargetExtractor
from trainer.config import RunConfig
from trainer.main import train
from trainer.stop import StopRequest

CPU = torch.device("cpu")


def _microbatches(seed: int) -> list[Batch]:
    tokens = torch.randint(0, 50, (6, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, 6).microbatches(2)


class _Counted:
    """Targets that name their tokens, and how often they were computed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: Batch) -> Tensor:
        self.calls += 1
        return batch.tokens[:, 1:, None].clone()


def test_each_microbatch_is_computed_once() -> None:
    """Catches targets that are computed ahead and again, or handed to another microbatch."""
    compute = _Counted()
    ahead = TargetsAhead(compute, CPU)
    microbatches = _microbatches(0)
    for index, microbatch in enumerate(microbatches):
        if index + 1 < len(microbatches):
            ahead.start(microbatches[index + 1])
        assert torch.equal(ahead.take(microbatch), microbatch.tokens[:, 1:, None])
    assert compute.calls == len(microbatches)


def test_what_was_begun_for_nothing_is_dropped() -> None:
    """Catches stale targets after a rewind: the next microbatch is another one, at other memory."""
    compute = _Counted()
    ahead = TargetsAhead(compute, CPU)
    ahead.start(_microbatches(0)[0])
    others = _microbatches(1)
    ahead.start(others[1])
    assert torch.equal(ahead.take(others[0]), others[0].tokens[:, 1:, None])
    assert torch.equal(ahead.take(others[1]), others[1].tokens[:, 1:, None])
    assert compute.calls == 3
    assert not ahead._started


def _extractions(config: RunConfig, stop: StopRequest | None = None) -> int:
    """Train and count how often targets were extracted."""

    def one_rank(world: World) -> int:
        calls = 0
        extract = TargetExtractor.__call__

        def counted(self: TargetExtractor, *inputs: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return extract(self, *inputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TargetExtractor, "__call__", counted)
            train(config, world, stop or StopRequest())
        return calls

    (calls,) = run_ranks(one_rank, 1, timeout_s=120)
    return calls


@pytest.mark.dist
def test_a_run_ahead_equals_one_in_order_bitwise(tiny_world: Path, tmp_path: Path) -> None:
    """Catches targets of other tokens, and a data cursor that counts the batch that was only looked at.

    Over a stop, a resume and validations between the steps; across steps too, so that only the first
    microbatch of a process waits, and one is computed for the step that never comes.
    """
    order = tiny_config(tiny_world, tmp_path / "order")
    changes = {"concepts__ahead": True, "data__prefetch_steps": 0}
    ahead = tiny_config(tiny_world, tmp_path / "ahead", **changes)
    parts = tiny_config(tiny_world, tmp_path / "parts", **changes, checkpoint__every_steps=0)
    assert _extractions(ahead) == _extractions(order) + 1
    _extractions(parts, StopAfter(5))
    _extractions(parts)
    assert losses(tmp_path / "ahead") == losses(tmp_path / "order")
    assert losses(tmp_path / "parts") == losses(tmp_path / "order")


@pytest.mark.parametrize(("key", "value"), [("tp", 2), ("shard_teacher", True)])
def test_a_teacher_that_ranks_share_refuses_it(
    key: str, value: Any, tiny_world: Path, tmp_path: Path
) -> None:
    """Catches collectives on two streams, whose order differs from rank to rank."""
    with pytest.raises(ValueError, match=rf"concepts\.ahead=true needs parallel\.{key}="):
        tiny_config(tiny_world, tmp_path, concepts__ahead=True, **{f"parallel__{key}": value})


@pytest.mark.gpu
def test_streams_wait_for_each_other() -> None:
    """Catches a missing wait or record_stream: targets read too early, or memory that is used twice.

    The teacher's part is made slow, the main stream allocates and overwrites memory of the same sizes
    all the time, and the tokens of a microbatch are dropped at once.
    """
    device = torch.device("cuda")

    def compute(batch: Batch) -> Tensor:
        torch.cuda._sleep(20_000_000)
        return batch.tokens[:, 1:, None] * 3

    ahead = TargetsAhead(compute, device)
    host = [torch.randint(0, 2**30, (8, 1025)).pin_memory() for _ in range(20)]
    batches = [Batch(tokens, 8) for tokens in host]
    following = batches[0].to(device)
    for index in range(len(batches)):
        batch, following = following, batches[(index + 1) % len(batches)].to(device)
        ahead.start(following)
        targets = ahead.take(batch)
        del batch
        for _ in range(8):
            torch.full((8, 1025), -1, device=device)
            torch.full((8, 1024, 1), -1, device=device)
        assert torch.equal(targets.cpu(), host[index][:, 1:, None] * 3), index
