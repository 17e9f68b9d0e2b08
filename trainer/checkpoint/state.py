"""What a checkpoint holds besides tensors, and whether a run may go on from it.

The tensors are the engine's state dict (model and optimizer). ``RunState`` is stored once,
the random generators once per rank, the resolved configuration as text.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.store import CheckpointError

_ABSENT = "(absent)"

# A change of these keys resumes with a warning; every other key decides what is being trained.
# (Stored targets are those of the same teacher and autoencoder, or the run does not start.)
_SOFT_KEYS = frozenset(
    {
        "train.steps",
        "train.microbatch_size",
        "run.dir",
        "run.device",
        # How shards are fetched: their hash is in the loader's own state.
        "data.prefetch_steps",
        "data.on_damage",
        "data.cache_dir",
        "data.cache_gb",
        "data.remote_timeout_s",
        "data.remote_connections",
        "concepts.source",
        "concepts.labels",
    }
)
# Limits of a source only decide whether a run may begin.
_SOFT_SOURCE_KEYS = frozenset({"max_epochs", "max_tokens"})
_SOFT_SECTIONS = frozenset({"parallel", "log", "checkpoint", "validation", "tasks"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The run's progress, the same on all ranks; every field is JSON-able."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens seen."""
    data: dict[str, Any]
    """``TokenLoader.state_dict()``: cursor and identity of the order."""
    more: dict[str, Any] = field(default_factory=dict)
    """State of further parts by their name (spike detector, ...)."""

    def to_json(self) -> dict[str, Any]:
        """The ``extra`` of :meth:`trainer.checkpoint.io.Checkpointer.save`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunState:
        """Inverse of :meth:`to_json`.

        Raises:
            CheckpointError: The fields are not those of this version.
        """
        names = {item.name for item in fields(cls)}
        if value.keys() != names:
            raise CheckpointError(
                f"run state has fields {sorted(value)}, this version expects {sorted(names)}"
            )
        return cls(**value)


def code_version() -> str:
    """Commit of the git checkout that holds this file (``-dirty`` if changed), else the package's version."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed copy inside somebody else's checkout must not report that one's commit.
        _run([*git, "ls-files", "--error-unmatch", here.name])
        return _run([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return metadata.version("cocomix")
    except metadata.PackageNotFoundError:
        return "unknown"


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def capture_rng() -> dict[str, Any]:
    """State of this process's random generators (Python, NumPy, torch, its CUDA device), JSON-able."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _to_hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_hex(torch.cuda.get_rng_state())
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set this process's random generators to what :func:`capture_rng` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _to_hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Difference:
    """One key on which two resolved configurations disagree."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} in the checkpoint, {self.new!r} now"


def compare_configs(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[list[Difference], list[Difference]]:
    """Compare two resolved configurations (nested mappings of plain values, as the YAML holds them).

    Returns:
        Hard and soft differences, by key. A hard one changes what is being trained: model, targets,
        objective, optimizer, data and their order, seed, batch, precision. A soft one (length, layout,
        logging, ...) may change on resume. An unknown key is hard.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    hard: list[Difference] = []
    soft: list[Difference] = []
    for key in sorted(before.keys() | after.keys()):
        difference = Difference(key, before.get(key, _ABSENT), after.get(key, _ABSENT))
        if difference.old != difference.new:
            (soft if _is_soft(key) else hard).append(difference)
    return hard, soft


def check_resume(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Refuse a resume with another configuration; return the differences that are only worth a warning.

    Raises:
        CheckpointError: Names the first hard difference with both values, and what to do.
    """
    hard, soft = compare_configs(old, new)
    if hard:
        more = f" (and {len(hard) - 1} more: {', '.join(item.key for item in hard[1:4])})" if hard[1:] else ""
        raise CheckpointError(
            f"cannot resume: {hard[0]}{more}; set it back, or set another run.dir to start a new run"
        )
    return soft


def _is_soft(key: str) -> bool:
    limit = key.startswith("data.sources.") and key.rpartition(".")[2] in _SOFT_SOURCE_KEYS
    return limit or key in _SOFT_KEYS or key.split(".", 1)[0] in _SOFT_SECTIONS


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each leaf; a section that is missing equals one that is null.

    Sections of a list go by their ``name``.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        yield from _flatten({item["name"]: item for item in value}, prefix)
    elif isinstance(value, list | tuple):
        yield prefix, list(value)
    elif value is not None:
        yield prefix, value
