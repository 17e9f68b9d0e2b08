"""``make bench``: every figure of speed that is aimed for beside what this machine reaches, in one run.

Measurements are those of the single benchmarks, in CPU time of one thread. The exit code is 1 where one falls
short. Figures of a GPU come from its newest record; without one they are not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import bench_extractor, bench_gpu, bench_loader, bench_step, bench_targets
from benchmarks.agreement import Disagreement
from benchmarks.record import RECORDS, Transcript, command_line, write_record
from benchmarks.step_memory import step_memory
from data.cli import run_cli


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of the table."""

    name: str
    target: float
    at_most: bool = False
    """Whether smaller is better."""

    def reached(self, value: float) -> bool:
        """Whether a measured value is as good as aimed for."""
        return value <= self.target if self.at_most else value >= self.target

    @property
    def aim(self) -> str:
        """The target in words."""
        return f"{'at most' if self.at_most else 'at least'} {self.target:g}"


Values = Sequence[float | None]
"""Of the rows of a measurement, in their order; ``None`` where there is none."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is measured together."""

    name: str
    rows: tuple[Row, ...]
    seconds: float
    """About how long it takes on two idle cores, for the estimate."""
    run: Callable[[bool], tuple[Values, Any]]
    """Called with whether sizes are to be tiny; returns values and JSON-able details."""


def _step(precision: str, repeats: int, dry_run: bool) -> tuple[Values, Any]:
    settings = bench_step.Settings(precision=precision, repeats=repeats, dry_run=dry_run)
    found = bench_step.against_dense(settings)
    return [found.ratio], {"settings": asdict(settings), **asdict(found)}


def _ntp(dry_run: bool) -> tuple[Values, Any]:
    settings = bench_step.Settings(rows=1 if dry_run else 4, repeats=1, dry_run=dry_run)
    found = bench_step.against_ntp(settings)
    return [found.over_predicted], {"settings": asdict(settings), **asdict(found)}


def _memory(dry_run: bool) -> tuple[Values, Any]:
    """Of the step as configured and of that in fp32; the oracle's, whose teacher is fp32, is in fp32."""
    found = {}
    for precision in ("bf16", "fp32"):
        settings = bench_step.Settings(precision=precision, dry_run=dry_run)
        config, teacher = settings.config("cocomix"), bench_step.teacher_of(settings)
        found[precision] = step_memory("own", config, teacher, settings.rows)
    dense = step_memory("dense", config, teacher, settings.rows)
    values = [memory.above / dense.above for memory in found.values()]
    return values, {name: asdict(memory) for name, memory in {**found, "dense": dense}.items()}


def _extraction(dry_run: bool) -> tuple[Values, Any]:
    settings = bench_step.Settings(dry_run=dry_run)
    found = bench_extractor.compare_extraction(settings)
    return [found.ratios[name] for name in bench_extractor.TARGETS], asdict(found)


def _loader(dry_run: bool) -> tuple[Values, Any]:
    value, details = bench_loader.measure_loader(repeats=1 if dry_run else 9)
    return [value], details


def _targets(dry_run: bool) -> tuple[Values, Any]:
    value, details = bench_targets.measure_cached_step(repeats=1, dry_run=dry_run)
    return [value], details


def _gpu(dry_run: bool) -> tuple[Values, Any]:
    """What the newest record of ``benchmarks/gpu.sh`` says."""
    path = newest_record("gpu")
    if path is None:
        return [None] * len(bench_gpu.TARGETS), None
    rows = json.loads((path / "record.json").read_text(encoding="utf-8"))["results"]["mfu_targets"]
    found = {row["student"]: row["mfu"] for row in rows}
    return [found.get(f"{kind} {size}") for kind, size in bench_gpu.TARGETS], {"record": path.name}


