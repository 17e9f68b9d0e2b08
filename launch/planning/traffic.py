"""Bytes that one GPU exchanges in an optimizer step, by mesh axis and kind of collective (torch-free).

A collective's ``buffer`` is its whole tensor: the gathered one, the one before a reduce-scatter, the one
that is summed. Of it every rank of n sends (n - 1) / n, in an all-reduce twice that: ring algorithms,
as nccl-tests' "bus bandwidth" counts them. A step that writes metrics is meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from launch.planning.layout import Layout, Unit, concepts_of
from launch.planning.memory import FP32, INT64
from launch.planning.teacher import Teacher
from trainer.config import ConceptsConfig, ModelConfig, RunConfig

Axis = Literal["dp_shard", "node", "dp_replicate", "tp", "dp", "replica"]
Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]

FP64 = 8
METRIC_SLOTS = {"ntp": 2, "cocomix": 7}
"""Sums that an objective reports."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """All collectives of one purpose in one step."""

    what: str
    axis: Axis
    kind: Kind
    buffer: int
    """Bytes of the whole tensors."""
    exposed: bool = False
    """Whether the computation waits for it; otherwise it runs beside it."""


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that one GPU sends."""

    intra_node: float
    inter_node: float

    @property
    def total(self) -> float:
        """Both."""
        return self.intra_node + self.inter_node


