"""Every layout of ranks computes the same run, and a checkpoint of each loads into each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from parallel.apply import gather_full_state
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.test_run import losses, train_on_ranks
from tests.trainer.tiny_run import tiny_config
from trainer.build import Parts, build_parts
from trainer.checkpoint.io import Checkpointer
from trainer.checkpoint.store import CheckpointStore
from trainer.config import RunConfig

# Name: number of ranks and the `parallel:` keys. The vocabulary (290), the dictionary (37) and the rows
# per rank (6 or 3 in microbatches of 2) divide by none of them.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "fsdp2": (2, {}),
    "hsdp2x2": (4, {"parallel__dp_replicate": 2}),
    "tp2": (2, {"parallel__tp": 2}),
    "fsdp2xtp2": (4, {"parallel__tp": 2}),
}
STEPS = 20


def layout_config(world: Path, run_dir: Path, objective: str, layout: str) -> RunConfig:
    """Batches of 12 rows: each data-parallel rank has 12, 6 or 3 of them."""
    return tiny_config(
        world,
        run_dir,
        objective,
        train__steps=STEPS,
        train__batch_size=12,
        train__microbatch_size=2,
        validation__every_steps=10,
        checkpoint__every_steps=10,
        **LAYOUTS[layout][1],
    )


@pytest.fixture(scope="module")
def runs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run per layout and objective, below ``objective/layout``."""
    root = tmp_path_factory.mktemp("layouts")
    for objective in ("ntp", "cocomix"):
        for layout, (num_ranks, _) in LAYOUTS.items():
            config = layout_config(tiny_world, root / objective / layout, objective, layout)
            train_on_ranks(config, num_ranks)
    return root


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ntp", "cocomix"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_layout_trains_as_one_rank(objective: str, layout: str, runs: Path) -> None:
    """Catches a gradient that is lost, doubled or averaged by a layout: losses and norms of 20 steps."""
    ours, theirs = losses(runs / objective / layout), losses(runs / objective / "one")
    assert len(ours) == STEPS
    for record, expected in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            if value is not None:
                assert record[key] == pytest.approx(value, abs=1e-5), (record["step"], key)


def full_hash(parts: Parts) -> str:
    """Hash of all weights and optimizer state, whole."""
    tensors: list[tuple[str, Tensor]] = list(_flatten(parts.engine.state_dict()))
    digest = hashlib.sha256()
    for name, tensor in tensors:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(name.encode() + whole.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
        return
    for key in sorted(value):
        yield from _flatten(value[key], f"{prefix}/{key}")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ntp", "cocomix"])
def test_a_checkpoint_of_each_layout_loads_into_each_other(
    objective: str, tiny_world: Path, tmp_path: Path, runs: Path
) -> None:
    """Catches a state that only the layout which wrote it can read, or that another one reads wrongly."""

    def load_all(world: World, layout: str) -> dict[str, str]:
        torch.set_num_threads(1)
        parts = build_parts(layout_config(tiny_world, tmp_path / layout, objective, layout), world)
        hashes = {}
        for source in LAYOUTS:
            checkpointer = Checkpointer(CheckpointStore(runs / objective / source / "checkpoints"))
            saved = checkpointer.find_newest()
            assert saved is not None
            state = parts.engine.state_dict()
            checkpointer.load(saved, state)
            parts.engine.load_state_dict(state)
            hashes[source] = full_hash(parts)
            checkpointer.close()
        return hashes

    results = {
        layout: run_ranks(load_all, num_ranks, layout, timeout_s=120)
        for layout, (num_ranks, _) in LAYOUTS.items()
    }
    for source in LAYOUTS:
        hashes = {rank[source] for ranks in results.values() for rank in ranks}
        assert len(hashes) == 1, source
    assert len({results["one"][0][source] for source in LAYOUTS}) > 1, "each run has its own rounding"


@pytest.mark.dist
def test_first_weights_do_not_depend_on_the_layout(tiny_world: Path, tmp_path: Path) -> None:
    """Catches weights drawn per shard: runs of different layouts could not be compared."""

    def first_weights(world: World, layout: str) -> dict[str, Tensor]:
        parts = build_parts(layout_config(tiny_world, tmp_path / layout, "cocomix", layout), world)
        return gather_full_state(parts.engine.model)

    expected = run_ranks(first_weights, 1, "one")[0]
    for layout in ("hsdp2x2", "fsdp2xtp2"):
        weights = run_ranks(first_weights, 4, layout)[0]
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor), (layout, name)


@pytest.mark.dist
def test_targets_are_identical_and_cost_two_bytes_each(tiny_world: Path, tmp_path: Path) -> None:
    """Catches rows that a tensor-parallel rank extracts twice, in the wrong order or not at all."""

    def targets(world: World, layout: str) -> tuple[Tensor, int]:
        parts = build_parts(layout_config(tiny_world, tmp_path / layout, "cocomix", layout), world)
        extractor = parts.objective.extractor  # type: ignore[attr-defined]
        tokens = torch.randint(0, 290, (3, 17), generator=torch.Generator().manual_seed(4))
        sent: list[int] = []
        gather = extractor.tp.all_gather
        extractor.tp.all_gather = lambda x: (sent.append(x.numel() * x.element_size()), gather(x))[1]
        return extractor(tokens[:, :-1], tokens[:, 1:]), sum(sent)

    (expected, nothing), *_ = run_ranks(targets, 1, "one")
    assert nothing == 0
    for ids, sent_bytes in run_ranks(targets, 2, "tp2"):
        assert torch.equal(ids, expected)
        assert sent_bytes == 2 * 16 * 3 * 2  # two of the three rows, 16 tokens, A = 3, two bytes


@pytest.mark.dist
def test_what_tensor_parallelism_cannot_split_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    """Catches heads cut in two, or a traceback from deep inside."""

    def refused(world: World, changes: dict[str, Any]) -> str:
        config = tiny_config(tiny_world, tmp_path / "run", "ntp", **changes)
        with pytest.raises(ValueError, match="parallel.tp") as error:
            build_parts(config, world)
        return str(error.value)

    cases = [
        ({"parallel__tp": 2, "model__n_head": 1}, "parallel.tp=2 must divide model.n_head=1"),
        ({"parallel__tp": 3}, "parallel.tp=3 must divide 64"),
        ({"parallel__tp": 4, "data__seq_len": 2}, "parallel.tp=4 must divide data.seq_len=2"),
    ]
    for changes, message in cases:
        for text in run_ranks(refused, changes["parallel__tp"], changes):
            assert message in text
