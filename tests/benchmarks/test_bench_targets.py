"""The benchmark of stored targets compares equal steps."""

from __future__ import annotations

import torch

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from benchmarks.bench_targets import Bench
from benchmarks.students import build_student, load_student, teacher_sizes
from parallel.world import World
from tests.ranks import run_ranks

TINY = "--train.batch_size=3 --train.microbatch_size=2 --train.precision=fp32 --concepts.precision=fp32"


def test_both_steps_minimise_the_same_loss() -> None:
    """Catches a step that is fast because it trains on nothing."""

    def compare(world: World) -> tuple[list[float], int, bool]:
        config = load_student("69m", "cocomix", dry_run=True, overrides=TINY.split())
        bench = Bench(build_student(config, world.device, teacher_sizes(dry_run=True)))
        losses = []
        for student, batch in ((bench.on_the_fly, bench.plain), (bench.cached, bench.labelled)):
            parts = batch.microbatches(2)
            with torch.no_grad():
                terms = [
                    student.objective(student.engine.model, part, step=0, detail=False) for part in parts
                ]
            losses.append(sum(float(term.loss) for term in terms))
        times = bench.measure(2)
        return losses, len(times.cached), times.ratio > 0

    ((fly, cached), count, positive) = run_ranks(compare, 1)[0]
    assert fly == cached > 0
    assert count == 2
    assert positive
