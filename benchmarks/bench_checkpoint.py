"""``python -m benchmarks.bench_checkpoint [--ranks 1 2] [--repeats 9] [--record]``: the stall of a save.

Real steps of a next-token student on gloo ranks, in blocks: before the first step of a block nothing is
saved, a checkpoint is saved synchronously, or one is saved in the background. The three kinds of block take
turns, so that drift of the machine falls on all of them; medians are compared. The clock of a block stops
after its last step; a background save that is not through by then is waited for outside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch.distributed as dist

from benchmarks.faults.ranks import run_ranks
from benchmarks.faults.world import TinyWorld, write_world
from benchmarks.record import Transcript, command_line, write_record
from data.cli import run_cli
from parallel.world import World
from trainer.build import Parts, build_parts
from trainer.checkpoint.io import Checkpointer, SaveResult
from trainer.checkpoint.store import CheckpointStore
from trainer.config import RunConfig
from trainer.metrics.sums import StepMetrics
from trainer.step import train_step

Mode = Literal["none", "sync", "async"]
MODES: tuple[Mode, ...] = ("none", "sync", "async")
LABELS = {"none": "none", "sync": "synchronous", "async": "background"}
BYTES_PER_WEIGHT = 12
"""fp32 weight and both AdamW moments."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of steps on one rank, or the slowest of all ranks. Seconds."""

    mode: Mode
    stall_s: float
    """How long the call of save blocked the loop."""
    loop_s: float
    """The call of save and all steps."""
    commit_s: float
    """From the call of save to the commit; 0 without a save."""


class Bench:
    """The measured loop on one rank.

    Args:
        config: the run.
        world: this rank.
        root: where checkpoints go.
        steps: optimizer steps in a block.
    """

    def __init__(self, config: RunConfig, world: World, root: Path, steps: int) -> None:
        self._config, self._steps = config, steps
        self._parts: Parts = build_parts(config, world)
        self._metrics = StepMetrics(self._parts.objective.means, world.device)
        self._checkpointer = Checkpointer(CheckpointStore(root, keep_last=1), timeout_s=120.0)
        self._number = 0

    def measure(self, repeats: int) -> tuple[int, list[Block]]:
        """Return the number of weights and all blocks, after one block of each kind that does not count."""
        for mode in MODES:
            self._block(mode)
        blocks = []
        for repeat in range(repeats):
            first = repeat % len(MODES)
            blocks += [self._block(mode) for mode in (*MODES[first:], *MODES[:first])]
        num_weights = sum(parameter.numel() for parameter in self._parts.engine.model.parameters())
        self._parts.loader.close()
        return num_weights, blocks

    def _block(self, mode: Mode) -> Block:
        dist.barrier()
        started = time.perf_counter()
        if mode != "none":
            self._save(wait=mode == "sync")
        stall_s = time.perf_counter() - started
        results: list[SaveResult] = []
        for _ in range(self._steps):
            self._step()
            results += self._checkpointer.poll()
        loop_s = time.perf_counter() - started
        results += self._checkpointer.close()
        for result in results:
            if result.error is not None:
                raise result.error
        return Block(mode, stall_s, loop_s, sum(result.seconds for result in results))

    def _step(self) -> None:
        parts, config = self._parts, self._config
        train_step(
            parts.engine,
            parts.objective,
            parts.mesh,
            next(parts.loader),
            microbatch_size=config.train.microbatch_size,
            tokens_per_step=config.tokens_per_step,
            step=0,
            lr=config.optim.lr,
            metrics=self._metrics,
            usage=None,
            detail=False,
        )

    def _save(self, *, wait: bool) -> None:
        self._number += 1
        state = self._parts.engine.state_dict()
        self._checkpointer.save(self._number, state, {}, config_text="", wait=wait)


def bench_config(world: TinyWorld, run_dir: Path, width: int) -> RunConfig:
    """A run whose state is large enough to take time, on the tiny world's tokens."""
    return world.config(
        run_dir, "ntp", model__d_model=width, model__n_layer=4, model__n_head=4, model__vocab_size=8192
    )


