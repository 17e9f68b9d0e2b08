"""Learning-rate schedules and parameter groups against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from tests.trainer.model.tiny import tiny_cocomix
from trainer.config import OptimConfig
from trainer.optim import build_optimizer, learning_rate, parameter_groups


def _config(**changes: object) -> OptimConfig:
    return OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, **changes})  # type: ignore[arg-type]


def test_cosine_warms_up_from_above_zero_and_ends_at_the_minimum() -> None:
    """Catches an off-by-one at either end: a first step of rate 0, or a last one above the minimum."""
    rates = [learning_rate(step, 20, _config()) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    middle = 4 + (19 - 4) / 3
    assert rates[int(middle)] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)))


def test_wsd_stays_at_the_peak_and_falls_linearly_over_its_share() -> None:
    """Catches a decay that starts at the wrong step."""
    config = _config(schedule="wsd", decay_share=0.25)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates[3:16] == [1.0] * 13
    assert rates[16:] == pytest.approx([1 - 0.9 * n / 4 for n in (1, 2, 3, 4)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_short_runs_have_finite_rates_within_bounds(schedule: str, steps: int) -> None:
    """Catches a division by zero in runs that end within their warm-up."""
    rates = [learning_rate(step, steps, _config(schedule=schedule)) for step in range(steps + 2)]
    assert all(0 < rate <= 1 for rate in rates)


def test_matrices_decay_and_vectors_do_not_unless_asked() -> None:
    """Catches decayed biases and LayerNorms, or a parameter in no group."""
    model = tiny_cocomix()
    decayed, undecayed = parameter_groups(model, _config(weight_decay=0.3))
    assert decayed["weight_decay"] == 0.3
    assert undecayed["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"])  # type: ignore[attr-defined]
    assert all(p.ndim < 2 for p in undecayed["params"])  # type: ignore[attr-defined]
    everything = [*decayed["params"], *undecayed["params"]]  # type: ignore[misc]
    assert len(everything) == len(list(model.parameters()))
    (group,) = parameter_groups(model, _config(decay_all=True))
    assert len(group["params"]) == len(everything)  # type: ignore[arg-type]


def test_optimizer_step_is_adamw() -> None:
    """Catches betas or epsilon that do not arrive: one step against the formula."""
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    config = _config(lr=0.01, min_lr=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    optimizer = build_optimizer(layer, config)
    layer.weight.grad = torch.full_like(before, 0.2)
    optimizer.step()
    expected = before * (1 - 0.01 * 0.5) - 0.01 * 0.2 / (0.2 + 1e-3)
    torch.testing.assert_close(layer.weight.detach(), expected)
