"""AdamW's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from trainer.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of ``total_steps``.

    Linear warm-up over ``warmup_steps`` steps to ``lr``; then ``cosine`` falls to ``min_lr`` at the last
    step, ``wsd`` stays at ``lr`` and falls linearly over the last ``decay_share`` of the steps.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = _progress(step, config.warmup_steps, total_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_start = max(config.warmup_steps, round(total_steps * (1 - config.decay_share)))
        share = 1 - _progress(step, decay_start, total_steps)
    return config.min_lr + (config.lr - config.min_lr) * share


def _progress(step: int, first: int, total_steps: int) -> float:
    """0 at ``first`` and before it, 1 at the last step and after it."""
    if step >= total_steps - 1:
        return 1.0
    return max(step - first, 0) / (total_steps - 1 - first)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Decayed and undecayed parameters; matrices are decayed, or everything with ``decay_all``."""
    named = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in named if config.decay_all or p.ndim >= 2]
    undecayed = [p for p in named if not config.decay_all and p.ndim < 2]
    groups: list[dict[str, object]] = [{"params": decayed, "weight_decay": config.weight_decay}]
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0})
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the model's (sharded) parameters; the engine sets the learning rate each step."""
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
