"""Training steps of one student on one device: tokens per second, utilisation, memory, parts."""

from __future__ import annotations

import gc
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import Stopwatch, drain
from benchmarks.students import Kind, Size, Student, build_student, load_student, teacher_sizes
from parallel.world import start_world, stop_world
from trainer.concepts.ahead import TargetsAhead
from trainer.kernels import ops
from trainer.metrics.device import device_peak_flops
from trainer.objective import CoCoMixLoss

EQUAL_ROWS: dict[Size, int] = {"69m": 32, "386m": 16, "1b": 8}
"""Rows of a microbatch at which next-token prediction and CoCoMix are compared."""
MICROBATCHES = 4
"""Per optimizer step, whose update is part of what is measured."""
MOST_ROWS = 512


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure."""

    seconds: float
    """Of one measurement."""
    search_s: float
    """After so many seconds of the part no larger microbatch is tried."""
    most_rows: int


def measure(
    report: Report, device: torch.device, size: Size, kind: Kind, *, compiled: bool, dry_run: bool
) -> None:
    """One student: equal microbatch with its parts and variants, then ever larger microbatches."""
    effort = Effort(0.1, 20.0, 4) if dry_run else Effort(4.0, 60.0, MOST_ROWS)
    rows = 2 if dry_run else EQUAL_ROWS[size]
    overrides = [f"--parallel.compile={str(compiled).lower()}"]
    config = load_student(size, kind, dry_run=dry_run, overrides=overrides)
    started = time.monotonic()
    start_world("cuda" if device.type == "cuda" else "cpu", timeout_s=120.0)
    student = build_student(config, device, teacher_sizes(dry_run=dry_run))
    report.put("flops_per_token", {name: part.total for name, part in student.flops.parts.items()})
    report.put("first_step_s", _first_step(student, rows))
    report.put("equal", throughput(student, rows, effort.seconds))
    report.put("parts", parts(student, rows))
    if not compiled:
        _variants(report, student, rows, effort)
    _largest(report, student, rows, effort, started)
    stop_world()


def _first_step(student: Student, rows: int) -> float:
    """Seconds of the first step, compilation included."""
    drain(student.device)
    started = time.monotonic()
    student.step(student.random_batch(rows, seed=0), rows)
    drain(student.device)
    return time.monotonic() - started


def throughput(student: Student, rows: int, seconds: float) -> dict[str, Any]:
    """Optimizer steps of four microbatches: median time, tokens per second, utilisation, peak memory."""
    device, num_rows = student.device, MICROBATCHES * rows
    batches = [student.random_batch(num_rows, seed) for seed in range(2)]
    watch = Stopwatch(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for index in range(3):  # the first of these may still allocate
        watch.mark()
        student.step(batches[index % 2], rows)
    watch.mark()
    steps = min(max(int(seconds / watch.seconds()[-1]), 2), 20)
    watch.mark()
    for index in range(steps):
        student.step(batches[index % 2], rows)
        watch.mark()
    step_s = median(watch.seconds())
    tokens_per_s = num_rows * student.config.data.seq_len / step_s
    # The trainer measures a CPU's peak; here one number of FLOP/s for all parts matters, or none.
    peak = device_peak_flops(device, student.config.train.precision) if device.type == "cuda" else None
    return {
        "rows": rows,
        "microbatches": MICROBATCHES,
        "steps": steps,
        "step_s": step_s,
        "tokens_per_s": tokens_per_s,
        "mfu": None if peak is None else student.flops.total * tokens_per_s / peak,
        "peak_gib": _peak_gib(device),
    }


def _peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def parts(student: Student, rows: int, repeats: int = 5) -> dict[str, float]:
    """Median seconds of a microbatch's targets, forward and backward, and of the update."""
    found: dict[str, list[float]] = {}
    objective, engine = student.objective, student.engine
    watch = Stopwatch(student.device)
    for repeat in range(repeats):
        batch = student.random_batch(rows, seed=repeat)
        watch.mark()
        if isinstance(objective, CoCoMixLoss):
            objective.targets(batch)
        watch.mark()
        terms = objective(engine.model, batch, step=0, detail=False)
        watch.mark()
        engine.backward(terms.loss / (rows * student.config.data.seq_len), last_microbatch=True)
        watch.mark()
        engine.step(student.config.optim.lr)
        watch.mark()
        targets_s, forward_s, backward_s, update_s = watch.seconds()
        # The objective computes the targets too.
        sample = {
            "targets": targets_s,
            "forward": forward_s - targets_s,
            "backward": backward_s,
            "update": update_s,
        }
        for name, seconds in sample.items():
            found.setdefault(name, []).append(seconds)
    return {name: median(seconds) for name, seconds in found.items()}


def _variants(report: Report, student: Student, rows: int, effort: Effort) -> None:
    """The same steps without Triton's kernels, and with targets ahead on a stream of their own."""
    with without_triton():
        report.put("equal_without_triton", throughput(student, rows, effort.seconds))
    objective = student.objective
    if isinstance(objective, CoCoMixLoss):
        objective.ahead = TargetsAhead(objective.targets, student.device)
        report.put("equal_ahead", throughput(student, rows, effort.seconds))
        objective.ahead = None


def without_triton() -> AbstractContextManager[object]:
    """Every operation by plain torch."""
    return mock.patch.object(ops, "triton_serves", return_value=False)


def _largest(report: Report, student: Student, rows: int, effort: Effort, started: float) -> None:
    """Double the microbatch while it fits; running out of memory ends the part, FSDP2's state included."""
    while 2 * rows <= effort.most_rows and time.monotonic() - started < effort.search_s:
        rows *= 2
        gc.collect()
        if student.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            report.put("largest", throughput(student, rows, effort.seconds))
        except torch.OutOfMemoryError:
            report.put("out_of_memory_at_rows", rows)
            return
