"""The authors' way to store sizes of the concept path: config.yaml, beside or above a plain config.json."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from trainer.config import ConceptsConfig

_KEYS = MappingProxyType(
    {"num_concepts": "concept_dim", "top_k": "concept_num", "insert_layer": "insert_layer_index"}
)


def authors_settings(concepts: ConceptsConfig) -> dict[str, int]:
    """What the authors' loader reads from config.yaml."""
    return {theirs: getattr(concepts, ours) for ours, theirs in _KEYS.items()}


def read_authors_sizes(folder: Path) -> dict[str, int]:
    """Sizes by this project's names, from the config.yaml of a folder of weights.

    Their training writes the file once, above the folders of its checkpoints.

    Raises:
        FileNotFoundError: it is in neither place.
        ValueError: it is not YAML, or a size is missing.
    """
    beside, above = folder / "config.yaml", folder.parent / "config.yaml"
    path = above if above.is_file() and not beside.is_file() else beside
    if not path.is_file():
        wanted = ", ".join(_KEYS.values())
        raise FileNotFoundError(2, f"no such file, it must hold the concepts' sizes: {wanted}", str(path))
    try:
        settings: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    sizes: dict[str, int] = {}
    for ours, theirs in _KEYS.items():
        size = settings.get(theirs) if isinstance(settings, dict) else None
        if type(size) is not int:
            raise ValueError(f"{path}: {theirs} is missing or not an integer")
        sizes[ours] = size
    return sizes
