"""Bytes that one GPU exchanges in an optimizer step, by mesh axis and kind of collective (torch-free).

A collective's ``buffer`` is its whole tensor: the gathered one, the one before a reduce-scatter, the one
that is summed. Of it every rank of n sends (n - 1) / n, in an all-reduce twice that: ring algorithms,
as nccl-tests' "bus bandwidth" counts them. A step that writes metrics is meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from launch.planning.blocks import FP32, INT64, interleaves
from launch.planning.layout import Layout, Unit
from launch.planning.teacher import Teacher
from trainer.config import ConceptsConfig, Insertion, ModelConfig, RunConfig

Axis = Literal["dp_shard", "node", "dp_replicate", "tp", "dp", "replica"]
Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]

FP64 = 8
METRIC_SLOTS = {"ntp": 2, "pause": 2, "kd": 4, "cocomix": 7}
"""Sums that an objective reports; without a concept loss it is next-token prediction."""


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
    element = 2 if config.train.precision == "bf16" else FP32
    found = [
        *_weights(config, layout, element),
        *_gradients(layout),
        *_tensor_parallel(config, config.model, layout, element),
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
    config: RunConfig, model: ModelConfig, layout: Layout, element: int
) -> Iterator[Transfer]:
    """Sequence parallelism around every sublayer, and what the heads exchange per token."""
    seq_len = config.data.seq_len
    tokens = layout.rows_per_rank * seq_len
    position = model.d_model * element
    gathered, summed = _sublayers(model, config.insertion, tokens)
    # Backward gathers where forward summed, and sums where forward gathered.
    both = gathered + summed
    again = _recomputed(model, config, tokens)
    yield Transfer("activations", "tp", "all-gather", (both + again[0]) * position, exposed=True)
    yield Transfer("activations", "tp", "reduce-scatter", (both + again[1]) * position, exposed=True)
    numbers = 2
    if config.objective.name == "kd":
        assert config.kd is not None
        numbers = 3 if config.kd.temperature == 1 else 4
        yield Transfer("divergence", "tp", "all-reduce", FP32 * len(layout.microbatches), exposed=True)
    exchange = numbers * FP32 * tokens * layout.tp
    yield Transfer("LM head's exchange", "tp", "all-gather", exchange, exposed=True)
    whole = sum(
        parameter.elements(1) * count
        for unit, count in layout.units()
        for parameter in unit.parameters
        if parameter.tensor_dim is None
    )
    size = FP32 if len(layout.microbatches) > 1 else element
    yield Transfer("gradients of whole weights", "tp", "all-reduce", size * whole, exposed=True)
    if config.predicted_concepts is not None:
        learns = config.objective.concept_weight > 0
        vectors = tokens // config.predicted_concepts.every
        yield from _concept_path(model, config.predicted_concepts, layout, vectors, element, learns=learns)


def _sublayers(model: ModelConfig, insertion: Insertion | None, tokens: int) -> tuple[int, int]:
    """Positions that forward gathers and sums, embedding and LM head included."""
    lower, upper, last = _positions(model, insertion, tokens)
    # The last block reads the mixed stream and updates T positions of it; the mixer gathers its input.
    mixer = tokens // insertion.every if isinstance(insertion, ConceptsConfig) else 0
    gathered = 2 * lower + 2 * upper + last + (tokens if last else 0) + mixer + tokens
    summed = 2 * lower + 2 * upper + (2 * tokens if last else 0) + tokens
    return gathered, summed


def _positions(model: ModelConfig, insertion: Insertion | None, tokens: int) -> tuple[int, int, int]:
    """Positions of all blocks with T, of those with the mixed stream, and of the last one, if it has that."""
    if insertion is None or not interleaves(insertion):
        return model.n_layer * tokens, 0, 0
    mixed = tokens + tokens // insertion.every
    return insertion.insert_layer * tokens, (model.n_layer - 1 - insertion.insert_layer) * mixed, mixed


def _recomputed(model: ModelConfig, config: RunConfig, tokens: int) -> tuple[int, int]:
    """Positions that backward gathers and sums again; recomputation stops before a block's last sum."""
    insertion, how = config.insertion, config.parallel.recompute
    lower, upper, last = _positions(model, insertion, tokens)
    if how == "none":
        return 0, 0
    if how == "selective":
        # Rows that are not every other one are chosen by an index, which is known behind the attention's sum.
        return 0, tokens if last and last != 2 * tokens else 0
    if not last:
        return 2 * lower, lower
    return 2 * lower + 2 * upper + last + tokens, lower + upper + tokens


