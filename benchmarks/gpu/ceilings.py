"""What this GPU can do at most: matrix products and copies, as torch reaches them."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import median_seconds

# (rows, inner, columns): a large square, and the students' widest products with 32 rows of 1,024 tokens.
_SHAPES = (
    (8192, 8192, 8192),
    (32768, 2048, 8192),
    (32768, 2048, 32768),
    (32768, 1024, 4096),
    (32768, 512, 2048),
    (32768, 512, 50304),
)
_COPY_BYTES = 2**32


def measure(report: Report, device: torch.device, *, dry_run: bool) -> None:
    """bf16 products in TFLOP/s and a copy within the device's memory in GB/s, read and written."""
    repeats = 2 if dry_run else 20
    for shape in _SHAPES:
        rows, inner, columns = (size // 128 for size in shape) if dry_run else shape
        left = torch.randn(rows, inner, device=device).bfloat16()
        right = torch.randn(columns, inner, device=device).bfloat16()
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        product = partial(torch.mm, left, right.t(), out=out)
        seconds = median_seconds(product, device, repeats)
        name = "x".join(map(str, shape))
        report.put(f"matmul_bf16_{name}", {"tflops": 2 * rows * inner * columns / seconds / 1e12})
    source = torch.randn((2**20 if dry_run else _COPY_BYTES) // 4, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(partial(target.copy_, source), device, repeats)
    report.put("copy", {"gb_per_s": 2 * source.numel() * 4 / seconds / 1e9})
