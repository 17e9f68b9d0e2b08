"""Activation checkpointing: what forward does not keep, backward computes again.

Chen et al. 2016 (arXiv 1604.06174), selectively Korthikanti et al. 2022 (arXiv 2205.05198). The same
operations run on the same numbers a second time, so losses and gradients keep every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel.plan import ParallelPlan

_ATEN, _COLLECTIVES = torch.ops.aten, torch.ops._c10d_functional

KEPT = frozenset(
    {
        # A product without a bias (mm) ends a sublayer; recomputation stops before it.
        _ATEN.addmm.default,
        # A CPU's products. They would run again even at the end: their inputs are asked for afterwards.
        torch.ops.mkldnn._linear_pointwise.default,
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
        _COLLECTIVES.all_gather_into_tensor.default,
    }
)
"""Operations whose results ``selective`` keeps: matrix products, attention and gathered sequences."""


def recompute(model: nn.Module, plan: ParallelPlan, how: Literal["none", "selective", "full"]) -> None:
    """Have the plan's parts of ``model`` recompute their activations in backward, in place.

    Args:
        model: before it is compiled and sharded.
        plan: the model's own plan.
        how: ``full`` keeps a unit's input only; ``selective`` also :data:`KEPT`, so that what runs again
            is elementwise; ``none`` keeps everything.
    """
    # Nothing in a unit draws random numbers, so no generator's state has to be kept.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if how == "full":
        _wrap(model, (f"{name}.forward" for name in plan.recomputed), again)
    elif how == "selective":
        selectively = partial(create_selective_checkpoint_contexts, _policy)
        _wrap(model, plan.partly_recomputed, partial(again, context_fn=selectively))


def _wrap(model: nn.Module, methods: Iterable[str], wrapper: Callable[..., Any]) -> None:
    for method in methods:
        owner, _, name = method.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, name, _recomputed(getattr(module, name), wrapper))


def _recomputed(function: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    # A function and no partial: those share one compiled frame that knows only their arguments' number.
    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapper(function, *args, **kwargs)

    return forward


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
