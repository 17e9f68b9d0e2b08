"""``python -m benchmarks.bench_extractor``: tokens to targets on a CPU, against the dense oracle's.

Teacher and autoencoder alone, in fp32 and in bf16, and the oracle's in fp32 take turns in one process on the
same random weights. In fp32 the targets must be the same; in bf16 the share of equal ones is told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import agreement
from benchmarks.agreement import Disagreement
from benchmarks.bench_step import Settings
from benchmarks.dense_step import dense_extractor
from benchmarks.record import Transcript, command_line, write_record
from benchmarks.students import build_extractor, one_process, teacher_sizes
from benchmarks.turns import Seconds, ratio, take_turns, wall_ratio
from data.cli import run_cli
from trainer.concepts.extractor import TargetExtractor

TARGETS = {"fp32": 2.2, "bf16": 7.0}
"""How many times as fast as the oracle."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """Seconds of extractions of the same tokens."""

    ratios: Mapping[str, float]
    """By precision: oracle's CPU seconds / own, median over rounds."""
    wall_ratios: Mapping[str, float]
    seconds: Mapping[str, Seconds]
    """``dense``, ``fp32`` and ``bf16``."""
    equal_targets: Mapping[str, float]
    """By precision: share of the tokens whose target ids are the oracle's."""


def compare_extraction(settings: Settings) -> Extraction:
    """Measure both precisions against the oracle; ``settings.precision`` is of no matter.

    Raises:
        Disagreement: targets in fp32 are not the oracle's.
    """
    with one_process(threads=settings.threads) as world:
        own = {precision: _extractor(settings, precision, world.device) for precision in TARGETS}
        dense = dense_extractor(own["fp32"])
        input_ids, labels = _tokens(settings, own["fp32"])
        found = dense(input_ids, labels)
        equal = {
            "fp32": agreement.check_targets(own["fp32"](input_ids, labels), found),
            "bf16": agreement.equal_share(own["bf16"](input_ids, labels), found.ids),
        }
        del found
        programs = {"dense": partial(dense, input_ids, labels)} | {
            name: partial(extractor, input_ids, labels) for name, extractor in own.items()
        }
        seconds = take_turns(programs, settings.repeats, warm_ups=0)  # each has run once
    return Extraction(
        {name: ratio(seconds["dense"], seconds[name]) for name in own},
        {name: wall_ratio(seconds["dense"], seconds[name]) for name in own},
        seconds,
        equal,
    )


def _extractor(settings: Settings, precision: str, device: torch.device) -> TargetExtractor:
    """The same random weights in each precision."""
    config = replace(settings, precision=precision).config("cocomix")
    assert config.concepts is not None
    generator = torch.Generator(device).manual_seed(config.run.seed)
    return build_extractor(config.concepts, teacher_sizes(dry_run=settings.dry_run), device, generator)


def _tokens(settings: Settings, extractor: TargetExtractor) -> tuple[Tensor, Tensor]:
    config = settings.config("cocomix")
    generator = torch.Generator().manual_seed(0)
    shape = (settings.rows, config.data.seq_len + 1)
    tokens = torch.randint(0, extractor.teacher.config.vocab_size, shape, generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def lines_of(settings: Settings, found: Extraction) -> list[str]:
    """A table."""
    lines = [
        f"teacher and autoencoder, {settings.shape}, threads: {settings.threads}, rounds: {settings.repeats}",
        "",
        "| | CPU seconds | on the clock | times as fast | target | tokens with the oracle's targets |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds in found.seconds.items():
        compared = "1 | | "
        if name in found.ratios:
            compared = f"{found.ratios[name]:.2f} | {TARGETS[name]} | {found.equal_targets[name]:.2%}"
        lines.append(f"| {name} | {seconds.cpu_median:.3f} | {seconds.wall_median:.3f} | {compared} |")
    return lines


def bench(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Measure, print and write the record if that is wanted; returns 0."""
    chosen: dict[str, Any] = {
        name: getattr(args, name) for name in ("rows", "seq_len", "repeats", "threads", "dry_run")
    }
    settings, transcript = Settings(**chosen), Transcript()
    found = compare_extraction(settings)
    transcript.say("\n".join(lines_of(settings, found)))
    if args.record:
        path = write_record(
            "extractor",
            command=command_line("benchmarks.bench_extractor", argv),
            config=chosen,
            results=asdict(found),
            log=transcript.text,
        )
        print(f"record: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_extractor", description="Tokens to targets, against the dense oracle"
    )
    parser.add_argument("--rows", type=int, default=1, help="sequences")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="extractions of each kind")
    parser.add_argument("--threads", type=int, default=1, help="of the process")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--record", action="store_true", help="write a record below benchmarks/records")
    return run_cli(partial(bench, argv=argv), parser, argv, errors=(Disagreement,))


if __name__ == "__main__":
    sys.exit(main())
