"""The checks of the ``parallel:`` section that no engine makes."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.config import ParallelConfig

ZERO = {"engine": "deepspeed", "zero_stage": 3}

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"prefetch": -1}, "prefetch=-1 must be at least 0"),
    ({"reshard_after_forward": "node", "tp": 2}, "reshard_after_forward=node needs tp=1, not 2"),
    ({**ZERO, "reshard_after_forward": "always"}, "reshard_after_forward=always must be auto"),
    ({**ZERO, "prefetch": 1}, "prefetch=1 must be 0 with engine=deepspeed"),
    ({**ZERO, "compile": True}, "compile=true needs zero_stage=1 or 2"),
]


@pytest.mark.parametrize(("section", "message"), REFUSALS)
def test_what_does_not_fit_is_refused(section: dict[str, Any], message: str) -> None:
    """Catches a switch that would be ignored silently, or fail deep inside an engine."""
    with pytest.raises(ValueError, match=message) as error:
        ParallelConfig(**section)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "section",
    [
        {"engine": "deepspeed", "zero_stage": 2, "compile": True, "recompute": "selective"},
        {**ZERO, "recompute": "full", "offload_parameters": True},
        {"compile": True, "tp": 2, "recompute": "full", "prefetch": 2, "reshard_after_forward": "never"},
        {"offload_parameters": True, "offload_optimizer": True, "recompute": "full", "dp_replicate": 2},
    ],
)
def test_what_fits_is_accepted(section: dict[str, Any]) -> None:
    """Catches a refusal of what works."""
    assert ParallelConfig(**section)
