"""Triton's kernels beside plain torch, at the sizes of the paper's students: time, bandwidth and error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import median_seconds
from benchmarks.gpu.training import without_triton
from trainer.kernels import ops


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    run: Callable[[], object]
    num_bytes: int
    """Fewest bytes that have to cross the memory bus: each tensor once each way."""
    result: Callable[[], Tensor]
    """What both implementations must agree on."""


def measure(report: Report, device: torch.device, *, dry_run: bool) -> None:
    """Each operation at the rows of one chunk or microbatch; ids evenly spread and piled up."""
    repeats = 2 if dry_run else 10
    for case in _cases(device, dry_run=dry_run):
        found = {}
        with without_triton():
            expected = case.result()
            found["torch_ms"] = 1e3 * median_seconds(case.run, device, repeats)
        if ops.triton_serves(expected):
            found["triton_ms"] = 1e3 * median_seconds(case.run, device, repeats)
            found["speedup"] = found["torch_ms"] / found["triton_ms"]
            found["gb_per_s"] = case.num_bytes / found["triton_ms"] / 1e6
            result = case.result()
            found["difference"] = float((result - expected).float().norm() / expected.float().norm())
        report.put(case.name, found)
    if ops.has_triton() and device.type == "cuda":
        _try_tiles(report, device, repeats)


def _try_tiles(report: Report, device: torch.device, repeats: int) -> None:
    """Other sizes of the pass over logits than the fixed ones: (columns at a time, warps)."""
    from trainer.kernels import triton_logits

    for block, num_warps in ((2048, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16)):
        with mock.patch.multiple(triton_logits, _BLOCK=block, _NUM_WARPS=num_warps):
            for case in _cases(device, dry_run=False):
                if case.name.endswith("logit_pass"):
                    milliseconds = 1e3 * median_seconds(case.run, device, repeats)
                    report.put(f"{case.name}_tile_{block}x{num_warps}", {"triton_ms": milliseconds})


def _cases(device: torch.device, *, dry_run: bool) -> Iterator[_Case]:
    scale = 64 if dry_run else 1
    concepts, vocabulary, tokens = 32768 // scale, 50304 // scale, 16384 // scale
    yield from _logits_cases(device, "concept_head", 8192 // scale, concepts, num_targets=4, top_k=32)
    yield from _logits_cases(device, "lm_head", 4096 // scale, vocabulary, num_targets=1, top_k=0)
    for width in (512, 2048):
        yield from _sparse_cases(device, tokens, concepts, width // (scale // 4 or 1), top_k=32)


def _logits_cases(
    device: torch.device, name: str, num_rows: int, num_columns: int, *, num_targets: int, top_k: int
) -> Iterator[_Case]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (num_rows, num_columns)
    logits = torch.randn(shape, generator=generator, device=device).bfloat16()
    index = torch.randint(0, num_columns, (num_rows, num_targets), generator=generator, device=device)
    weights = torch.full((num_rows, num_targets), 1 / num_targets, device=device)
    total = weights.sum(1, keepdim=True)
    work = logits.clone()

    def gradient() -> Tensor:
        fresh = logits.clone()
        ops.logit_pass_(fresh, index, weights, total, top_k)
        return fresh

    size = logits.numel() * logits.element_size()
    yield _Case(
        f"{name}_logit_pass",
        lambda: ops.logit_pass_(work, index, weights, total, top_k),
        2 * size,
        gradient,
    )
    yield _Case(
        f"{name}_summarise",
        lambda: ops.summarise(logits, index, weights, top_k),
        size,
        lambda: ops.summarise(logits, index, weights, top_k)[0],
    )


def _sparse_cases(
    device: torch.device, num_rows: int, num_ids: int, width: int, *, top_k: int
) -> Iterator[_Case]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    values, weight, rows = random(num_rows, top_k), random(num_ids, width), random(num_rows, width)
    even = torch.randint(0, num_ids, (num_rows, top_k), generator=generator, device=device)
    # As concepts are kept: a few by very many tokens, most by few.
    share = torch.rand((num_rows, top_k), generator=generator, device=device)
    piled = (num_ids ** share.double()).long().clamp_max(num_ids - 1)
    for spread, ids in (("even", even), ("piled", piled)):
        runs: dict[str, Callable[[], Tensor]] = {
            "sums": partial(ops.sparse_sums, values, ids, weight),
            "dots": partial(ops.sparse_dots, rows, ids, weight),
            "weight_grad": partial(_weight_grad, values, ids, rows, num_ids),
        }
        for product, run in runs.items():
            table_bytes = (4 if product == "weight_grad" else 2) * weight.numel()
            yield _Case(f"sparse_{product}_{width}_{spread}", run, 2 * rows.numel() + table_bytes, run)


def _weight_grad(values: Tensor, ids: Tensor, rows: Tensor, num_ids: int) -> Tensor:
    return ops.sparse_weight_grad(values, ids, rows, num_ids, True)[0]