def newest_record(theme: str, root: Path = RECORDS) -> Path | None:
    """The folder of the newest record of a theme, if there is one."""
    found = []
    for path in root.glob(f"*_{theme}_*/record.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["theme"] == theme:
            found.append((record["time"], path.parent))
    return max(found)[1] if found else None


def registry() -> tuple[Measurement, ...]:
    """All figures, in the order of the table."""
    memory = bench_step.MEMORY_TARGET
    fp32, configured = bench_step.TARGETS["dense", "fp32"], bench_step.TARGETS["dense", "bf16"]
    extraction = [
        Row(f"teacher and autoencoder alone, {name}, oracle / own", target)
        for name, target in bench_extractor.TARGETS.items()
    ]
    utilisation = [
        Row(f"utilisation of an H200, {kind.replace('cocomix', 'CoCoMix').replace('ntp', 'NTP')} {size}", mfu)
        for (kind, size), mfu in bench_gpu.TARGETS.items()
    ]
    return (
        Measurement(
            "step-fp32",
            (Row("69M step, 1 x 1024, fp32, oracle / own", fp32),),
            120,
            partial(_step, "fp32", 2),
        ),
        Measurement(
            "step-configured",
            (Row("69M step as configured: bf16, oracle with fp32 teacher / own", configured),),
            90,
            partial(_step, "bf16", 2),
        ),
        Measurement("extraction", tuple(extraction), 60, _extraction),
        Measurement(
            "memory",
            tuple(
                Row(f"peak memory of the step above the weights, {name}, own / oracle", memory, True)
                for name in ("as configured", "fp32")
            ),
            70,
            _memory,
        ),
        Measurement(
            "ntp",
            (Row("CoCoMix / NTP, measured over predicted by FLOPs", bench_step.NTP_TARGET, True),),
            90,
            _ntp,
        ),
        Measurement(
            "loader", (Row("token stream, rows per CPU second / memmap's", bench_loader.TARGET),), 20, _loader
        ),
        Measurement(
            "cached-targets",
            (Row("69M step on stored targets, on the fly / stored", bench_targets.TARGET),),
            90,
            _targets,
        ),
        Measurement("gpu", tuple(utilisation), 0, _gpu),
    )


@dataclass(frozen=True, slots=True)
class Figure:
    """One row with its value."""

    row: Row
    value: float | None

    @property
    def verdict(self) -> str:
        """In the table's last column."""
        if self.value is None:
            return "not measured"
        return "reached" if self.row.reached(self.value) else "missed"

    @property
    def missed(self) -> bool:
        """Measured, and not as good as aimed for."""
        return self.verdict == "missed"


def table(figures: Iterable[Figure]) -> list[str]:
    """Targets and values as Markdown."""
    lines = ["| figure | target | measured | |", "|---|---|---|---|"]
    for figure in figures:
        value = "-" if figure.value is None else f"{figure.value:.3g}"
        lines.append(f"| {figure.row.name} | {figure.row.aim} | {value} | {figure.verdict} |")
    return lines


def measure_all(measurements: Sequence[Measurement], *, dry_run: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Run measurements one after the other and tell how far this is; returns figures and details."""
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    for index, measurement in enumerate(measurements):
        left = sum(each.seconds for each in measurements[index:])
        print(
            f"[{index + 1}/{len(measurements)}] {measurement.name}, "
            f"about {_clock(measurement.seconds)} of {_clock(left)} left",
            file=sys.stderr,
            flush=True,
        )
        started = time.monotonic()
        values, found = measurement.run(dry_run)
        details[measurement.name] = {"seconds": round(time.monotonic() - started, 1), "found": found}
        found_here = [Figure(row, value) for row, value in zip(measurement.rows, values, strict=True)]
        print("\n".join(table(found_here)[2:]), file=sys.stderr, flush=True)
        figures += found_here
    return figures, details


def _clock(seconds: float) -> str:
    return f"{math.floor(seconds / 60)}:{round(seconds) % 60:02d}"


def chosen(names: Sequence[str], measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements that were asked for, all without names.

    Raises:
        ValueError: there is no such measurement.
    """
    known = {measurement.name: measurement for measurement in measurements}
    for name in names:
        if name not in known:
            raise ValueError(f"--only {name} must be one of {', '.join(known)}")
    return [measurement for name, measurement in known.items() if not names or name in names]


def bench(
    args: argparse.Namespace, argv: Sequence[str] | None, measurements: Sequence[Measurement] | None = None
) -> int:
    """Measure, print the table and write the record if that is wanted; 1 where a figure is missed."""
    todo = chosen(args.only, measurements or registry())
    figures, details = measure_all(todo, dry_run=args.dry_run)
    transcript = Transcript()
    transcript.say("\n".join(table(figures)))
    if args.dry_run:
        transcript.say("tiny sizes: the figures say nothing")
    if args.record:
        path = write_record(
            "step-dry-run" if args.dry_run else "step",
            command=command_line("benchmarks.bench", argv),
            config={"measurements": [measurement.name for measurement in todo]},
            results={"figures": [_entry(figure) for figure in figures], "details": details},
            log=transcript.text,
            root=args.root,
        )
        print(f"record: {path}")
    return int(not args.dry_run and any(figure.missed for figure in figures))


def _entry(figure: Figure) -> Mapping[str, Any]:
    return {**asdict(figure.row), "value": figure.value, "verdict": figure.verdict}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description="All figures of speed beside their targets"
    )
    parser.add_argument("--only", nargs="+", default=[], help="names of measurements; all by default")
    parser.add_argument("--record", action="store_true", help="write a record below benchmarks/records")
    parser.add_argument("--root", type=Path, default=RECORDS, help="folder of the record")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, to try the program")
    return run_cli(partial(bench, argv=argv), parser, argv, errors=(Disagreement,))


if __name__ == "__main__":
    sys.exit(main())
