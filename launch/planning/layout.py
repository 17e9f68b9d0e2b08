"""How a run lies on a cluster: axes, microbatches, and every parameter with its split (torch-free)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config import ConceptsConfig, Insertion, ModelConfig, PauseConfig, RunConfig
from trainer.model.padding import PADDING, padded


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines of a run."""

    num_nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        for key, value in (("--nodes", self.num_nodes), ("--gpus", self.gpus_per_node)):
            if value < 1:
                raise ValueError(f"{key}={value} must be at least 1")

    @property
    def world_size(self) -> int:
        """GPUs in all, one rank each."""
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class Parameter:
    """One weight of the student."""

    shape: tuple[int, ...]
    tensor_dim: int | None = None
    """Dimension that tensor-parallel ranks split; ``None`` where each of them holds all of it."""

    def elements(self, tp: int) -> int:
        """Elements on one tensor-parallel rank before FSDP shards them."""
        return math.prod(self.shape) // (1 if self.tensor_dim is None else tp)

    def shard_elements(self, tp: int, dp_shard: int) -> int:
        """Elements of rank 0's shard: FSDP2 cuts dimension 0 and rounds up."""
        rows = self.shape[0] // (tp if self.tensor_dim == 0 else 1)
        return -(-rows // dp_shard) * (self.elements(tp) // rows)


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that are gathered, and whose gradients are reduced, together."""

    parameters: tuple[Parameter, ...]

    def elements(self, tp: int) -> int:
        """Elements on one tensor-parallel rank when gathered."""
        return sum(parameter.elements(tp) for parameter in self.parameters)

    def shard_elements(self, tp: int, dp_shard: int) -> int:
        """Elements of rank 0's shard."""
        return sum(parameter.shard_elements(tp, dp_shard) for parameter in self.parameters)


@dataclass(frozen=True, slots=True)
class Layout:
    """A run on a cluster."""

    cluster: Cluster
    dp_replicate: int
    dp_shard: int
    tp: int
    shards_per_node: int
    """Ranks of a node among those that share one copy of the weights."""
    rows_per_rank: int
    """Sequences of one optimizer step that one rank (or tensor-parallel group) computes."""
    microbatch_size: int
    block: Unit
    """One block; all have the same weights."""
    num_blocks: int
    root: Unit
    """Embeddings, head, final norm and concept mixer."""

    @property
    def dp_size(self) -> int:
        """Shares of the batch."""
        return self.dp_replicate * self.dp_shard

    @property
    def replica(self) -> int:
        """Ranks that hold one model between them, and frozen weights that are split over all of them."""
        return self.dp_shard * self.tp

    @property
    def microbatches(self) -> tuple[int, ...]:
        """Sequences of each microbatch of a step."""
        full, rest = divmod(self.rows_per_rank, self.microbatch_size)
        return (self.microbatch_size,) * full + ((rest,) if rest else ())

    def units(self) -> Iterator[tuple[Unit, int]]:
        """Each kind of unit with its number."""
        yield self.block, self.num_blocks
        yield self.root, 1

    @property
    def gathered_elements(self) -> int:
        """Weights of one tensor-parallel rank, padding of vocabulary and dictionary included."""
        return sum(unit.elements(self.tp) * count for unit, count in self.units())

    @property
    def shard_elements(self) -> int:
        """Weights that rank 0 owns; the other ranks own at most as many."""
        return sum(unit.shard_elements(self.tp, self.dp_shard) * count for unit, count in self.units())

    @property
    def num_elements(self) -> int:
        """Weights of the whole model, padding included."""
        return sum(unit.elements(1) * count for unit, count in self.units())

    @property
    def num_tensors(self) -> int:
        """Weights as tensors."""
        return sum(len(unit.parameters) * count for unit, count in self.units())


def block_parameters(width: int) -> tuple[Parameter, ...]:
    """Weights of one GPT-2 block of width D."""
    whole = Parameter((width,))
    attention = (
        Parameter((3 * width, width), 0),
        Parameter((3 * width,), 0),
        Parameter((width, width), 1),
        whole,
    )
    mlp = (
        Parameter((4 * width, width), 0),
        Parameter((4 * width,), 0),
        Parameter((width, 4 * width), 1),
        whole,
    )
    return (whole, whole, *attention, whole, whole, *mlp)


def root_parameters(model: ModelConfig, insertion: Insertion | None) -> tuple[Parameter, ...]:
    """Weights outside the blocks: embeddings, final norm, untied head and what is inserted."""
    width, vocabulary = model.d_model, padded(model.vocab_size)
    whole = Parameter((width,))
    out = [Parameter((vocabulary, width), 0), Parameter((model.n_positions, width)), whole, whole]
    if not model.tied_head:
        out.append(Parameter((vocabulary, width), 0))
    if isinstance(insertion, PauseConfig):
        out.append(Parameter((1, width)))
    if isinstance(insertion, ConceptsConfig):
        dictionary = padded(insertion.num_concepts)
        out += [whole, Parameter((dictionary, width), 0), Parameter((dictionary,), 0)]
        if insertion.mix != "none":
            out += [Parameter((dictionary, width), 1), whole]
    return tuple(out)


def lay_out(config: RunConfig, cluster: Cluster) -> Layout:
    """Place a run on a cluster.

    Raises:
        ValueError: what the trainer refuses at its start, in its words: axes that do not multiply to the
            number of GPUs, a batch that the ranks do not divide, sizes that ``parallel.tp`` does not divide.
            Also an objective or an engine that no plan exists for.
    """
    if config.model is None or config.objective.name == "sae":
        raise ValueError(
            f"objective.name={config.objective.name} cannot be planned: it trains no student, and the "
            "formulas are those of one"
        )
    if config.objective.regression != "none":
        raise ValueError(
            f"objective.regression={config.objective.regression} cannot be planned: no formula knows its "
            "maps, which are whole on each rank; objective.regression=none can"
        )
    engine: str = config.parallel.engine
    if engine != "fsdp":
        raise ValueError(f"parallel.engine={engine} cannot be planned, only fsdp can")
    dp_shard = _dp_shard(config, cluster.world_size)
    _check_batch(config, config.parallel.dp_replicate * dp_shard)
    _check_tensor_parallel(config, config.model)
    rows = config.train.batch_size // (config.parallel.dp_replicate * dp_shard)
    return Layout(
        cluster=cluster,
        dp_replicate=config.parallel.dp_replicate,
        dp_shard=dp_shard,
        tp=config.parallel.tp,
        shards_per_node=config.parallel.shards_per_node(dp_shard, cluster.gpus_per_node),
        rows_per_rank=rows,
        microbatch_size=min(config.train.microbatch_size, rows),
        block=Unit(block_parameters(config.model.d_model)),
        num_blocks=config.model.n_layer,
        root=Unit(root_parameters(config.model, config.insertion)),
    )


def _dp_shard(config: RunConfig, world_size: int) -> int:
    parallel = config.parallel
    others = parallel.dp_replicate * parallel.tp
    dp_shard = world_size // others if parallel.dp_shard == -1 else parallel.dp_shard
    if dp_shard * others != world_size:
        raise ValueError(
            f"parallel.dp_replicate={parallel.dp_replicate} x dp_shard={parallel.dp_shard} "
            f"x tp={parallel.tp} does not fit the {world_size} processes of this run"
        )
    return dp_shard


def _check_batch(config: RunConfig, dp_size: int) -> None:
    if config.train.batch_size % dp_size:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} must be a multiple of the "
            f"{dp_size} data-parallel ranks"
        )


def _check_tensor_parallel(config: RunConfig, model: ModelConfig) -> None:
    tp = config.parallel.tp
    if PADDING % tp:
        raise ValueError(f"parallel.tp={tp} must divide {PADDING}, the padding of vocabulary and dictionary")
    for key, size in (("data.seq_len", config.data.seq_len), ("model.n_head", model.n_head)):
        if size % tp:
            raise ValueError(f"parallel.tp={tp} must divide {key}={size}")
