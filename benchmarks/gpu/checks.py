"""What must hold on a GPU as it does on a CPU: the tests that need one, and bitwise equal continuation."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.gpu.report import Report
from benchmarks.students import Student, build_student, load_student, teacher_sizes
from parallel.world import start_world, stop_world, use_deterministic_algorithms

ROOT = Path(__file__).parents[2]
_STEPS = 4


def kernel_tests(report: Report, device: torch.device, *, dry_run: bool) -> None:
    """Parity of every kernel with its definition, on this device."""
    chosen = ["-k", "tie or sparse_products"] if dry_run else []
    _pytest(report, ["tests/trainer/kernels", *chosen])


def gpu_tests(report: Report, device: torch.device, *, dry_run: bool) -> None:
    """Every test marked ``gpu``; a module whose libraries are missing here counts as an error of its own."""
    chosen = ["tests/trainer/concepts"] if dry_run else ["tests"]
    _pytest(report, ["-m", "gpu", "--continue-on-collection-errors", *chosen])


def _pytest(report: Report, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    found = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", lines[-1] if lines else "")}
    found.pop("warnings", None)
    report.put("tests", {"exit_code": done.returncode, **found})
    if done.returncode not in (0, 5):  # 5: nothing to run
        report.put(
            "failures", [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-20:]
        )


def resume(report: Report, device: torch.device, *, dry_run: bool) -> None:
    """Train, keep the state, train on; then continue from the kept state, and compare all bits.

    First as the trainer runs by default, then with torch's deterministic algorithms: without them flash
    attention adds up the gradient of the queries in the order in which its blocks end.
    """
    start_world("cuda" if device.type == "cuda" else "cpu", timeout_s=120.0)
    for deterministic in (False, True):
        if deterministic:
            use_deterministic_algorithms()
        config = load_student("69m", "cocomix", dry_run=dry_run)
        student = build_student(config, device, teacher_sizes(dry_run=dry_run))
        _train(student, 0)
        state = _copied(student)
        whole = _train(student, _STEPS)
        student.engine.load_state_dict(state)
        resumed = _train(student, _STEPS)
        name = "deterministic" if deterministic else "default"
        report.put(name, {"bitwise_equal": whole == resumed, "whole": whole, "resumed": resumed})
    stop_world()


def _train(student: Student, first: int) -> list[str]:
    """Digests of gradient norm and weights after each of a few steps."""
    digests = []
    for index in range(first, first + _STEPS):
        norm = student.step(student.random_batch(8, seed=index), 4)
        digests.append(_digest([norm, *student.engine.model.parameters()]))
    return digests


def _digest(tensors: Iterable[Tensor]) -> str:
    bits = hashlib.sha256()
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        bits.update(local.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()[:16]


def _copied(student: Student) -> dict[str, dict[str, object]]:
    """The engine's state, which shares memory with the run, in memory of its own."""

    def copied(value: object) -> object:
        if isinstance(value, dict):
            return {key: copied(entry) for key, entry in value.items()}
        return value.detach().clone() if isinstance(value, Tensor) else value

    return {name: copied(part) for name, part in student.engine.state_dict().items()}  # type: ignore[misc]
