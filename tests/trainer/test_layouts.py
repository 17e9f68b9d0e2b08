"""Every layout of ranks computes the same run, and a checkpoint of each loads into each other."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.test_run import losses
from tests.trainer.tiny_run import NUM_LATENTS, tiny_config
from trainer.build import Parts, build_parts
from trainer.checkpoint.io import Checkpointer
from trainer.checkpoint.store import CheckpointStore
from trainer.concepts.extractor import TargetExtractor
from trainer.config import RunConfig
from trainer.main import train
from trainer.objective import CoCoMixLoss
from trainer.stop import StopRequest

STUDENTS = ("ntp", "cocomix")
OBJECTIVES = (*STUDENTS, "sae")


class Layout(NamedTuple):
    """Ranks and their ``parallel:`` keys, and the objectives that are trained on them."""

    num_ranks: int
    keys: dict[str, Any]
    objectives: tuple[str, ...] = OBJECTIVES


def zero(stage: int) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage}


LAYOUTS = {
    "one": Layout(1, {}),
    "fsdp2": Layout(2, {}),
    "hsdp2x2": Layout(4, {"dp_replicate": 2}),
    "tp2": Layout(2, {"tp": 2}),
    "fsdp2xtp2": Layout(4, {"tp": 2}),
}
# The same with a teacher or a dictionary that no rank holds whole.
SPLIT = {
    "fsdp2, teacher": Layout(2, {"shard_teacher": True}, ("cocomix", "sae")),
    "tp2, SAE": Layout(2, {"tp": 2, "shard_sae": True}, ("cocomix",)),
    "fsdp2xtp2, both": Layout(4, {"tp": 2, "shard_teacher": True, "shard_sae": True}, ("cocomix",)),
}
if importlib.util.find_spec("deepspeed") is not None:
    LAYOUTS |= {f"zero{stage}": Layout(2, zero(stage), STUDENTS) for stage in (1, 2, 3)}
    SPLIT["zero3, teacher"] = Layout(2, {**zero(3), "shard_teacher": True}, ("cocomix",))
ALL = LAYOUTS | SPLIT
STEPS = 20


def of_objective(objective: str, layouts: Iterable[str]) -> list[str]:
    return [name for name in layouts if objective in ALL[name].objectives]


def pairs() -> list[tuple[str, str]]:
    """Objective and layout but the one of one rank."""
    return [(objective, name) for objective in OBJECTIVES for name in of_objective(objective, ALL)[1:]]


def layout_config(world: Path, run_dir: Path, objective: str, layout: str) -> RunConfig:
    """Odd sizes: vocabulary (290), dictionary (37) and microbatches (5 rows) divide by no number of ranks.

    Data-parallel ranks have 12, 6 or 3 of the 12 rows, so that the last microbatch is short.
    """
    return tiny_config(
        world,
        run_dir,
        objective,
        train__steps=STEPS,
        train__batch_size=12,
        train__microbatch_size=5,
        validation__every_steps=10,
        checkpoint__every_steps=10,
        **{f"parallel__{key}": value for key, value in ALL[layout].keys.items()},
    )


@pytest.fixture(scope="module", autouse=True)
def _ready_to_fork(request: pytest.FixtureRequest) -> None:
    if "zero1" in ALL:
        request.getfixturevalue("deepspeed_before_forks")


@pytest.fixture(scope="module")
def runs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run per layout and objective, below ``objective/layout``."""
    root = tmp_path_factory.mktemp("layouts")

    def train_all(world: World, layout: str) -> list[str]:
        outcomes = []
        for objective in ALL[layout].objectives:
            config = layout_config(tiny_world, root / objective / layout, objective, layout)
            with StopRequest() as stop:
                outcomes.append(train(config, world, stop))
        return outcomes

    for layout, (num_ranks, _, objectives) in ALL.items():
        outcomes = run_ranks(train_all, num_ranks, layout, timeout_s=180)
        assert outcomes == [["finished"] * len(objectives)] * num_ranks
    return root


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("objective", "layout"), pairs())
def test_layout_trains_as_one_rank(objective: str, layout: str, runs: Path) -> None:
    """Catches a gradient that is lost, doubled or averaged by a layout: losses and norms of 20 steps."""
    ours, theirs = losses(runs / objective / layout), losses(runs / objective / "one")
    assert len(ours) == STEPS
    for record, expected in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            if value is not None:
                assert record[key] == pytest.approx(value, abs=1e-5), (record["step"], key)


