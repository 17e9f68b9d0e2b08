"""The real training step on fake tensors, as rank 0 of a mesh of any size: what a plan is checked against.

Tensors have sizes but no memory and the process group answers every collective at once. Model, sharding,
kernels, optimizer and training step are those of a run, so its tensors and collectives are counted one
by one. Three things differ from a GPU: memory inside one operation is not seen, attention is the CPU's
flash kernel (it keeps the same tensors), and nothing takes time, so nothing overlaps.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.optim import AdamW
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trainer.kernels.chunks
import trainer.kernels.split_bf16
from data.batch import Batch
from launch.planning.forecast import Plan
from launch.planning.layout import Cluster
from launch.planning.traffic import Kind
from parallel.apply import apply_parallel, tensor_group
from parallel.collectives import sum_over_ranks
from parallel.engine import FsdpEngine
from parallel.mesh import Mesh, build_mesh, replica_mesh
from parallel.tensor import TensorGroup
from parallel.world import World
from trainer.concepts.extractor import TargetExtractor, shard_teacher
from trainer.concepts.sae import TopKSae
from trainer.concepts.states import DistributionExtractor
from trainer.config import ModelConfig
from trainer.metrics.sums import ConceptUsage, StepMetrics
from trainer.model.documents import Documents
from trainer.model.gpt2 import GPT2, TeacherHead
from trainer.model.student import build_student
from trainer.objective import CoCoMixLoss, DistillationLoss, NextToken, Objective
from trainer.optim import build_optimizer
from trainer.step import train_step

_KINDS: Mapping[str, Kind] = {
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall": "all-to-all",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What rank 0 held and exchanged; bytes."""

    parameters: int
    optimizer: int
    gradients: int
    peaks: Mapping[str, int]
    """Most tensors alive in each phase of the step: targets, forward, backward, optimizer."""
    traffic: Mapping[tuple[str, Kind], int]
    """Whole tensors of the collectives, by axis and kind."""
    moved: int
    """Bytes that operations read and write, one by one: without fusion, and without caches between them."""


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages alive, by their peak in each phase, and those of collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "build"
        self.alive = 0
        self.peaks: Counter[str] = Counter()
        self.collectives: Counter[tuple[str, Kind]] = Counter()
        """By name of the process group."""
        self.moved = 0
        self._sizes: dict[int, int] = {}
        self._muted = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and book its results; DTensors come back as what they do to local tensors."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._book_collective(func._schema.name.split("::")[1], args, out)
        if not self._muted:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._book(leaf.untyped_storage())
            if not func.is_view and "empty" not in func._schema.name:
                self.moved += _bytes_of((args, kwargs, out))
        return out

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Operations that no run performs."""
        before, self._muted = self._muted, True
        yield
        self._muted = before

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage was freed or allocated in place, as FSDP2 does."""
        if storage._cdata in self._sizes:
            self._add(storage.nbytes() - self._sizes[storage._cdata])
            self._sizes[storage._cdata] = storage.nbytes()

    def _book(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._end, key)
            self._add(storage.nbytes())

    def _end(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    def _add(self, size: int) -> None:
        self.alive += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.alive)

    def _book_collective(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        kinds = [kind for start, kind in _KINDS.items() if name.strip("_").startswith(start)]
        if kinds:
            tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
            size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.collectives[_group_name(args), kinds[0]] += size


def _bytes_of(tensors: Any) -> int:
    return sum(
        leaf.numel() * leaf.element_size() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)
    )


