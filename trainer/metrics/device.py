"""What the device can do and what it holds: peak FLOP/s and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Literal

import torch

from trainer.flops import peak_flops


def memory_peak_bytes(device: torch.device) -> int:
    """Largest memory of this process: allocated by torch on CUDA, resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the best FLOP/s of square matmuls; takes a fraction of a second.

    The first products of a process start threads and fill caches, so they are not timed, and a size
    counts by its fastest repetition: other processes can only slow one down.
    """
    sizes = (4096, 8192) if device.type == "cuda" else (512, 1024)
    return max(_matmul_flops(device, dtype, size) for size in sizes)


def _matmul_flops(device: torch.device, dtype: torch.dtype, size: int, repetitions: int = 4) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(1 + repetitions):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def device_peak_flops(
    device: torch.device, precision: Literal["fp32", "bf16"], peak_tflops: float = 0.0
) -> float | None:
    """Peak FLOP/s of one rank's device; None for an unknown GPU.

    ``peak_tflops`` where it is above 0, else a GPU's data sheet, else the CPU's measured matmul.
    """
    if peak_tflops > 0:
        return peak_tflops * 1e12
    if device.type == "cpu":
        return measure_matmul_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return peak_flops(torch.cuda.get_device_name(device), "tf32")
    return peak_flops(torch.cuda.get_device_name(device), precision)
