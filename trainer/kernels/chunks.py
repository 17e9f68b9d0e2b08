"""How many rows of a wide matrix are worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of the logits that are held at a time. On a GPU few large matmuls keep the tensor cores busy;
# everywhere a weight gradient is read and written once per chunk, so chunks of few rows cost traffic.
_CUDA_ELEMENTS = 2**28
_CPU_ELEMENTS = 2**25

# Elements of a block whose elementwise passes follow each other: on a CPU it stays in the cache
# between them; on a GPU it bounds the fp32 copy.
_CUDA_BLOCK_ELEMENTS = 2**25
_CPU_BLOCK_ELEMENTS = 2**20


def row_chunks(num_rows: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    """Cut ``num_rows`` rows into slices so that one (rows, num_columns) temporary stays affordable."""
    elements = _CUDA_ELEMENTS if device.type == "cuda" else _CPU_ELEMENTS
    return _slices(num_rows, num_columns, elements)


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Cut the rows of a matrix into slices for several elementwise passes over each of them."""
    elements = _CUDA_BLOCK_ELEMENTS if matrix.device.type == "cuda" else _CPU_BLOCK_ELEMENTS
    return _slices(matrix.shape[0], matrix.shape[1], elements)


def _slices(num_rows: int, num_columns: int, elements: int) -> Iterator[slice]:
    size = max(1, elements // max(1, num_columns))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
