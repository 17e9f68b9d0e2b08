"""``python -m benchmarks.bench_step --against dense|ntp``: a training step on a CPU against another one.

``dense`` is the oracle (``benchmarks.reference_dense``) on copies of the same weights, ``ntp`` the paper's
next-token baseline, where the measured cost of CoCoMix is set against what its FLOPs predict. Both sides take
turns in one process; weights and tokens are random, and what both compute is compared before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import get_args

import torch

from benchmarks import agreement
from benchmarks.agreement import Disagreement
from benchmarks.dense_step import DenseStep, extractor_of
from benchmarks.parts import PARTS, dense_parts, own_parts
from benchmarks.record import Transcript, command_line, write_record
from benchmarks.step_memory import Memory, step_memory
from benchmarks.students import Kind, Size, Student, build_student, load_student, one_process, teacher_sizes
from benchmarks.turns import Seconds, ratio, take_turns, wall_ratio
from data.batch import Batch
from data.cli import run_cli
from launch.planning.teacher import Teacher
from trainer.config import RunConfig
from trainer.objective import split_tokens

TARGETS = {("dense", "fp32"): 2.0, ("dense", "bf16"): 4.0}
"""How many times as fast as the oracle's a step is meant to be; bf16 is the step as configured."""
MEMORY_TARGET = 0.4
"""Of the oracle's peak above the weights."""
NTP_TARGET = 1.05
"""Measured cost of CoCoMix in next-token steps, over the FLOPs of both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured."""

    size: Size = "69m"
    precision: str = "fp32"
    """Of teacher and student; the oracle's teacher is always fp32."""
    rows: int = 1
    seq_len: int = 1024
    repeats: int = 3
    """Steps of each side that count."""
    threads: int = 1
    dry_run: bool = False
    """Tiny sizes, which say nothing."""

    def __post_init__(self) -> None:
        for name in ("rows", "seq_len", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")

    @property
    def shape(self) -> str:
        """In words."""
        return "a dry run" if self.dry_run else f"{self.rows} x {self.seq_len} tokens"

    def config(self, kind: Kind) -> RunConfig:
        """The configuration of one side."""
        overrides = [f"--train.precision={self.precision}"]
        if kind == "cocomix":
            overrides.append(f"--concepts.precision={self.precision}")
        if not self.dry_run:
            overrides.append(f"--data.seq_len={self.seq_len}")
        return load_student(self.size, kind, dry_run=self.dry_run, overrides=overrides)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sides, step by step."""

    ratio: float
    """Median over rounds, CPU seconds: oracle / own, or CoCoMix / next-token."""
    wall_ratio: float
    """The same on the clock."""
    seconds: Mapping[str, Seconds]
    parts: Mapping[str, Mapping[str, float]]
    """CPU seconds of each part, by side."""
    equal_targets: float | None = None
    """Share of the tokens whose target ids are the oracle's."""
    predicted: float | None = None
    """Ratio of the FLOPs."""

    @property
    def over_predicted(self) -> float:
        """How much dearer than its FLOPs."""
        assert self.predicted is not None
        return self.ratio / self.predicted


def against_dense(settings: Settings) -> Comparison:
    """The step that trains, against the oracle's.

    Raises:
        Disagreement: in fp32 both do not find the same targets, loss or gradient norm.
    """
    with one_process(threads=settings.threads) as world:
        own = build_student(settings.config("cocomix"), world.device, teacher_of(settings))
        dense = DenseStep.like(own)
        batch = own.random_batch(settings.rows, seed=0)
        equal = _first_steps(own, dense, batch, exact=settings.precision == "fp32")
        steps: dict[str, Callable[[], object]] = {
            "dense": partial(dense, batch),
            "own": partial(own.step, batch, settings.rows),
        }
        seconds = take_turns(steps, settings.repeats, warm_ups=0)  # each has made its first step
        parts = {"dense": dense_parts(steps["dense"], 1), "own": own_parts(own, steps["own"], 1)}
    pair = (seconds["dense"], seconds["own"])
    return Comparison(ratio(*pair), wall_ratio(*pair), seconds, parts, equal_targets=equal)


def teacher_of(settings: Settings) -> Teacher:
    """GPT-2 124M."""
    return teacher_sizes(dry_run=settings.dry_run)


def _first_steps(own: Student, dense: DenseStep, batch: Batch, *, exact: bool) -> float:
    """One step of both on the same weights; returns the share of equal targets."""
    ids = extractor_of(own)(*split_tokens(batch)[:2])
    found = dense(batch)
    norm = own.step(batch, batch.num_rows)
    if not exact:
        return agreement.equal_share(ids, found.targets.ids)
    share = agreement.check_targets(ids, found.targets)
    loss = own.metrics.reduce(lambda sums: sums)["loss_total"]
    agreement.check_close("the loss", float(loss), float(found.loss), agreement.LOSS_TOLERANCE)
    agreement.check_close(
        "the gradient's norm", float(norm), float(found.grad_norm), agreement.NORM_TOLERANCE
    )
    return share


def against_ntp(settings: Settings) -> Comparison:
    """CoCoMix with its teacher, against the paper's next-token baseline of the same size."""
    with one_process(threads=settings.threads) as world:
        kinds: tuple[Kind, ...] = get_args(Kind)
        sides = {
            kind: build_student(settings.config(kind), world.device, teacher_of(settings)) for kind in kinds
        }
        steps: dict[str, Callable[[], object]] = {
            kind: partial(side.step, side.random_batch(settings.rows, seed=0), settings.rows)
            for kind, side in sides.items()
        }
        seconds = take_turns(steps, settings.repeats)
        parts = {str(kind): own_parts(sides[kind], steps[kind], 1) for kind in kinds}
    pair = (seconds["cocomix"], seconds["ntp"])
    predicted = sides["cocomix"].flops.total / sides["ntp"].flops.total
    return Comparison(ratio(*pair), wall_ratio(*pair), seconds, parts, predicted=predicted)


def compare_memory(settings: Settings) -> dict[str, Memory]:
    """Peak of one step of each side, in processes of their own."""
    config, teacher = settings.config("cocomix"), teacher_of(settings)
    return {
        "dense": step_memory("dense", config, teacher, settings.rows),
        "own": step_memory("own", config, teacher, settings.rows),
    }


def lines_of(settings: Settings, found: Comparison) -> list[str]:
    """A comparison for the reader."""
    names = list(found.seconds)
    lines = [
        f"{settings.size.upper()}, {settings.shape}, {settings.precision}, threads: {settings.threads}, "
        f"rounds: {settings.repeats}",
        "",
        f"| CPU seconds | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for part in PARTS:
        if any(part in found.parts[name] for name in names):
            cells = [f"{found.parts[name].get(part, 0):.3f}" for name in names]
            lines.append(f"| {part} | {' | '.join(cells)} |")
    lines.append(f"| whole step | {' | '.join(f'{found.seconds[n].cpu_median:.3f}' for n in names)} |")
    lines.append(f"| on the clock | {' | '.join(f'{found.seconds[n].wall_median:.3f}' for n in names)} |")
    lines.append("")
    if found.predicted is not None:
        lines.append(
            f"CoCoMix / NTP {found.ratio:.3f}, by FLOPs {found.predicted:.3f}: "
            f"{found.over_predicted:.3f} of it (target at most {NTP_TARGET})"
        )
        return lines
    lines.append(
        f"{found.ratio:.2f} times as fast in CPU time, {found.wall_ratio:.2f} on the clock "
        f"(target {TARGETS['dense', settings.precision]}); "
        f"targets equal at {found.equal_targets:.2%} of the tokens"
    )
    return lines


def memory_line(found: Mapping[str, Memory]) -> str:
    """Both peaks."""
    own, dense = found["own"].above, found["dense"].above
    return (
        f"peak above the weights: {own / 2**20:.0f} MiB, the oracle's {dense / 2**20:.0f} MiB: "
        f"{own / dense:.2f} of it (target at most {MEMORY_TARGET})"
    )


def bench(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Measure, print and write the record if that is wanted; returns 0."""
    transcript, results = Transcript(), []
    measure = against_dense if args.against == "dense" else against_ntp
    names = ("size", "rows", "seq_len", "repeats", "threads", "dry_run")
    chosen = {name: getattr(args, name) for name in names}
    settings = [Settings(precision=precision, **chosen) for precision in args.precision]
    for each in settings:
        found = measure(each)
        transcript.say("\n".join(lines_of(each, found)))
        result = {"settings": asdict(each), **asdict(found)}
        if args.memory:
            memory = compare_memory(each)
            transcript.say(memory_line(memory))
            result["memory"] = {side: asdict(part) for side, part in memory.items()}
        results.append(result)
        transcript.say()
    if args.record:
        path = write_record(
            f"step-against-{args.against}",
            command=command_line("benchmarks.bench_step", argv),
            config={**chosen, "against": args.against},
            results=results,
            log=transcript.text,
        )
        print(f"record: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_step", description="A training step on a CPU against another one"
    )
    parser.add_argument("--against", choices=("dense", "ntp"), default="dense")
    parser.add_argument("--size", choices=get_args(Size), default="69m")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=1, help="sequences of a step")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each side")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the process; more of them wait for each other"
    )
    parser.add_argument("--memory", action="store_true", help="also peak memory against the oracle's")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--record", action="store_true", help="write a record below benchmarks/records")
    torch.manual_seed(0)
    return run_cli(partial(bench, argv=argv), parser, argv, errors=(Disagreement,))


if __name__ == "__main__":
    sys.exit(main())