def _concept_path(
    model: ModelConfig, concepts: ConceptsConfig, layout: Layout, vectors: int, element: int, *, learns: bool
) -> Iterator[Transfer]:
    """The dictionary's and the target ids' exchange, of the tokens that have a concept."""
    head = FP32 * (2 + 2 * concepts.top_k) * vectors * layout.tp
    yield Transfer("concept head's exchange", "tp", "all-gather", head, exposed=True)
    if learns:
        ranks = (FP32 + INT64) * concepts.num_targets * vectors
        yield Transfer("ranks of the targets", "tp", "all-reduce", ranks, exposed=True)
    if concepts.mix == "none":
        return
    values = element * concepts.top_k * vectors
    yield Transfer("concept head's exchange", "tp", "all-reduce", values, exposed=True)
    columns = 2 * element * vectors * model.d_model // layout.tp
    yield Transfer("mixed concepts", "tp", "all-to-all", columns, exposed=True)


def _targets(config: RunConfig, layout: Layout, teacher: Teacher | None) -> Iterator[Transfer]:
    """What a teacher's readers exchange: weights of a split teacher, then states, residuals or target ids."""
    if teacher is None:
        return
    parallel, seq_len = config.parallel, config.data.seq_len
    # Each rank computes an equal share of the rows, where need be one of them twice.
    rows = sum(-(-size // layout.tp) * layout.tp for size in layout.microbatches) * seq_len
    concepts = config.predicted_concepts
    if concepts is None:
        states = teacher.element * teacher.d_model * rows
        yield Transfer("final states of the teacher", "tp", "all-gather", states, exposed=True)
        return
    if parallel.shard_teacher:
        yield from _teacher_weights(config, concepts, layout, teacher)
    if not parallel.shard_sae:
        size = 2 * concepts.num_targets * rows // concepts.every
        yield Transfer("target ids", "tp", "all-gather", size, exposed=True)
        return
    parts = 2 if config.differentiates_teacher else 1
    residuals = parts * teacher.element * teacher.d_model * rows // concepts.every
    yield Transfer("residuals and their gradients", "tp", "all-gather", residuals, exposed=True)
    scores = FP32 * concepts.top_k * layout.rows_per_rank * seq_len // concepts.every
    candidates = 2 * layout.tp * scores
    yield Transfer("active latents", "tp", "all-gather", candidates, exposed=True)
    if config.differentiates_teacher:
        yield Transfer("attribution", "tp", "all-reduce", scores, exposed=True)


def _teacher_weights(
    config: RunConfig, concepts: ConceptsConfig, layout: Layout, teacher: Teacher
) -> Iterator[Transfer]:
    """Each microbatch gathers root and blocks once; with gradients those above the residual twice."""
    ranks, times = layout.replica, teacher.element * len(layout.microbatches)
    block, root = (unit.shard_elements(1, ranks) * ranks for unit in (teacher.block, teacher.root))
    passes = concepts.sae_layer + 1
    if config.differentiates_teacher:
        passes = teacher.n_layer + (teacher.n_layer - 1 - concepts.sae_layer)
    yield Transfer("weights of the teacher's blocks", "replica", "all-gather", times * passes * block)
    yield Transfer("weights of the teacher's root", "replica", "all-gather", times * root, exposed=True)


def _metrics(config: RunConfig, layout: Layout) -> Iterator[Transfer]:
    concepts = config.predicted_concepts
    learns = concepts is None or config.objective.concept_weight > 0
    size = FP64 * METRIC_SLOTS[config.objective.name if learns else "ntp"]
    if concepts is not None:
        size += 2 * INT64 * (concepts.num_concepts + 1)
    yield Transfer("metrics", "dp", "all-reduce", size, exposed=True)
    if config.data.mask_documents or config.data.on_damage == "skip":
        yield Transfer("tokens that have a label", "dp", "all-reduce", INT64, exposed=True)
