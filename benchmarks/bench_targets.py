"""``python -m benchmarks.bench_targets``: a training step on stored targets against one on the fly.

The step is the trainer's own, with random weights for student, teacher and autoencoder. Both kinds of steps
take turns on one model in one process. Stored targets come with the batch, as the loader brings them; reading
them is measured by ``bench_loader``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.record import Transcript, command_line, write_record
from benchmarks.students import Student, build_student, load_student, one_process, teacher_sizes
from data.batch import Batch
from data.cli import run_cli
from trainer.concepts.extractor import pack_ids
from trainer.objective import CoCoMixLoss

TARGET = 1.7
"""How many times as fast the step is meant to be."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of steps of both kinds: on the clock with a GPU, of the CPU without one."""

    on_the_fly: tuple[float, ...]
    cached: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over pairs of neighbouring steps: how many times as fast a cached step is."""
        return median(fly / own for fly, own in zip(self.on_the_fly, self.cached, strict=True))


class Bench:
    """One student and both objectives.

    Args:
        student: CoCoMix with a teacher; a step has the rows of its configuration.
    """

    def __init__(self, student: Student) -> None:
        assert isinstance(student.objective, CoCoMixLoss)
        config = student.config
        self.device, self.microbatch_size = student.device, config.train.microbatch_size
        self.on_the_fly = student
        self.cached = replace(student, objective=CoCoMixLoss(None, config.objective, config.train.steps))
        self.plain = student.random_batch(config.train.batch_size, seed=0)
        parts = self.plain.microbatches(self.microbatch_size)
        targets = torch.cat([pack_ids(student.objective.targets(part)) for part in parts])
        self.labelled = self.plain._replace(targets=targets.view(torch.uint16))

    def measure(self, repeats: int) -> StepTimes:
        """Steps in turns after one of each for warming up."""
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):
            for seconds, student, batch in zip(
                found, (self.on_the_fly, self.cached), (self.plain, self.labelled), strict=True
            ):
                seconds.append(self._step(student, batch))
        return StepTimes(*(tuple(seconds[1:]) for seconds in found))

    def _step(self, student: Student, batch: Batch) -> float:
        start = self._clock()
        student.step(batch, self.microbatch_size)
        return self._clock() - start

    def _clock(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure_cached_step(
    *, rows: int | None = None, seq_len: int = 1024, repeats: int = 3, dry_run: bool = False
) -> tuple[float, dict[str, Any]]:
    """Measure on this machine's GPU, or else on its CPU in fp32 with few rows.

    Args:
        rows: sequences per step; by default a microbatch of the configuration on a GPU and four on a CPU,
            so that what a step costs whatever its length does not hide what a row costs.
        seq_len: tokens of a sequence.
        repeats: steps of each kind.
        dry_run: tiny sizes, which say nothing.

    Returns:
        How many times as fast a step on stored targets is, and what was measured.
    """
    cuda = torch.cuda.is_available()
    rows = rows or (16 if cuda else 4)
    precision = "bf16" if cuda else "fp32"
    overrides = [
        f"--train.batch_size={rows}",
        f"--train.microbatch_size={rows}",
        f"--train.precision={precision}",
        f"--concepts.precision={precision}",
        *([] if dry_run else [f"--data.seq_len={seq_len}"]),
    ]
    config = load_student("69m", "cocomix", dry_run=dry_run, overrides=overrides)
    with one_process("auto") as world:
        student = build_student(config, world.device, teacher_sizes(dry_run=dry_run))
        times = Bench(student).measure(repeats)
    return times.ratio, {
        "seconds_on_the_fly": median(times.on_the_fly),
        "seconds_cached": median(times.cached),
        "clock": "GPU" if cuda else "one core",
        "rows": rows,
        "seq_len": seq_len,
        "precision": precision,
        "repeats": repeats,
    }


def bench(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Measure, print and write the record if that is wanted; returns 0."""
    for name in ("rows", "seq_len", "repeats"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    transcript = Transcript()
    settings = {"rows": args.rows, "seq_len": args.seq_len, "repeats": args.repeats}
    ratio, details = measure_cached_step(**settings)
    transcript.say(
        f"69M step of {details['rows']} x {details['seq_len']} tokens, {details['precision']}, seconds "
        f"({details['clock']}): {details['seconds_on_the_fly']:.2f} on the fly, "
        f"{details['seconds_cached']:.2f} on stored targets, {ratio:.2f} times as fast (target {TARGET})"
    )
    if args.record:
        path = write_record(
            "cached-targets",
            command=command_line("benchmarks.bench_targets", argv),
            config=settings,
            results={"ratio": ratio, **details},
            log=transcript.text,
        )
        print(f"record: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_targets", description="A step on stored targets against on the fly"
    )
    parser.add_argument("--rows", type=int, help="sequences of a step; 16 on a GPU, 4 on a CPU")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each kind")
    parser.add_argument("--record", action="store_true", help="write a record below benchmarks/records")
    return run_cli(partial(bench, argv=argv), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
