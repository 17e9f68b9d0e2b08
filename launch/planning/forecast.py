"""From memory, traffic and FLOPs to a verdict, a step time and a bill (torch-free)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launch.planning.blocks import FP32, interleaves
from launch.planning.book import Moment
from launch.planning.layout import Cluster, Layout, lay_out
from launch.planning.memory import plan_memory
from launch.planning.teacher import Teacher, teacher_of
from launch.planning.traffic import Transfer, gathered_again, plan_traffic, sent
from trainer.config import ConceptsConfig, RunConfig
from trainer.flops import (
    MLP_EXPANSION,
    FlopsPerToken,
    SaeShape,
    flops_per_token,
    parameter_count,
    peak_flops,
)

GIB = 2**30
BYTES_OF_ADAM = 28
"""Of one weight's update: weight, gradient and two moments are read, all but the gradient written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a plan cannot know; every one is printed."""

    gpu: str = "H100"
    """Name that ``trainer.flops`` knows."""
    gpu_memory_gb: float = 80.0
    """Memory of a GPU in units of 2**30 bytes, as vendors and drivers mean it."""
    intra_gbps: float = 450.0
    """Bandwidth of a GPU to others in its node, one direction, 1e9 bytes per second."""
    inter_gbps: float = 50.0
    """Bandwidth of a GPU to other nodes, one direction."""
    host_gbps: float = 25.0
    """Bandwidth between a GPU and its share of the host's memory, one direction; for what is offloaded."""
    mfu: float = 0.45
    """Share of the peak that the computation alone reaches."""
    context_gib: float = 2.0
    """CUDA context, NCCL's buffers and cuBLAS' workspace."""
    fragmentation: float = 0.05
    """Share of the tensors that the allocator loses to fragmentation."""
    gpu_hour_price: float | None = None
    """Price of one GPU for an hour, any currency."""

    def __post_init__(self) -> None:
        for key in ("gpu_memory_gb", "intra_gbps", "inter_gbps", "host_gbps", "mfu"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"--{key}={getattr(self, key)} must be above 0")
        if self.mfu > 1:
            raise ValueError(f"--mfu={self.mfu} must be at most 1")
        if self.gpu_hour_price is not None and not 0 <= self.gpu_hour_price < math.inf:
            raise ValueError(f"--gpu_hour_price={self.gpu_hour_price} must be at least 0")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one optimizer step."""

    compute_s: float
    exposed_s: float
    """Communication that the computation waits for."""
    beside_s: float
    """Communication that runs beside the computation."""

    @property
    def step_s(self) -> float:
        """Communication beside the computation costs what exceeds it."""
        return max(self.compute_s, self.beside_s) + self.exposed_s


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is known of a run before it starts."""

    config: RunConfig
    layout: Layout
    teacher: Teacher | None
    assumptions: Assumptions
    moments: tuple[Moment, ...]
    traffic: tuple[Transfer, ...]
    flops: FlopsPerToken
    timing: Timing

    @property
    def peak(self) -> Moment:
        """The moment with most memory."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def reserve(self) -> int:
        """Bytes for what is no tensor and no kernel's workspace."""
        assumed = self.assumptions
        return round(assumed.context_gib * GIB + assumed.fragmentation * self.peak.total)

    @property
    def needed(self) -> int:
        """Bytes of one GPU at the peak."""
        return self.peak.total + self.reserve

    @property
    def fits(self) -> bool:
        """Whether a GPU holds it."""
        return self.needed <= self.assumptions.gpu_memory_gb * GIB

    @property
    def tokens_per_s(self) -> float:
        """Of the whole cluster."""
        return self.config.tokens_per_step / self.timing.step_s

    @property
    def run_hours(self) -> float:
        """Training time of all steps; validation, samples and restarts are not in it."""
        return self.config.train.steps * self.timing.step_s / 3600

    @property
    def gpu_hours(self) -> float:
        """Of the whole cluster."""
        return self.run_hours * self.layout.cluster.world_size

    @property
    def concepts(self) -> ConceptsConfig | None:
        """The student's concept path, ``None`` where no concepts are predicted."""
        return self.config.predicted_concepts

    @property
    def num_parameters(self) -> int:
        """Weights of the student without padding."""
        assert self.config.model is not None
        return sum(parameter_count(self.config.model, self.config.insertion).values())

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and Adam's two moments in fp32, padding included."""
        return 3 * FP32 * self.layout.num_elements

    @property
    def checkpoints_kept(self) -> int:
        """Most checkpoints on disk at once: kept, best and the one being written."""
        keep, steps = self.config.checkpoint, self.config.train.steps
        forever = steps // keep.keep_every_steps if keep.keep_every_steps else 0
        return keep.keep_last + forever + 2


