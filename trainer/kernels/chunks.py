"""How many rows of a wide matrix are worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Elements of one chunk of logits. On a GPU few large matmuls keep the tensor cores busy and the
# weight gradient's traffic low; on a CPU a chunk should stay near the last-level cache.
_CUDA_ELEMENTS = 2**28
_CPU_ELEMENTS = 2**23


def row_chunks(num_rows: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    """Cut ``num_rows`` rows into slices so that one (rows, num_columns) temporary stays affordable."""
    elements = _CUDA_ELEMENTS if device.type == "cuda" else _CPU_ELEMENTS
    size = max(1, elements // max(1, num_columns))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
