"""Imports run strictly downward; checked on the syntax tree, so that nothing is imported for it.

``docs/architecture.md`` explains the layers. ``violations`` works on any source tree, which lets
the tests plant each kind of violation and see it found.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "parallel", "trainer", "launch", "benchmarks", "tests")

# Lowest first; a module belongs to the layer of its longest prefix and imports from there downward.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("data.config", "parallel.config"),
    ("trainer.config_io", "trainer.config"),
    ("data", "parallel"),
    ("trainer.kernels",),
    ("trainer.model",),
    ("trainer.concepts", "trainer.objective", "trainer.optim", "trainer.flops", "trainer.metrics"),
    ("trainer.checkpoint",),
    (
        "trainer.build",
        "trainer.step",
        "trainer.feed",
        "trainer.publish",
        "trainer.stop",
        "trainer.heartbeat",
        "trainer.health",
        "trainer.damage",
    ),
    ("trainer.analysis", "trainer.verify"),
    ("trainer.loop",),
    # Programs: each runs the one training loop or reads what it wrote.
    ("trainer.main", "trainer.concepts.train_sae", "trainer.concepts.label"),
    ("launch", "benchmarks", "tests"),
)
LEVEL = {prefix: level for level, prefixes in enumerate(LAYERS) for prefix in prefixes}

TORCH_FREE = (
    "data.config",
    "parallel.config",
    "trainer.config_io",
    "trainer.config",
    "trainer.flops",
    "trainer.checkpoint.store",
    "trainer.checkpoint.policy",
)
STRANGERS = (("data", "parallel"), ("parallel", "data"))
# Third-party library: the only prefixes that may import it.
OWNERS = {
    "torchtitan": ("parallel.titan",),
    "deepspeed": ("parallel.zero",),
    # An oracle in tests; the remote code is text that exported folders get, and nobody imports it here.
    "transformers": ("tests", "trainer.analysis.remote_code"),
}

Graph = dict[str, set[str]]


def violations(root: Path) -> list[str]:
    """Check the source tree under ``root`` against all rules; one line per violation."""
    graph = {name: set(imported_modules(name, path, root)) for name, path in modules(root).items()}
    return [*filled_packages(root), *order(graph), *owners(graph), *torch_free(graph), *circles(graph)]


def modules(root: Path) -> dict[str, Path]:
    """Map dotted module names to files; packages are left out, their ``__init__.py`` is empty."""
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in files
        if path.stem != "__init__"
    }


def imported_modules(name: str, path: Path, root: Path) -> Iterator[str]:
    """Yield what a module imports anywhere in its text, functions included, as dotted module names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(name.split(".")[: -node.level]) if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if is_module(full, root) else base
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            yield from (
                str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)
            )


def called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def is_module(name: str, root: Path) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def level(name: str) -> int | None:
    """Return the layer of a module by its longest prefix; None when no layer names it."""
    prefixes = [prefix for prefix in LEVEL if within(name, prefix)]
    return LEVEL[max(prefixes, key=len)] if prefixes else None


def filled_packages(root: Path) -> Iterator[str]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("__init__.py")):
            if path.read_text(encoding="utf-8").strip():
                yield f"{path.relative_to(root)} is not empty: one name has one import path"


def order(graph: Graph) -> Iterator[str]:
    for name, imports in graph.items():
        own = level(name)
        if own is None:
            yield f"{name} belongs to no layer: add it to LAYERS"
            continue
        for other in sorted(imports):
            if other.split(".")[0] not in PACKAGES:
                continue
            above = level(other)
            if above is not None and above > own:
                yield f"{name} (layer {own}) imports {other} (layer {above}), which lies above it"
            if any(within(name, here) and within(other, there) for here, there in STRANGERS):
                yield f"{name} imports {other}: data and parallel do not know each other"


def owners(graph: Graph) -> Iterator[str]:
    for name, imports in graph.items():
        for library, prefixes in OWNERS.items():
            allowed = any(within(name, prefix) for prefix in prefixes)
            if not allowed and any(within(other, library) for other in imports):
                yield f"{name} imports {library}, which belongs to {', '.join(prefixes)} alone"


def torch_free(graph: Graph) -> Iterator[str]:
    for name in TORCH_FREE:
        chain = path_to(graph, name, "torch")
        if chain:
            yield f"{name} must not need torch: {' -> '.join(chain)}"


def path_to(graph: Graph, start: str, library: str) -> list[str]:
    """Return a shortest chain of imports from a module to a library, or an empty list."""
    chains, seen = [[start]], {start}
    while chains:
        chain = chains.pop(0)
        for other in sorted(graph.get(chain[-1], ())):
            if within(other, library):
                return [*chain, other]
            if other not in seen:
                seen.add(other)
                chains.append([*chain, other])
    return []


