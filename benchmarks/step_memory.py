"""Peak memory of a training step on a CPU above what lives on between steps.

Each side has a process of its own, so that neither finds memory that the other let go of. What counts is
the process's resident set: at its highest during one step (``VmHWM`` of Linux, set back before the step)
less what it was before. Weights, autoencoder, teacher and Adam's moments exist by then; gradients,
activations, logits and what the allocator and the libraries need come on top.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch

from benchmarks.dense_step import DenseStep
from benchmarks.students import build_student, one_process
from launch.planning.teacher import Teacher
from trainer.config import RunConfig

Which = Literal["own", "dense"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process's resident set."""

    before: int
    """Before the step: weights, optimizer state, program."""
    peak: int
    """Most during the step."""

    @property
    def above(self) -> int:
        """What the step adds."""
        return self.peak - self.before


def step_memory(which: Which, config: RunConfig, teacher: Teacher, rows: int) -> Memory:
    """Measure one step in a process of its own; Linux only."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, which, config, teacher, rows).result()


def _measure(which: Which, config: RunConfig, teacher: Teacher, rows: int) -> Memory:
    with one_process(threads=torch.get_num_threads()) as world:
        student = build_student(config, world.device, teacher)
        batch = student.random_batch(rows, seed=0)
        step: Callable[[], object] = partial(student.step, batch, rows)
        if which == "dense":
            step = partial(DenseStep.like(student), batch)
        del student
        gc.collect()
        # What building left over must not serve the step, which would then seem to need less.
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        step()
        return Memory(before, _status("VmHWM"))


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    assert match is not None, key
    return int(match[1]) * 1024
