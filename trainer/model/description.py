"""The part of a student's config.json beside GPT-2's keys: what its residual stream takes up."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from trainer.config import ConceptsConfig, Insertion, PauseConfig, RegressionInsertion
from trainer.config_io import from_dict

_PARTS = MappingProxyType(
    {
        "cocomix": (ConceptsConfig, ("num_concepts", "top_k", "insert_layer", "mix", "every")),
        "regression": (RegressionInsertion, ("width", "insert_layer", "mix", "every")),
        "pause": (PauseConfig, ("insert_layer", "every")),
    }
)
"""By name the class of what is inserted, and what of it a trained student needs."""


def describe(insertion: Insertion) -> tuple[str, dict[str, Any]]:
    """Name and content of the part that describes an insertion."""
    ((name, keys),) = [(name, keys) for name, (cls, keys) in _PARTS.items() if isinstance(insertion, cls)]
    return name, {key: getattr(insertion, key) for key in keys}


def find_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a config.json that describe insertions; at most one makes sense."""
    return {name: config[name] for name in _PARTS if name in config}


def read_insertion(parts: Mapping[str, Any], n_layer: int, source: str) -> Insertion | None:
    """What parts describe, ``None`` without any.

    Args:
        parts: from :func:`find_parts`.
        n_layer: blocks of the model.
        source: file named in errors.

    Raises:
        ValueError: one line names what is wrong.
    """
    if not parts:
        return None
    if len(parts) > 1:
        raise ValueError(f"{source}: {' and '.join(parts)} cannot be inserted together")
    ((name, stored),) = parts.items()
    where, cls = f"{source}: {name}", _PARTS[name][0]
    if not isinstance(stored, dict):
        raise ValueError(f"{where} must hold sizes by name")
    # Teacher and SAE made the targets; a trained student does not need them.
    unused = {"teacher": "", "sae": "", "sae_layer": 0} if cls is ConceptsConfig else {}
    insertion: Insertion = from_dict(cls, {**unused, **stored}, where)
    if insertion.insert_layer >= n_layer:
        raise ValueError(f"{where}.insert_layer={insertion.insert_layer} must be below n_layer={n_layer}")
    return insertion
