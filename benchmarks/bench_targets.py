"""``python -m benchmarks.bench_targets``: a training step on stored targets against one on the fly.

The step is the trainer's own: student, objective, engine and optimizer of a configuration, with random
weights for teacher and autoencoder. Both kinds of steps take turns on one model in one process. Stored
targets come with the batch, as the loader brings them; reading them is measured by ``bench_loader``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.record import Transcript, command_line, write_record
from data.batch import Batch
from data.cli import run_cli
from parallel.apply import apply_parallel, materialize
from parallel.engine import FsdpEngine
from parallel.mesh import Mesh, build_mesh
from parallel.world import World, start_world, stop_world
from trainer.concepts.extractor import TargetExtractor, pack_ids
from trainer.concepts.sae import TopKSae
from trainer.config import ModelConfig, RunConfig
from trainer.config_io import load_config
from trainer.metrics.sums import StepMetrics
from trainer.model.cocomix import CoCoMix
from trainer.model.formats import Layout
from trainer.model.gpt2 import GPT2
from trainer.model.init import initial_value
from trainer.objective import CoCoMixLoss, split_tokens
from trainer.optim import build_optimizer
from trainer.step import train_step

CONFIG = Path(__file__).parents[1] / "configs" / "69m.yaml"
TARGET = 1.7
"""How many times as fast the step is meant to be."""
GPT2_124M = ModelConfig(d_model=768, n_layer=12, n_head=12, vocab_size=50257, n_positions=1024)


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
    """One model and both objectives."""

    def __init__(self, config: RunConfig, world: World) -> None:
        assert config.concepts is not None
        self.config, self.device = config, world.device
        torch.manual_seed(0)
        self.mesh = build_mesh(config.parallel, world)
        self.engine = _engine(config, self.mesh, self.device)
        extractor = _extractor(config, self.device)
        weighting = (config.objective, config.train.steps)
        self.on_the_fly, self.cached = CoCoMixLoss(extractor, *weighting), CoCoMixLoss(None, *weighting)
        self.plain = _tokens(config, self.device)
        targets = [pack_ids(extractor(*split_tokens(part))) for part in self._parts(self.plain)]
        self.labelled = self.plain._replace(targets=torch.cat(targets).view(torch.uint16))

    def measure(self, repeats: int) -> StepTimes:
        """Steps in turns after one of each for warming up."""
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):
            for seconds, objective, batch in zip(
                found, (self.on_the_fly, self.cached), (self.plain, self.labelled), strict=True
            ):
                seconds.append(self._step(objective, batch))
        return StepTimes(*(tuple(seconds[1:]) for seconds in found))

    def _step(self, objective: CoCoMixLoss, batch: Batch) -> float:
        config = self.config
        start = self._clock()
        train_step(
            self.engine,
            objective,
            self.mesh,
            batch,
            step=0,
            microbatch_size=config.train.microbatch_size,
            tokens_per_step=config.tokens_per_step,
            lr=1e-6,
            metrics=StepMetrics(objective.means, self.device),
            usage=None,
            detail=False,
        )
        return self._clock() - start

    def _clock(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _parts(self, batch: Batch) -> list[Batch]:
        return batch.microbatches(self.config.train.microbatch_size)


def _engine(config: RunConfig, mesh: Mesh, device: torch.device) -> FsdpEngine:
    assert config.model is not None
    assert config.concepts is not None
    with torch.device("meta"):
        student = CoCoMix(config.model, config.concepts)
    apply_parallel(student, student.plan, mesh, config.parallel, config.train.precision)
    first = partial(
        initial_value, seed=1, n_layer=config.model.n_layer, real_rows=Layout.of(student).real_rows
    )
    materialize(student, device, first)
    return FsdpEngine(student, build_optimizer(student, config.optim), mesh, config.optim.clip_norm)


def _extractor(config: RunConfig, device: torch.device) -> TargetExtractor:
    """GPT-2 124M and an autoencoder of its width with random weights: only sizes matter here."""
    concepts = config.concepts
    assert concepts is not None
    dtype = torch.bfloat16 if concepts.precision == "bf16" else torch.float32
    with torch.device(device):
        teacher = GPT2(GPT2_124M).to(dtype).requires_grad_(False)
        sae = TopKSae(GPT2_124M.d_model, concepts.num_concepts, concepts.top_k).requires_grad_(False)
    for weight in (sae.encoder.weight, sae.decoder):
        torch.nn.init.normal_(weight, std=GPT2_124M.d_model**-0.5)
    return TargetExtractor(teacher, sae, concepts)


def _tokens(config: RunConfig, device: torch.device) -> Batch:
    shape = (config.train.batch_size, config.data.seq_len + 1)
    tokens = torch.randint(0, GPT2_124M.vocab_size, shape).to(torch.int32)
    return Batch(tokens, len(tokens)).to(device)


def bench_config(rows: int, microbatch: int, seq_len: int, precision: str) -> RunConfig:
    """The 69M configuration with ``rows`` sequences per step."""
    return load_config(
        RunConfig,
        CONFIG,
        [
            f"--train.batch_size={rows}",
            f"--train.microbatch_size={microbatch}",
            f"--train.precision={precision}",
            f"--concepts.precision={precision}",
            f"--data.seq_len={seq_len}",
        ],
    )


@contextmanager
def _one_process() -> Iterator[World]:
    """A world of one rank, with one thread: threads that wait for each other cost CPU time too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield start_world("auto", 600.0)
    finally:
        stop_world()
        torch.set_num_threads(threads)


def measure_cached_step(
    *, rows: int | None = None, seq_len: int = 1024, repeats: int = 3
) -> tuple[float, dict[str, Any]]:
    """Measure on this machine's GPU, or else on its CPU in fp32 with few rows.

    Args:
        rows: sequences per step; by default a microbatch of the configuration on a GPU and four on a CPU,
            so that what a step costs whatever its length does not hide what a row costs.
        seq_len: tokens of a sequence.
        repeats: steps of each kind.

    Returns:
        How many times as fast a step on stored targets is, and what was measured.
    """
    cuda = torch.cuda.is_available()
    rows = rows or (16 if cuda else 4)
    precision = "bf16" if cuda else "fp32"
    config = bench_config(rows, rows, seq_len, precision)
    with _one_process() as world:
        times = Bench(config, world).measure(repeats)
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