def circles(graph: Graph) -> Iterator[str]:
    """Yield each circle once; it is found by peeling off modules whose imports are all peeled off."""
    left = {name: {other for other in imports if other in graph} for name, imports in graph.items()}
    while free := [name for name, imports in left.items() if not imports]:
        left = {name: imports.difference(free) for name, imports in left.items() if name not in free}
    for name in sorted(left):
        chain = path_to(left, name, name)
        if chain and name == min(chain):
            yield f"imports run in a circle: {' -> '.join(chain)}"


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_this_repository() -> None:
    """Catches an import that runs upward, in a circle or to a library that another module owns."""
    assert len(modules(ROOT)) > 10
    assert violations(ROOT) == []


GOOD = {
    "data/config.py": "import dataclasses",
    "data/loader.py": "import torch\nfrom data.config import DataConfig",
    "data/cli.py": "import argparse",
    "parallel/titan.py": "from torchtitan.distributed import ParallelDims",
    "trainer/__init__.py": "",
    "trainer/config.py": "from data.config import DataConfig",
    "trainer/model/gpt2.py": "import torch",
    "trainer/concepts/sae.py": "from trainer.model import gpt2",
    "trainer/concepts/train_sae.py": "from trainer import loop\nfrom data.cli import run_cli",
    "trainer/loop.py": "from trainer.concepts.sae import TopKSae\nimport data.loader",
    "tests/test_x.py": "import transformers\nfrom trainer.concepts import train_sae",
}


def test_accepts_a_clean_tree(tmp_path: Path) -> None:
    """Catches a checker that cries wolf."""
    plant(tmp_path, GOOD)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "data/bad.py",
            "from trainer.model.gpt2 import GPT2",
            "data.bad (layer 2) imports trainer.model.gpt2",
        ),
        ("data/bad.py", "def f():\n    import trainer.loop", "data.bad (layer 2) imports trainer.loop"),
        ("data/bad.py", "from trainer import loop", "data.bad (layer 2) imports trainer.loop"),
        ("data/bad.py", "import importlib\nimportlib.import_module('trainer.loop')", "imports trainer.loop"),
        ("data/bad.py", "import parallel.titan", "data and parallel do not know each other"),
        ("parallel/bad.py", "from data import config", "data and parallel do not know each other"),
        ("trainer/model/bad.py", "from ..concepts import sae", "imports trainer.concepts.sae (layer 5)"),
        (
            "trainer/concepts/bad.py",
            "import trainer.concepts.train_sae",
            "(layer 5) imports trainer.concepts.t",
        ),
        ("trainer/main.py", "import launch.demo", "trainer.main (layer 10) imports launch.demo (layer 11)"),
        ("trainer/new.py", "", "trainer.new belongs to no layer"),
        ("data/config.py", "import torch", "data.config must not need torch: data.config -> torch"),
        (
            "data/config.py",
            "import torch",
            "trainer.config must not need torch: trainer.config -> data.config ->",
        ),
        ("trainer/checkpoint/store.py", "import data.loader", "store -> data.loader -> torch"),
        (
            "trainer/step.py",
            "import torchtitan",
            "trainer.step imports torchtitan, which belongs to parallel.titan",
        ),
        ("tests/test_y.py", "from torchtitan import x", "tests.test_y imports torchtitan"),
        ("parallel/bad.py", "import deepspeed.ops", "parallel.bad imports deepspeed"),
        (
            "trainer/model/bad.py",
            "from transformers import GPT2Model",
            "belongs to tests, trainer.analysis.remote_code alone",
        ),
        ("trainer/__init__.py", "from trainer.loop import run", "trainer/__init__.py is not empty"),
        ("data/bad.py", "import data.loader", None),
    ],
)
def test_finds_a_planted_violation(tmp_path: Path, file: str, text: str, expected: str | None) -> None:
    """Catches a rule that no longer bites; the last case shows that an innocent file passes."""
    plant(tmp_path, GOOD | {file: text})
    found = violations(tmp_path)
    assert found == [] if expected is None else any(expected in line for line in found), found


def test_finds_a_circle_within_a_layer(tmp_path: Path) -> None:
    """Catches circles, which the order of layers alone does not exclude."""
    circle = {
        "data/a.py": "import data.b",
        "data/b.py": "from data import c",
        "data/c.py": "import data.a",
        "data/d.py": "import data.a",
    }
    plant(tmp_path, GOOD | circle)
    assert violations(tmp_path) == ["imports run in a circle: data.a -> data.b -> data.c -> data.a"]
