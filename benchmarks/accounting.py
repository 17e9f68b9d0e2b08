"""``python -m benchmarks.accounting``: FLOPs, bytes and memory per token of the paper's models, as Markdown.

FLOPs are those of ``trainer.flops``. Bytes and memory are counted on fake tensors: the real training step
of one GPU in bf16 with two sizes of its microbatch, whose difference is what a token costs and whose rest is
what a step costs whatever its size. The tables stand in docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple, get_args

from benchmarks.students import CONFIGS, Kind, Size
from data.cli import run_cli
from launch.planning.forecast import Assumptions, Plan, make_plan
from launch.planning.layout import Cluster
from launch.planning.measure import measure
from trainer.config import RunConfig
from trainer.config_io import load_config
from trainer.flops import PartFlops

ROWS = (4, 8)
"""Sequences of the two steps that are compared."""
PARTS = {
    "teacher": ("teacher_blocks", "teacher_head"),
    "autoencoder": ("sae_encoder", "attribution"),
    "blocks": ("blocks", "blocks_below_insertion", "blocks_above_insertion"),
    "concept head": ("concept_head",),
    "mixing": ("compress",),
    "LM head": ("lm_head",),
}


class Case(NamedTuple):
    """One line of the tables."""

    size: Size
    kind: Kind
    cached: bool = False

    @property
    def name(self) -> str:
        """For the reader."""
        kind = "NTP" if self.kind == "ntp" else "CoCoMix"
        size = {"1b": "1.38B"}.get(self.size, self.size.upper())
        return f"{size} {kind}{', stored targets' if self.cached else ''}"


def cases(sizes: Sequence[Size]) -> list[Case]:
    """Baseline, CoCoMix with its teacher and CoCoMix on stored targets of each size."""
    return [
        case
        for size in sizes
        for case in (Case(size, "ntp"), Case(size, "cocomix"), Case(size, "cocomix", cached=True))
    ]


def plan_of(case: Case, rows: int) -> Plan:
    """A step of so many sequences in one microbatch on one GPU."""
    name = case.size if case.kind == "cocomix" else f"{case.size}_ntp"
    overrides = [f"--train.batch_size={rows}", f"--train.microbatch_size={rows}"]
    overrides += ["--concepts.source=cache"] if case.cached else []
    return make_plan(
        load_config(RunConfig, CONFIGS / f"{name}.yaml", overrides), Cluster(1, 1), Assumptions()
    )


@dataclass(frozen=True, slots=True)
class Cost:
    """What grows with the tokens of a microbatch, and what does not; bytes."""

    moved_per_token: float
    moved_per_step: float
    kept_per_token: float
    kept_per_step: float


def cost(case: Case) -> Cost:
    """Count two steps on fake tensors, each in a process of its own: torch remembers fake meshes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        few, many = pool.map(measure, [plan_of(case, rows) for rows in ROWS])
    tokens = [rows * plan_of(case, rows).config.data.seq_len for rows in ROWS]
    moved = (many.moved - few.moved) / (tokens[1] - tokens[0])
    peaks = [max(found.peaks.values()) for found in (few, many)]
    kept = (peaks[1] - peaks[0]) / (tokens[1] - tokens[0])
    return Cost(moved, few.moved - moved * tokens[0], kept, peaks[0] - kept * tokens[0])


def flops_table(sizes: Sequence[Size]) -> list[str]:
    """MFLOPs per token by part, forward + backward."""
    lines = [
        f"| MFLOPs per token | {' | '.join(PARTS)} | all | to NTP |",
        f"|---|{'---|' * (len(PARTS) + 2)}",
    ]
    baseline = 1
    for case in cases(sizes):
        flops = plan_of(case, 1).flops
        cells = []
        for names in PARTS.values():
            found = sum((flops.parts[name] for name in names if name in flops.parts), PartFlops())
            cells.append(f"{found.forward / 1e6:.1f} + {found.backward / 1e6:.1f}" if found.total else "")
        baseline = flops.total if case.kind == "ntp" else baseline
        total = f"{flops.total / 1e6:.0f} | {flops.total / baseline:.2f}"
        lines.append(f"| {case.name} | {' | '.join(cells)} | {total} |")
    return lines


def bytes_table(sizes: Sequence[Size]) -> list[str]:
    """Traffic to memory and memory itself."""
    lines = [
        "| | kB moved per token | GB moved per step | FLOPs per byte | kB kept per token | "
        "GiB whatever the tokens |",
        "|---|---|---|---|---|---|",
    ]
    return [*lines, *(bytes_line(case, cost(case)) for case in cases(sizes))]


def bytes_line(case: Case, found: Cost) -> str:
    """One row of :func:`bytes_table`."""
    flops = plan_of(case, 1).flops.total
    return (
        f"| {case.name} | {found.moved_per_token / 1e3:.0f} | {found.moved_per_step / 1e9:.1f} | "
        f"{flops / found.moved_per_token:.0f} | {found.kept_per_token / 1e3:.0f} | "
        f"{found.kept_per_step / 2**30:.2f} |"
    )


def run(args: argparse.Namespace) -> int:
    """Print both tables; returns 0."""
    print("\n".join(["", *flops_table(args.sizes), "", *bytes_table(args.sizes)]))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accounting", description="FLOPs, bytes and memory per token, as Markdown"
    )
    parser.add_argument("--sizes", nargs="+", choices=get_args(Size), default=list(get_args(Size)))
    return run_cli(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