def group_of(axis: Axis, layout: Layout) -> tuple[int, int]:
    """Ranks of an axis' group and those of them on one node; ``tp`` varies fastest, then ``dp_shard``."""
    size, stride = {
        "tp": (layout.tp, 1),
        "dp_shard": (layout.dp_shard, layout.tp),
        "node": (layout.shards_per_node, layout.tp),
        "dp_replicate": (layout.dp_replicate, layout.tp * layout.dp_shard),
        "dp": (layout.dp_size, layout.tp),
        "replica": (layout.replica, 1),
    }[axis]
    return size, min(size, max(1, layout.cluster.gpus_per_node // stride))


def sent(transfer: Transfer, layout: Layout) -> Sent:
    """What one GPU sends for a transfer; of a node's ring members one sends to another node at a time."""
    size, on_node = group_of(transfer.axis, layout)
    times = 2 if transfer.kind == "all-reduce" else 1
    total = times * transfer.buffer * (size - 1) / size
    if on_node == size:
        return Sent(total, 0.0)
    outside = (size - on_node) / (size - 1) if transfer.kind == "all-to-all" else 1 / on_node
    return Sent(total * (1 - outside), total * outside)


def plan_traffic(config: RunConfig, layout: Layout, teacher: Teacher | None) -> tuple[Transfer, ...]:
    """Every collective of a step on groups of more than one rank; those of a few bytes are left out."""
    assert config.model is not None
    concepts = concepts_of(config)
    element = 2 if config.train.precision == "bf16" else FP32
    found = [
        *_weights(config, layout, element),
        *_gradients(layout),
        *_tensor_parallel(config, config.model, concepts, layout, element),
        *_targets(config, layout, teacher),
        *_metrics(config, layout),
    ]
    return tuple(part for part in found if part.buffer and group_of(part.axis, layout)[0] > 1)


def _whole(unit: Unit, layout: Layout) -> int:
    """Elements of a unit in FSDP2's flat buffers, where each weight is padded to equal shards."""
    return unit.shard_elements(layout.tp, layout.dp_shard) * layout.dp_shard


def _weights(config: RunConfig, layout: Layout, element: int) -> Iterator[Transfer]:
    """Each microbatch gathers all weights; blocks again in backward if they were freed after forward."""
    times, blocks = len(layout.microbatches), layout.num_blocks
    block = times * element * _whole(layout.block, layout)
    gathers = blocks + gathered_again(config, layout)
    yield Transfer("weights of the blocks", "dp_shard", "all-gather", gathers * block)
    if config.parallel.reshard_after_forward == "node":
        yield Transfer("weights of the blocks", "node", "all-gather", blocks * block)
    # Nothing of the student can run before its embedding, and the root holds it.
    root = times * element * _whole(layout.root, layout)
    yield Transfer("weights of the root", "dp_shard", "all-gather", root, exposed=True)


def gathered_again(config: RunConfig, layout: Layout) -> int:
    """Blocks that backward gathers from all shards because forward freed their weights."""
    if layout.dp_shard == 1 and config.parallel.reshard_after_forward == "auto":
        return 0
    freed = {"never": 0, "auto": layout.num_blocks - 1, "always": layout.num_blocks, "node": 0}
    return freed[config.parallel.reshard_after_forward]


def _gradients(layout: Layout) -> Iterator[Transfer]:
    """After the last microbatch only, in fp32; the root's come last and nothing is left beside them."""
    blocks, root = layout.num_blocks * _whole(layout.block, layout), _whole(layout.root, layout)
    for what, elements, exposed in (("blocks", blocks, False), ("root", root, True)):
        size = FP32 * elements
        yield Transfer(f"gradients of the {what}", "dp_shard", "reduce-scatter", size, exposed)
        shard = size // layout.dp_shard
        yield Transfer(f"gradients of the {what}", "dp_replicate", "all-reduce", shard, exposed)
    norms = FP32 * layout.num_tensors
    axes: tuple[Axis, ...] = ("dp_shard", "tp")
    for axis in axes:
        yield Transfer("gradient norm", axis, "all-reduce", norms, exposed=True)


def _tensor_parallel(
    config: RunConfig, model: ModelConfig, concepts: ConceptsConfig | None, layout: Layout, element: int
) -> Iterator[Transfer]:
    """Sequence parallelism around every sublayer, and what the heads exchange per token."""
    seq_len = config.data.seq_len
    tokens = layout.rows_per_rank * seq_len
    stream = tokens * model.d_model * element
    gathered, summed = _sublayers(model, concepts)
    # Backward gathers where forward summed, and sums where forward gathered.
    both = gathered + summed
    again = _recomputed(model, concepts) if config.parallel.recompute == "full" else (0, 0)
    yield Transfer("activations", "tp", "all-gather", (both + again[0]) * stream, exposed=True)
    yield Transfer("activations", "tp", "reduce-scatter", (both + again[1]) * stream, exposed=True)
    yield Transfer("LM head's exchange", "tp", "all-gather", 2 * FP32 * tokens * layout.tp, exposed=True)
    whole = sum(
        parameter.elements(1) * count
        for unit, count in layout.units()
        for parameter in unit.parameters
        if parameter.tensor_dim is None
    )
    size = FP32 if len(layout.microbatches) > 1 else element
    yield Transfer("gradients of whole weights", "tp", "all-reduce", size * whole, exposed=True)
    if concepts is not None:
        yield from _concept_path(model, concepts, layout, seq_len, element)


def _sublayers(model: ModelConfig, concepts: ConceptsConfig | None) -> tuple[int, int]:
    """Streams of T positions that forward gathers and sums, embedding and LM head included."""
    if concepts is None:
        return 2 * model.n_layer + 1, 2 * model.n_layer + 1
    lower = concepts.insert_layer
    interleaved = model.n_layer - 1 - lower
    # The last block reads 2T positions and updates T of them; the mixer gathers its input.
    gathered = 2 * lower + 4 * interleaved + 3 + 1 + 1
    summed = 2 * lower + 4 * interleaved + 2 + 1
    return gathered, summed


def _recomputed(model: ModelConfig, concepts: ConceptsConfig | None) -> tuple[int, int]:
    """Streams of T positions that blocks gather and sum again; recomputation stops before the last sum."""
    if concepts is None:
        return 2 * model.n_layer, model.n_layer
    lower = concepts.insert_layer
    interleaved = model.n_layer - 1 - lower
    return 2 * lower + 4 * interleaved + 3, lower + 2 * interleaved + 1


def _concept_path(
    model: ModelConfig, concepts: ConceptsConfig, layout: Layout, seq_len: int, element: int
) -> Iterator[Transfer]:
    """The dictionary's and the target ids' exchange."""
    tokens = layout.rows_per_rank * seq_len
    numbers = 2 + 2 * concepts.top_k
    head = FP32 * numbers * tokens * layout.tp
    yield Transfer("concept head's exchange", "tp", "all-gather", head, exposed=True)
    values = element * concepts.top_k * tokens
    yield Transfer("concept head's exchange", "tp", "all-reduce", values, exposed=True)
    ranks = (FP32 + INT64) * concepts.num_targets * tokens
    yield Transfer("ranks of the targets", "tp", "all-reduce", ranks, exposed=True)
    columns = 2 * element * tokens * model.d_model // layout.tp
    yield Transfer("mixed concepts", "tp", "all-to-all", columns, exposed=True)


def _targets(config: RunConfig, layout: Layout, teacher: Teacher | None) -> Iterator[Transfer]:
    """What target extraction exchanges: weights of a split teacher, then residuals or target ids."""
    if teacher is None or config.concepts is None:
        return
    concepts, parallel, seq_len = config.concepts, config.parallel, config.data.seq_len
    element = 2 if concepts.precision == "bf16" else FP32
    if parallel.shard_teacher:
        yield from _teacher_weights(concepts, layout, teacher, element)
    # Each rank computes an equal share of the rows, where need be one of them twice.
    rows = sum(-(-size // layout.tp) * layout.tp for size in layout.microbatches) * seq_len
    if not parallel.shard_sae:
        size = 2 * concepts.num_targets * rows
        yield Transfer("target ids", "tp", "all-gather", size, exposed=True)
        return
    residuals = 2 * element * teacher.d_model * rows
    yield Transfer("residuals and their gradients", "tp", "all-gather", residuals, exposed=True)
    scores = FP32 * concepts.top_k * layout.rows_per_rank * seq_len
    candidates = 2 * layout.tp * scores
    yield Transfer("active latents", "tp", "all-gather", candidates, exposed=True)
    yield Transfer("attribution", "tp", "all-reduce", scores, exposed=True)


def _teacher_weights(
    concepts: ConceptsConfig, layout: Layout, teacher: Teacher, element: int
) -> Iterator[Transfer]:
    """Each microbatch gathers the root once, blocks once, and those above the residual again in backward."""
    ranks, times = layout.replica, element * len(layout.microbatches)
    block, root = (unit.shard_elements(1, ranks) * ranks for unit in (teacher.block, teacher.root))
    passes = teacher.n_layer + (teacher.n_layer - 1 - concepts.sae_layer)
    yield Transfer("weights of the teacher's blocks", "replica", "all-gather", times * passes * block)
    yield Transfer("weights of the teacher's root", "replica", "all-gather", times * root, exposed=True)


def _metrics(config: RunConfig, layout: Layout) -> Iterator[Transfer]:
    size = FP64 * METRIC_SLOTS[config.objective.name]
    concepts = concepts_of(config)
    if concepts is not None:
        size += 2 * INT64 * (concepts.num_concepts + 1)
    yield Transfer("metrics", "dp", "all-reduce", size, exposed=True)
    if config.data.mask_documents or config.data.on_damage == "skip":
        yield Transfer("tokens that have a label", "dp", "all-reduce", INT64, exposed=True)