def make_plan(config: RunConfig, cluster: Cluster, assumptions: Assumptions) -> Plan:
    """Plan a run.

    Raises:
        ValueError: the run does not fit the cluster's shape (not its memory), or the GPU is unknown.
    """
    layout = lay_out(config, cluster)
    assert config.model is not None
    concepts = config.predicted_concepts
    teacher = teacher_of(config)
    flops = flops_per_token(
        config.model,
        config.insertion,
        config.data.seq_len,
        None if teacher is None else teacher.shape,
        None if concepts is None or teacher is None else SaeShape(concepts.num_concepts, concepts.top_k),
        concept_loss=config.objective.concept_weight > 0,
    )
    traffic = plan_traffic(config, layout, teacher)
    return Plan(
        config=config,
        layout=layout,
        teacher=teacher,
        assumptions=assumptions,
        moments=plan_memory(config, layout, teacher),
        traffic=traffic,
        flops=flops,
        timing=_timing(config, layout, flops, traffic, assumptions),
    )


def _timing(
    config: RunConfig,
    layout: Layout,
    flops: FlopsPerToken,
    traffic: tuple[Transfer, ...],
    assumptions: Assumptions,
) -> Timing:
    peak = peak_flops(assumptions.gpu, config.train.precision)
    if peak is None:
        raise ValueError(
            f"--gpu={assumptions.gpu}: its {config.train.precision} peak is not in trainer/flops.py"
        )
    cluster_flops = layout.cluster.world_size * peak * assumptions.mfu
    seconds = {True: 0.0, False: 0.0}
    for transfer in traffic:
        seconds[transfer.exposed] += transfer_seconds(transfer, layout, assumptions)
    # Not in the MFU's numerator, but it takes its time.
    work = flops.total + recomputed_flops(config, flops)
    compute = work * config.tokens_per_step / cluster_flops
    if config.parallel.offload_parameters:
        seconds[True] += BYTES_OF_ADAM * layout.shard_elements / (assumptions.host_gbps * 1e9)
        seconds[False] += copied_bytes(config, layout) / (assumptions.host_gbps * 1e9)
    return Timing(compute, seconds[True], seconds[False])


def recomputed_flops(config: RunConfig, flops: FlopsPerToken) -> int:
    """FLOPs per token of matrix products that backward runs again: blocks but for their last product."""
    if config.parallel.recompute != "full":
        return 0
    assert config.model is not None
    positions, insertion = float(config.model.n_layer), config.insertion
    if insertion is not None and interleaves(insertion):
        positions += (positions - 1 - insertion.insert_layer) / insertion.every
    forward = sum(part.forward for name, part in flops.parts.items() if name.startswith("blocks"))
    return forward - round(positions * 2 * MLP_EXPANSION * config.model.d_model**2)


def copied_bytes(config: RunConfig, layout: Layout) -> int:
    """Bytes of offloaded shards that go to the GPU before each all-gather, and of gradients that return."""
    block, root = (unit.shard_elements(layout.tp, layout.dp_shard) for unit in (layout.block, layout.root))
    gathers = layout.num_blocks + gathered_again(config, layout)
    return FP32 * (len(layout.microbatches) * (gathers * block + root) + layout.shard_elements)


def transfer_seconds(transfer: Transfer, layout: Layout, assumptions: Assumptions) -> float:
    """The slower of the two links; latency is neglected."""
    out = sent(transfer, layout)
    return max(
        out.intra_node / (assumptions.intra_gbps * 1e9), out.inter_node / (assumptions.inter_gbps * 1e9)
    )
