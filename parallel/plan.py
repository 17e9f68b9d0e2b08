"""What a model says about how it may be spread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelPlan:
    """Module names of one model, as ``nn.Module.get_submodule`` takes them."""

    fsdp_units: tuple[str, ...]
    """Modules whose weights are gathered, and whose gradients are reduced, together; in forward
    order. What no unit holds belongs to the root, which is the last unit."""