def slowest(per_rank: Sequence[Sequence[Block]]) -> list[Block]:
    """Blocks of a run as its slowest rank sees them."""
    return [
        Block(
            blocks[0].mode,
            max(block.stall_s for block in blocks),
            max(block.loop_s for block in blocks),
            max(block.commit_s for block in blocks),
        )
        for blocks in zip(*per_rank, strict=True)
    ]


def summarise(blocks: Sequence[Block]) -> dict[str, dict[str, float]]:
    """Medians by kind of block, and the ratio of the loop to one without a save.

    The ratio is the median over turns of (this kind's loop / the loop without a save in the same turn).
    """
    by_mode = {mode: [block for block in blocks if block.mode == mode] for mode in MODES}
    return {
        mode: {
            "stall_s": median(block.stall_s for block in mine),
            "loop_s": median(block.loop_s for block in mine),
            "commit_s": median(block.commit_s for block in mine),
            "ratio": median(a.loop_s / b.loop_s for a, b in zip(mine, by_mode["none"], strict=True)),
        }
        for mode, mine in by_mode.items()
    }


def table_rows(num_ranks: int, megabytes: float, summary: dict[str, dict[str, float]]) -> list[str]:
    """One Markdown row per kind of block."""
    rows = []
    for mode in MODES:
        found = summary[mode]
        stall_s, commit = found["stall_s"], f"{found['commit_s']:.3f} s"
        rows.append(
            f"| {num_ranks} | {megabytes:.0f} MB | {LABELS[mode]} "
            f"| {stall_s:.3f} s | {found['loop_s']:.3f} s | {found['ratio']:.2f} "
            f"| {'-' if mode == 'none' else commit} |"
        )
    return rows


def bench(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Measure, print the table and write the record if that is wanted; returns 0."""
    for name in ("repeats", "steps", "width"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    transcript = Transcript()
    lines = [
        f"| ranks | state | save | stall | loop of {args.steps} steps | ratio to none | until the commit |",
        "|---|---|---|---|---|---|---|",
    ]
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.dir) as name:
        folder = Path(name)
        world = write_world(folder / "world")
        for num_ranks in args.ranks:
            measured = _measure(folder / f"ranks_{num_ranks}", world, num_ranks, args)
            megabytes = measured["num_weights"] * BYTES_PER_WEIGHT / 1e6
            lines += table_rows(num_ranks, megabytes, measured["summary"])
            results.append(measured)
    transcript.say("\n".join(lines))
    for measured in results:
        found = measured["summary"]
        share = found["async"]["stall_s"] / found["sync"]["stall_s"]
        transcript.say(f"{measured['ranks']} ranks: background stall / synchronous stall = {share:.2f}")
    if args.record:
        path = write_record(
            "checkpoint-stall",
            command=command_line("benchmarks.bench_checkpoint", argv),
            config={"repeats": args.repeats, "steps_per_block": args.steps, "d_model": args.width},
            results=results,
            log=transcript.text,
        )
        print(f"record: {path}")
    return 0


def _measure(folder: Path, world: TinyWorld, num_ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    config = bench_config(world, folder / "run", args.width)

    def one_rank(rank: World) -> tuple[int, list[Block]]:
        return Bench(config, rank, folder / "checkpoints", args.steps).measure(args.repeats)

    measured = run_ranks(one_rank, num_ranks, folder / "ranks", timeout_s=900.0)
    blocks = slowest([found for _, found in measured])
    return {
        "ranks": num_ranks,
        "num_weights": measured[0][0],
        "summary": summarise(blocks),
        "blocks": [asdict(block) for block in blocks],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_checkpoint", description="Measure what a save costs the step loop"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of gloo ranks")
    parser.add_argument("--repeats", type=int, default=9, help="blocks of each kind")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps in a block")
    parser.add_argument("--width", type=int, default=256, help="model.d_model; the state grows with it")
    parser.add_argument("--dir", type=Path, help="where to write checkpoints; a temporary folder by default")
    parser.add_argument("--record", action="store_true", help="write a record below benchmarks/records")
    return run_cli(partial(bench, argv=argv), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
