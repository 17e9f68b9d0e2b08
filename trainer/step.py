"""One optimizer step, and one pass over the validation windows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from data.batch import Batch
from parallel.collectives import sum_over_ranks
from parallel.engine import Engine
from parallel.mesh import Mesh
from trainer.kernels.reference import MASKED_TARGET
from trainer.metrics.sums import ConceptUsage, StepMetrics
from trainer.objective import Objective


def train_step(
    engine: Engine,
    objective: Objective,
    mesh: Mesh,
    batch: Batch,
    *,
    upcoming: Batch | None = None,
    microbatch_size: int,
    tokens_per_step: int,
    rows_may_be_skipped: bool = False,
    step: int,
    lr: float,
    metrics: StepMetrics,
    usage: ConceptUsage | None,
    detail: bool,
) -> Tensor:
    """Forward and backward over this rank's rows, microbatch by microbatch, then one update.

    Args:
        batch: this rank's rows of the global batch, on the device. The last microbatch may be shorter.
        upcoming: the next step's batch on the device, whose first microbatch can be prepared already.
        microbatch_size: rows per forward and backward.
        tokens_per_step: tokens of the global batch; every loss is divided by it, or by how many of them
            count, so that gradients are sums over microbatches and ranks.
        rows_may_be_skipped: whether rows of any rank's batch may be damaged.
        step: optimizer steps done before this one.
        lr: learning rate of this step.
        metrics: starts anew and receives the sums of all microbatches.
        usage: marks the concepts in use, if given.
        detail: also compute the metrics that cost extra passes.

    Returns:
        () global gradient norm before clipping, on the device; the host waits for nothing.
    """
    metrics.reset()
    counted = objective.count(batch)
    if counted is None and rows_may_be_skipped:
        counted = counted_tokens(batch)
    divisor = tokens_per_step if counted is None else sum_over_ranks(counted, mesh).clamp_min(1)
    microbatches = batch.microbatches(microbatch_size)
    behind = [] if upcoming is None else upcoming.microbatches(microbatch_size)
    following = [*microbatches[1:], *behind[:1], None]
    for index, microbatch in enumerate(microbatches):
        objective.prepare(following[index])
        terms = objective(engine.model, microbatch, step=step, detail=detail)
        engine.backward(terms.loss / divisor, last_microbatch=index == len(microbatches) - 1)
        metrics.add(**terms.sums)
        if usage is not None and terms.concepts is not None:
            targets, kept = terms.concepts
            usage.add(targets, kept, targets != MASKED_TARGET)
    objective.before_step(engine.model)
    grad_norm = engine.step(lr)
    objective.after_step(engine.model, mesh)
    return grad_norm


def counted_tokens(batch: Batch) -> Tensor:
    """Tokens of this rank's rows that count: () int64 on their device."""
    num_tokens = batch.num_counted * (batch.tokens.shape[1] - 1)
    return torch.full((), num_tokens, dtype=torch.int64, device=batch.tokens.device)


@torch.no_grad()
def validate(
    engine: Engine,
    objective: Objective,
    mesh: Mesh,
    batches: Iterable[Batch],
    microbatch_size: int,
    device: torch.device,
    *,
    step: int,
) -> dict[str, float]:
    """Means over validation windows in eval mode, the same on all ranks.

    Args:
        batches: the same number on every rank.
        microbatch_size: rows per forward.
        device: where the model computes.
        step: optimizer steps done.
    """
    metrics = StepMetrics(objective.means, device)
    engine.model.eval()
    for batch in batches:
        for microbatch in batch.to(device).microbatches(microbatch_size):
            metrics.add(**objective(engine.model, microbatch, step=step, detail=True).sums)
    engine.model.train()
    means = metrics.reduce(partial(sum_over_ranks, mesh=mesh))
    return {name: value.item() for name, value in means.items()}
