"""Initial weights as a pure function of (seed, name, shape): the same on one rank and on a thousand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

_STD = 0.02
_RESIDUAL_OUTPUTS = ("attn.proj.weight", "mlp.proj.weight")


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and on the parameter's name only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_value(
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    *,
    seed: int,
    n_layer: int,
    real_rows: Mapping[str, int] = MappingProxyType({}),
) -> Tensor:
    """GPT-2's initialisation: N(0, 0.02), residual outputs scaled by 1/sqrt(2L), biases 0, LayerNorm 1.

    Args:
        name: the parameter's full name; it decides kind and random stream.
        shape, dtype: of the full, unsharded parameter.
        seed: ``run.seed``.
        n_layer: number of blocks L.
        real_rows: rows of the parameters that have padding behind them, by full name; padding is 0.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    std = _STD / math.sqrt(2 * n_layer) if name.endswith(_RESIDUAL_OUTPUTS) else _STD
    value = torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator_for(seed, name))
    if name in real_rows:
        value[real_rows[name] :] = 0
    return value
