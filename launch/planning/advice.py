"""Which switch would save memory: every candidate is planned, and ordered by what it saves (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from launch.planning.forecast import Plan, make_plan
from launch.planning.layout import Cluster
from parallel.config import ParallelConfig
from trainer.config import ConceptsConfig, RunConfig


@dataclass(frozen=True, slots=True)
class Advice:
    """One switch and what it would do."""

    switch: str
    needed: int
    """Bytes of one GPU with it."""
    saved: int
    """Bytes less than without it."""
    fits: bool
    slowdown: float
    """Step time with it over that without."""


def advise(plan: Plan) -> list[Advice]:
    """Switches that save memory, the most effective first."""
    found = []
    for switch, config, cluster in _candidates(plan):
        try:
            other = make_plan(config, cluster, plan.assumptions)
        except ValueError:  # the batch, the heads or the ranks do not divide that way
            continue
        saved = plan.needed - other.needed
        if saved > 0:
            slowdown = other.timing.step_s / plan.timing.step_s
            found.append(Advice(switch, other.needed, saved, other.fits, slowdown))
    return sorted(found, key=lambda advice: -advice.saved)


def largest_microbatch(plan: Plan) -> int | None:
    """The largest power of two of ``train.microbatch_size`` that fits, ``None`` where not even 1 does."""
    best, size = None, 1
    while size <= plan.layout.rows_per_rank:
        train = replace(plan.config.train, microbatch_size=size)
        other = make_plan(replace(plan.config, train=train), plan.layout.cluster, plan.assumptions)
        if other.fits:
            best = size
        size *= 2
    return best


def _parallel_switches(parallel: ParallelConfig) -> Iterator[dict[str, Any]]:
    """Changes of the ``parallel:`` section that keep the layout."""
    more = {"none": ("selective", "full"), "selective": ("full",), "full": ()}
    yield from ({"recompute": how} for how in more[parallel.recompute])
    if parallel.reshard_after_forward != "always":
        yield {"reshard_after_forward": "always"}
    if parallel.reshard_after_forward == "never" and parallel.tp == 1:
        yield {"reshard_after_forward": "node"}
    if parallel.prefetch > 1:
        yield {"prefetch": 0}
    if not parallel.offload_parameters:
        yield {"offload_parameters": True, "offload_optimizer": True}


def _yaml(value: object) -> str:
    return str(value).lower()


def _candidates(plan: Plan) -> Iterator[tuple[str, RunConfig, Cluster]]:
    config, cluster, layout = plan.config, plan.layout.cluster, plan.layout
    train, parallel = config.train, config.parallel
    rest = "" if parallel.dp_shard == -1 else " --parallel.dp_shard=-1"
    for size in {layout.microbatch_size // 2, 1} - {0, layout.microbatch_size}:
        yield (
            f"--train.microbatch_size={size}",
            replace(config, train=replace(train, microbatch_size=size)),
            cluster,
        )
    # What several ranks do together cannot run ahead on a stream of its own.
    together, in_order = "", config
    extracted = plan.concepts if plan.teacher is not None else None
    if extracted is not None and extracted.ahead:
        together, in_order = " --concepts.ahead=false", _in_order(config, extracted)
        yield together.strip(), in_order, cluster
    for switches in _parallel_switches(parallel):
        text = " ".join(f"--parallel.{key}={_yaml(value)}" for key, value in switches.items())
        yield text, replace(config, parallel=replace(parallel, **switches)), cluster
    if parallel.dp_replicate > 1:
        whole = replace(parallel, dp_replicate=1, dp_shard=-1)
        yield f"--parallel.dp_replicate=1{rest}", replace(config, parallel=whole), cluster
    for tp in (2 * parallel.tp, 4 * parallel.tp):
        if tp <= cluster.gpus_per_node:
            split = replace(parallel, tp=tp, dp_shard=-1)
            yield f"--parallel.tp={tp}{rest}{together}", replace(in_order, parallel=split), cluster
    if extracted is not None and not parallel.shard_teacher and layout.replica > 1:
        split_teacher = replace(parallel, shard_teacher=True)
        switch = f"--parallel.shard_teacher=true{together}"
        yield switch, replace(in_order, parallel=split_teacher), cluster
    if extracted is not None and not parallel.shard_sae and layout.tp > 1:
        yield (
            "--parallel.shard_sae=true",
            replace(config, parallel=replace(parallel, shard_sae=True)),
            cluster,
        )
    if train.precision == "fp32":
        yield "--train.precision=bf16", replace(config, train=replace(train, precision="bf16")), cluster
    if extracted is not None:
        read = replace(extracted, source="cache", ahead=False)
        yield f"--concepts.source=cache{together}", replace(config, concepts=read), cluster
        if extracted.precision == "fp32":
            rounded = replace(extracted, precision="bf16")
            yield "--concepts.precision=bf16", replace(config, concepts=rounded), cluster
    if config.objective.name == "kd" and config.kd is not None and config.kd.precision == "fp32":
        yield "--kd.precision=bf16", replace(config, kd=replace(config.kd, precision="bf16")), cluster
    more = replace(cluster, num_nodes=2 * cluster.num_nodes)
    spread = replace(config, parallel=replace(parallel, dp_shard=-1))
    yield f"--nodes={more.num_nodes}{rest}", spread, more


def _in_order(config: RunConfig, concepts: ConceptsConfig) -> RunConfig:
    return replace(config, concepts=replace(concepts, ahead=False))