def test_the_engines_are_complete() -> None:
    """Says that a part of the matrix was left out."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    assert [name for name in LAYOUTS if name.startswith("zero")] == ["zero1", "zero2", "zero3"]


# What the ranks of a layout hold, load and send


class Facts(NamedTuple):
    """Of one rank of a layout."""

    hashes: dict[str, dict[str, str]]
    """By objective and source: hash of the whole state after loading the source's checkpoint; ``first``
    is the state before."""
    targets: Tensor | None
    elements: tuple[int, int]
    """Weights of teacher and SAE that this rank holds after use."""
    sent: Counter[str]
    """Bytes that this rank contributed to the collectives of one extraction among the tp ranks."""


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


def hash_after_loading(parts: Parts, run_dir: Path) -> str:
    checkpointer = Checkpointer(CheckpointStore(run_dir / "checkpoints"))
    saved = checkpointer.find_newest()
    assert saved is not None
    state = parts.engine.state_dict()
    checkpointer.load(saved, state)
    parts.engine.load_state_dict(state)
    checkpointer.close()
    return full_hash(parts)


def held_elements(model: nn.Module) -> int:
    weights = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters())
    return sum(weight.numel() for weight in weights)


def count_sent(extractor: TargetExtractor) -> Counter[str]:
    """Count what the extractor hands to collectives from now on."""
    tp, sent = extractor.tp, Counter[str]()
    all_gather, all_sum = tp.all_gather, tp.sum

    def counted(name: str, x: Tensor) -> Tensor:
        sent[name] += x.numel() * x.element_size() * (tp.size > 1)
        return x

    tp.all_gather = lambda x: all_gather(counted("gathered", x))  # type: ignore[method-assign]
    tp.sum = lambda x: all_sum(counted("summed", x))  # type: ignore[method-assign]
    return sent


def extraction_facts(parts: Parts) -> tuple[Tensor, tuple[int, int], Counter[str]]:
    """Targets of 3 rows of 16 tokens, twice, so that freed weights would be missed."""
    assert isinstance(parts.objective, CoCoMixLoss)
    extractor = parts.objective.extractor
    tokens = torch.randint(0, 290, (3, 17), generator=torch.Generator().manual_seed(4))
    first = extractor(tokens[:, :-1], tokens[:, 1:])
    sent = count_sent(extractor)
    second = extractor(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(first, second)
    return second, (held_elements(extractor.teacher), held_elements(extractor.sae)), sent


@pytest.fixture(scope="module")
def facts(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, runs: Path) -> dict[str, list[Facts]]:
    """By layout, of each rank."""
    root = tmp_path_factory.mktemp("facts")

    def one_rank(world: World, layout: str) -> Facts:
        found = Facts({}, None, (0, 0), Counter())
        for objective in ALL[layout].objectives:
            parts = build_parts(layout_config(tiny_world, root / layout, objective, layout), world)
            if objective == "cocomix":
                found = Facts(found.hashes, *extraction_facts(parts))
            hashes = found.hashes[objective] = {"first": full_hash(parts)}
            # What a split teacher's run writes differs in nothing that is loaded.
            sources = LAYOUTS if layout in LAYOUTS else ("one", layout)
            for source in of_objective(objective, sources):
                hashes[source] = hash_after_loading(parts, runs / objective / source)
            parts.engine.close()
            parts.loader.close()
        return found

    return {name: run_ranks(one_rank, ALL[name].num_ranks, name, timeout_s=180) for name in ALL}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_checkpoint_of_each_layout_loads_into_each_other(
    objective: str, facts: dict[str, list[Facts]]
) -> None:
    """Catches a state that only the layout which wrote it can read, or that another one reads wrongly."""
    found: dict[str, set[str]] = {}
    readers: Counter[str] = Counter()
    for layout in of_objective(objective, ALL):
        for rank in facts[layout]:
            for source, value in rank.hashes[objective].items():
                found.setdefault(source, set()).add(value)
        readers.update(facts[layout][0].hashes[objective].keys())
    assert {source: len(hashes) for source, hashes in found.items()} == dict.fromkeys(found, 1)
    assert all(readers[name] >= len(of_objective(objective, LAYOUTS)) for name in LAYOUTS if readers[name])
    assert len(set.union(*found.values())) > 2, "each run has its own rounding"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", of_objective("cocomix", ALL)[1:])
def test_targets_are_identical(layout: str, facts: dict[str, list[Facts]]) -> None:
    """Catches rows that a rank extracts twice, in the wrong order or not at all, and other latents."""
    expected = facts["one"][0].targets
    assert expected is not None and (expected >= 0).any()
    for rank in facts[layout]:
        assert rank.targets is not None and torch.equal(rank.targets, expected)


@pytest.mark.dist
@pytest.mark.slow
def test_what_a_rank_holds_of_teacher_and_dictionary(facts: dict[str, list[Facts]]) -> None:
    """Catches weights that stay whole, or stay gathered after their use."""
    teacher, sae = facts["one"][0].elements
    assert all(rank.elements == (teacher, sae) for name in LAYOUTS for rank in facts[name])
    half = [rank.elements[0] for name in ("fsdp2, teacher", "zero3, teacher") for rank in facts.get(name, [])]
    assert half and all(size == teacher // 2 for size in half)
    # Two by two ranks hold one teacher, and pairs of them one dictionary of 37 rows: 19 and 18 and a zero.
    rows = -(-NUM_LATENTS // 2)
    part = rows * (2 * 12 + 1) + 12
    assert [rank.elements for rank in facts["fsdp2xtp2, both"]] == [(teacher // 4, part)] * 4
    assert [rank.elements for rank in facts["tp2, SAE"]] == [(teacher, part)] * 2


@pytest.mark.dist
@pytest.mark.slow
def test_what_the_targets_cost_on_the_wire(facts: dict[str, list[Facts]]) -> None:
    """Catches a tensor that grows, or an exchange that is added."""
    tokens, share, width, active, fp32 = 3 * 16, 2 * 16, 12, 6, 4
    assert sum(facts["one"][0].sent.values()) == 0
    for rank in facts["tp2"]:
        assert rank.sent == {"gathered": share * 3 * 2}, "A = 3 target ids of two bytes"
    residuals, candidates = share * 2 * width * fp32, tokens * 2 * active * fp32
    for rank in facts["tp2, SAE"]:
        assert rank.sent == {"gathered": residuals + candidates, "summed": tokens * active * fp32}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_first_weights_do_not_depend_on_the_layout(objective: str, facts: dict[str, list[Facts]]) -> None:
    """Catches weights drawn per shard: runs of different layouts could not be compared."""
    layouts = of_objective(objective, ALL)
    assert len({rank.hashes[objective]["first"] for name in layouts for rank in facts[name]}) == 1


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


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("cocomix", {"parallel__shard_sae": True}, "parallel.shard_sae=true needs tp of at least 2"),
        ("ntp", {"parallel__shard_teacher": True}, "does not fit objective.name=ntp: there is no teacher"),
        ("sae", {"parallel__shard_sae": True, "parallel__tp": 2}, "parallel.tp splits its dictionary anyway"),
        ("ntp", {"parallel__shard_sae": True, "parallel__tp": 2}, "objective.name=ntp: there is none"),
    ],
)
def test_what_has_nothing_to_split_is_refused(
    objective: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Catches a switch without effect, which would pass for memory saved."""
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(tmp_path, tmp_path / "run", objective, **changes)
    assert "\n" not in str(error.value)
