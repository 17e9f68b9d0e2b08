"""``python -m benchmarks.bench_gpu [--parts ...] [--minutes 25] [--record] [--dry_run]``: one GPU, measured.

Ceilings of the device, kernels against their eager twins, next-token and CoCoMix students of the paper's
sizes, and checks of what a CPU cannot show. Each part is a process with a time limit: one that fails or
hangs is recorded as such, with what it had found, and the others go on. Weights and tokens are random.
``benchmarks/gpu.sh`` starts it on a machine without this project's libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ceilings, checks, kernels, training
from benchmarks.gpu.report import Report, read_report
from benchmarks.record import Transcript, command_line, write_record
from data.cli import run_cli

ROOT = Path(__file__).parents[1]
_TAIL = 3000
"""Characters of a failed part's output that are recorded."""
_SHORTEST_S = 15.0
"""With less time left no part is started."""

TARGETS = {
    ("ntp", "1b"): 0.50,
    ("cocomix", "1b"): 0.48,
    ("ntp", "386m"): 0.42,
    ("cocomix", "386m"): 0.42,
    ("ntp", "69m"): 0.35,
    ("cocomix", "69m"): 0.35,
}
"""Utilisation that is aimed for on an H200 (989 TFLOP/s of bf16)."""


@dataclass(frozen=True, slots=True)
class Part:
    """Something to measure in a process of its own."""

    name: str
    run: Callable[..., None]
    """Called with (report, device, dry_run=...)."""
    limit_s: float


def all_parts() -> list[Part]:
    """In the order of their worth, should the time not suffice for all."""
    parts = [
        Part("ceilings", ceilings.measure, 60.0),
        Part("kernels", kernels.measure, 120.0),
        Part("kernel-tests", checks.kernel_tests, 180.0),
        Part("resume", checks.resume, 120.0),
        Part("gpu-tests", checks.gpu_tests, 180.0),
    ]
    for compiled in (True, False):
        for size in ("1b", "386m", "69m"):
            for kind in ("ntp", "cocomix"):
                name = f"train-{kind}-{size}-{'compiled' if compiled else 'eager'}"
                run = partial(training.measure, size=size, kind=kind, compiled=compiled)
                parts.append(Part(name, run, 150.0))
    return parts


def run_part(args: argparse.Namespace) -> int:
    """The process of one part."""
    (part,) = (part for part in all_parts() if part.name == args.part)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.dry_run else "cpu")
    part.run(Report(args.out), device, dry_run=args.dry_run)
    return 0


def start_part(part: Part, folder: Path, limit_s: float, *, dry_run: bool) -> dict[str, Any]:
    """Run a part within its time; returns how it ended and what it found."""
    out = folder / f"{part.name}.json"
    log = folder / f"{part.name}.log"
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_gpu",
        "--part",
        part.name,
        "--out",
        str(out),
        "--debug",
    ]
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [*command, *(["--dry_run"] if dry_run else [])],
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a part's own processes end with it
        )
        try:
            code = process.wait(timeout=limit_s)
            status = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s:.0f} s"
        finally:
            _kill_group(process)
    ended: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    if status != "ok":
        ended["output"] = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    return {**ended, "found": read_report(out)}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def bench(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run the chosen parts; 1 when one of them failed.

    Raises:
        ValueError: no CUDA device, an unknown part, or no time.
    """
    if args.part is not None:
        return run_part(args)
    parts = chosen_parts(args)
    transcript = Transcript({str(Path.home()): "~"})
    results: dict[str, Any] = {}
    ends = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as name:
        for part in parts:
            limit_s = min(part.limit_s, ends - time.monotonic())
            if limit_s < min(_SHORTEST_S, part.limit_s):
                results[part.name] = {"status": "not started: the time was over", "found": {}}
            else:
                results[part.name] = start_part(part, Path(name), limit_s, dry_run=args.dry_run)
            transcript.say("\n".join(lines_of(part.name, results[part.name])))
    transcript.say("\n".join(["", *target_lines(results)]))
    if args.record:
        path = write_record(
            "gpu-dry-run" if args.dry_run else "gpu",
            command=command_line("benchmarks.bench_gpu", argv),
            config={"parts": [part.name for part in parts], "minutes": args.minutes},
            results={"parts": results, "mfu_targets": _targets(results)},
            log=transcript.text,
            root=args.root,
        )
        print(f"record: {path}")
    return int(any(result["status"] != "ok" for result in results.values()))


def chosen_parts(args: argparse.Namespace) -> list[Part]:
    """The parts that were asked for, in their own order.

    Raises:
        ValueError: see :func:`bench`.
    """
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA device that torch can use; --dry_run tries the program")
    if args.minutes <= 0:
        raise ValueError(f"--minutes {args.minutes} must be above 0")
    known = all_parts()
    for name in args.parts:
        if not any(part.name.startswith(name) for part in known):
            raise ValueError(f"--parts {name} must begin one of {', '.join(part.name for part in known)}")
    return [part for part in known if not args.parts or part.name.startswith(tuple(args.parts))]


def lines_of(name: str, result: dict[str, Any]) -> list[str]:
    """A part for the reader of the log."""
    lines = [f"{name}: {result['status']} ({result.get('seconds', 0)} s)"]
    lines += [f"    {key}: {value}" for key, value in result["found"].items()]
    return lines + [f"    | {line}" for line in result.get("output", "").splitlines()[-15:]]


def _targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Best utilisation of each student beside its target."""
    rows = []
    for (kind, size), target in TARGETS.items():
        found = [
            measured["mfu"]
            for name, result in results.items()
            if name.startswith(f"train-{kind}-{size}-")
            for key in ("equal", "largest")
            if (measured := result["found"].get(key)) and measured["mfu"] is not None
        ]
        rows.append({"student": f"{kind} {size}", "target": target, "mfu": max(found, default=None)})
    return rows


def target_lines(results: dict[str, Any]) -> list[str]:
    """The table of utilisations."""
    lines = ["| student | MFU | aimed for on an H200 |", "|---|---|---|"]
    for row in _targets(results):
        mfu = "not measured" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(f"| {row['student']} | {mfu} | {row['target']:.0%} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_gpu", description="Measure one CUDA GPU in one go"
    )
    parser.add_argument(
        "--parts", nargs="+", default=[], help="names of parts, or how they begin; all by default"
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="time for all parts together")
    parser.add_argument("--record", action="store_true", help="write a record")
    parser.add_argument(
        "--root", type=Path, default=ROOT / "benchmarks" / "records", help="folder of the record"
    )
    parser.add_argument("--dry_run", action="store_true", help="every part on the CPU with tiny sizes")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return run_cli(partial(bench, argv=argv), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