def _group_name(args: tuple[Any, ...]) -> str:
    """The process group among a collective's arguments: an object, or the last text."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return str(dist.ProcessGroup.unbox(argument).group_name)
    return str([argument for argument in args if isinstance(argument, str)][-1])


class _Phases(FsdpEngine):
    """The engine, telling the meter what comes."""

    def __init__(
        self, meter: Meter, model: nn.Module, optimizer: AdamW, mesh: Mesh, clip_norm: float
    ) -> None:
        super().__init__(model, optimizer, mesh, clip_norm)
        self.meter = meter
        self.gradients = 0

    def backward(self, loss: Tensor, *, last_microbatch: bool) -> None:
        self.meter.phase = "backward"
        super().backward(loss, last_microbatch=last_microbatch)
        self.meter.phase = "forward"

    def step(self, lr: float) -> Tensor:
        self.meter.phase = "optimizer"
        self.gradients = sum(_local_bytes(weight.grad) for weight in self.model.parameters())
        return super().step(lr)


class _MeteredExtractor(TargetExtractor):
    meter: Meter

    def __call__(self, input_ids: Tensor, labels: Tensor, documents: Documents | None = None) -> Tensor:
        self.meter.phase = "targets"
        targets = super().__call__(input_ids, labels, documents)
        self.meter.phase = "forward"
        return targets


class _MeteredDistribution(DistributionExtractor):
    meter: Meter

    def __call__(self, input_ids: Tensor, documents: Documents | None = None) -> TeacherHead:
        self.meter.phase = "targets"
        head = super().__call__(input_ids, documents)
        self.meter.phase = "forward"
        return head


def _local_bytes(tensor: Tensor | None) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return 0 if local is None else local.numel() * local.element_size()


def measure(plan: Plan) -> Measured:
    """Build the planned run on fake tensors and train one step that writes metrics."""
    config, meter = plan.config, Meter()
    parallel = replace(config.parallel, compile=False)
    with ExitStack() as stack:
        world = stack.enter_context(_fake_world(plan.layout.cluster))
        stack.enter_context(_as_on_a_gpu(meter))
        mesh = build_mesh(parallel, world)
        model = _student(plan)
        apply_parallel(model, model.plan, mesh, parallel, config.train.precision)
        replica = replica_mesh(mesh, world)
        frozen = _frozen(plan, replica, tensor_group(mesh))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(meter)
        model.to_empty(device="cpu")
        optimizer = build_optimizer(model, config.optim)
        engine = _Phases(meter, model, optimizer, mesh, config.optim.clip_norm)
        built = meter.moved
        _train_one_step(plan, mesh, engine, frozen)
        states = [state for entry in optimizer.state.values() for state in entry.values()]
        return Measured(
            parameters=sum(_local_bytes(weight) for weight in model.parameters()),
            optimizer=sum(_local_bytes(state) for state in states),
            gradients=engine.gradients,
            peaks=dict(meter.peaks),
            traffic=_by_axis(meter, mesh, replica, model),
            moved=meter.moved - built,
        )


def _student(plan: Plan) -> GPT2:
    assert plan.config.model is not None
    with torch.device("meta"):
        return build_student(plan.config.model, plan.config.insertion)


def _frozen(plan: Plan, replica: DeviceMesh, tp: TensorGroup) -> tuple[GPT2, TopKSae | None] | None:
    """Teacher and autoencoder on the meta device, split as the run splits them."""
    shape, concepts = plan.teacher, plan.concepts
    if shape is None:
        return None
    sizes = ModelConfig(
        d_model=shape.d_model,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        vocab_size=shape.vocab_size,
        n_positions=shape.n_positions,
    )
    dtype = torch.bfloat16 if shape.element == 2 else torch.float32
    with torch.device("meta"):
        teacher = GPT2(sizes).to(dtype).requires_grad_(False)
    if plan.config.parallel.shard_teacher:
        shard_teacher(teacher, replica, backward=plan.config.differentiates_teacher)
    if concepts is None:
        return teacher, None
    sae = TopKSae(shape.d_model, concepts.num_concepts, concepts.top_k, device="meta").requires_grad_(False)
    if plan.config.parallel.shard_sae:
        sae.split(tp)
    return teacher, sae


def _objective(plan: Plan, mesh: Mesh, meter: Meter, frozen: tuple[GPT2, TopKSae | None] | None) -> Objective:
    config, concepts = plan.config, plan.concepts
    end_id = 0 if config.data.mask_documents else None  # no fake token has a value
    if frozen is None and not config.reads_labels:
        return NextToken(end_id)
    extractor = None
    if frozen is not None:
        teacher, sae = frozen
        teacher.to_empty(device="cpu")
        if sae is None or concepts is None:
            assert config.kd is not None
            distribution = _MeteredDistribution(teacher, config.kd, tensor_group(mesh))
            distribution.meter = meter
            return DistillationLoss(distribution, end_id)
        sae.to_empty(device="cpu")
        extractor = _MeteredExtractor(teacher, sae, concepts, tensor_group(mesh))
        extractor.meter = meter
    assert concepts is not None
    weighting = (config.objective, config.train.steps, concepts.every)
    return CoCoMixLoss(extractor, *weighting, document_end=end_id)


def _batch(plan: Plan) -> Batch:
    """One rank's rows of a step."""
    rows, seq_len = plan.layout.rows_per_rank, plan.config.data.seq_len
    targets = None
    if plan.concepts is not None and plan.config.reads_labels:
        targets = torch.zeros(rows, seq_len, plan.concepts.num_targets, dtype=torch.uint16)
    return Batch(torch.zeros(rows, seq_len + 1, dtype=torch.int32), rows, targets)


