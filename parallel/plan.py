"""What a model says about how it may be spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ParallelPlan:
    """Module names of one model, as ``nn.Module.get_submodule`` takes them."""

    fsdp_units: tuple[str, ...]
    """Modules whose weights are gathered, and whose gradients are reduced, together; in forward
    order. What no unit holds belongs to the root, which is the last unit."""

    compiled: tuple[str, ...] = ()
    """Modules whose forward is compiled, each by itself, with ``parallel.compile``."""

    recomputed: tuple[str, ...] = ()
    """Modules that keep nothing but their input for backward with ``parallel.recompute=full``."""

    partly_recomputed: tuple[str, ...] = ()
    """Methods, as ``blocks.0.attend``, that keep their input and what is dear to compute with
    ``parallel.recompute=selective``. Each ends in a product whose result no gradient needs."""

    tensor_dims: Mapping[str, int] = field(default_factory=dict)
    """Dimension along which tensor-parallel ranks split a parameter, by the end of its name; every
    other parameter is whole on each of them."""

    tensor_divides: Mapping[str, int] = field(default_factory=dict)
    """Sizes, by the key of the configuration, that the tensor-parallel ranks must divide."""
