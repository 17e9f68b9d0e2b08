"""torch.compile, unit by unit: one short compilation serves every block of a shape."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from parallel.plan import ParallelPlan

MAX_SHAPES = 32
"""Compilations of one unit's code. Blocks below the concepts, above them and the last one, with and
without gradients, of whole and of short microbatches, for student and teacher, are 16."""


def compile_units(model: nn.Module, plan: ParallelPlan) -> None:
    """Compile the forward of the plan's units, and with it their backward, at their first use.

    Each shape is compiled by itself, as one graph: what would break it is an error. What surrounds a
    unit's forward, as FSDP2's hooks do, stays outside.

    Args:
        model: before it is sharded; also a frozen one that never is.
        plan: the model's own plan.
    """
    # Not at the top: it takes seconds, and only a run that compiles needs it.
    import torch._dynamo.config

    # All units share their code, and so does everything that is compiled from it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
    # It warns of in-place operations in recomputed parts; there are none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for name in plan.compiled:
        unit = model.get_submodule(name)
        unit.forward = torch.compile(unit.forward, fullgraph=True, dynamic=False)


def uncompiled(compiled: bool) -> AbstractContextManager[None]:
    """Run compiled units as they were written, for shapes that do not come again.

    Args:
        compiled: whether there are any.
    """
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