def _train_one_step(
    plan: Plan, mesh: Mesh, engine: _Phases, frozen: tuple[GPT2, TopKSae | None] | None
) -> None:
    config, device = plan.config, torch.device("cpu")
    objective = _objective(plan, mesh, engine.meter, frozen)
    metrics = StepMetrics(objective.means, device)
    usage = None
    if plan.concepts is not None:
        usage = ConceptUsage(plan.concepts.num_concepts, device)
    engine.meter.phase = "forward"
    train_step(
        engine,
        objective,
        mesh,
        _batch(plan),
        step=0,
        microbatch_size=config.train.microbatch_size,
        tokens_per_step=config.tokens_per_step,
        rows_may_be_skipped=config.data.on_damage == "skip",
        lr=config.optim.lr,
        metrics=metrics,
        usage=usage,
        detail=True,
    )
    metrics.reduce(partial(sum_over_ranks, mesh=mesh))
    if usage is not None:
        usage.reduce(partial(sum_over_ranks, mesh=mesh))


def _by_axis(meter: Meter, mesh: Mesh, replica: DeviceMesh, model: nn.Module) -> dict[tuple[str, Kind], int]:
    axes: dict[str, str] = {replica.get_group().group_name: "replica"}
    if mesh.dp_group is not None:
        axes[mesh.dp_group.group_name] = "dp"
    names = ("dp_replicate", "dp_shard") if mesh.fsdp.ndim == 2 else ("dp_shard",)
    for dim, name in enumerate(names):
        axes[mesh.fsdp.get_group(dim).group_name] = name
    for name in _node_groups(model):
        axes[name] = "node"
    if mesh.tp is not None:
        axes[mesh.tp.get_group().group_name] = "tp"
    traffic: Counter[tuple[str, Kind]] = Counter()
    for (group, kind), size in meter.collectives.items():
        traffic[axes.get(group, group), kind] += size
    return dict(traffic)


def _node_groups(model: nn.Module) -> Iterator[str]:
    """Groups that share a copy of their weights within a node between forward and backward."""
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        if group is not None and group._use_post_forward_mesh and group.post_forward_mesh_info is not None:
            yield group.post_forward_mesh_info.shard_process_group.group_name


@contextmanager
def _fake_world(cluster: Cluster) -> Iterator[World]:
    """Rank 0 of a process group that exists in this process alone."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        # The fake backend has no time limits, and DTensor wonders about its answers.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        size, on_node = cluster.world_size, cluster.gpus_per_node
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        try:
            yield World(rank=0, size=size, local_rank=0, device=torch.device("cpu"), local_size=on_node)
        finally:
            dist.destroy_process_group()
            logging.disable(disabled)


@contextmanager
def _as_on_a_gpu(meter: Meter) -> Iterator[None]:
    """A GPU's chunks of logits and products; in-place frees are seen, DTensor's inference is not."""
    resize = torch.UntypedStorage.resize_
    infer = ShardingPropagator._propagate_tensor_meta_non_cached

    def metered_resize(storage: torch.UntypedStorage, size: int) -> Any:
        out = resize(storage, size)
        meter.resized(storage)
        return out

    def muted_inference(*args: Any, **kwargs: Any) -> Any:
        with meter.muted():
            return infer(*args, **kwargs)

    chunks = trainer.kernels.chunks
    with ExitStack() as stack:
        stack.enter_context(_replaced(chunks, "_CPU_ELEMENTS", chunks._CUDA_ELEMENTS))
        stack.enter_context(_replaced(chunks, "_CPU_BLOCK_ELEMENTS", chunks._CUDA_BLOCK_ELEMENTS))
        stack.enter_context(_replaced(trainer.kernels.split_bf16, "on_tensor_cores", lambda _: True))
        # Its products have copies that a GPU's have not.
        stack.enter_context(_replaced(torch.backends.mkldnn, "enabled", False))
        stack.enter_context(_replaced(torch.UntypedStorage, "resize_", metered_resize))
        stack.enter_context(
            _replaced(ShardingPropagator, "_propagate_tensor_meta_non_cached", muted_inference)
        )
        yield


@contextmanager
def _replaced(owner: object, name: str, value: Callable[..., Any] | int) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
