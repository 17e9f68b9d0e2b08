"""Spread a model over the mesh, and move whole weights in and out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from parallel.compile import compile_units
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.plan import ParallelPlan
from parallel.recompute import recompute
from parallel.tensor import TensorGroup

Precision = Literal["fp32", "bf16"]


def apply_parallel(
    model: nn.Module, plan: ParallelPlan, mesh: Mesh, config: ParallelConfig, precision: Precision
) -> nn.Module:
    """Spread ``model`` in place: tensor parallelism, recomputation, compilation, then FSDP2.

    Gradients are summed over the data-parallel ranks, not averaged: the loss arrives divided by
    the number of tokens of the global batch. The weights that the optimizer sees stay fp32; with
    ``bf16`` forward and backward read them as bf16, and gradients are accumulated and summed in
    fp32.

    Args:
        model: On the meta device; see :func:`materialize`.
        plan: The model's own plan.
        mesh: From :func:`parallel.mesh.build_mesh`.
        config: The ``parallel:`` section.
        precision: Precision of the computation.

    Returns:
        The same model.

    Raises:
        ValueError: The plan names a module that the model does not have, or the layout does not suit
            the model or the configuration.
    """
    modules = dict(model.named_modules())
    for name in plan.fsdp_units:
        if name not in modules:
            raise ValueError(f"the plan's unit {name!r} is no module of {type(model).__name__}")
    if mesh.tp is not None:
        _split_tensors(model, plan, mesh.tp, tensor_group(mesh))
    change_forward(model, plan, config)
    _shard(model, plan, mesh, config, precision)
    return model


def change_forward(model: nn.Module, plan: ParallelPlan, config: ParallelConfig) -> None:
    """Have the plan's units recompute activations and be compiled, in place, as configured."""
    # Inside a compiled unit, torch 2.13 saves the mesh of a recomputed DTensor as if it were a tensor
    # and fails. So tensor-parallel units are recomputed from outside, by the compiled forward.
    if config.compile and config.tp > 1:
        compile_units(model, plan)
    recompute(model, plan, config.recompute)
    if config.compile and config.tp == 1:
        compile_units(model, plan)


def _shard(
    model: nn.Module, plan: ParallelPlan, mesh: Mesh, config: ParallelConfig, precision: Precision
) -> None:
    """FSDP2: one unit per module of the plan, the root last."""
    shard = partial(
        fully_shard,
        mesh=mesh.fsdp,
        mp_policy=_mixed_precision(precision),
        offload_policy=_offload(mesh, config),
    )
    reshard = _resharding(len(plan.fsdp_units), mesh, config)
    units = [
        shard(model.get_submodule(name), reshard_after_forward=after)
        for name, after in zip(plan.fsdp_units, reshard, strict=True)
    ]
    # Backward begins with the root's weights (head and loss): freeing them first saves nothing.
    root = shard(model, reshard_after_forward=False)
    _prefetch(root, units, config.prefetch)
    for module in (*units, root):
        if mesh.dp_size == 1:
            # Told to divide by 1, FSDP2 would copy all gradients here; by itself it divides nothing.
            module.set_custom_reduce_scatter(cast(Any, _OneBuffer()))
            continue
        module.set_gradient_divide_factor(1.0)
        # Otherwise a factor is a premultiplied sum, which gloo does not have; at 1.0 a plain sum
        # is the same and needs no scaling kernel either.
        module.set_force_sum_reduction_for_comms(True)


class _OneBuffer:
    """What FSDP2 allocates where one rank alone reduces gradients: it sends and receives the same numbers.

    FSDP2 asks for a buffer to send, then for one to receive, and copies the first into the second.
    """

    def __init__(self) -> None:
        self._sent: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Every second call returns what the one before it did."""
        if self._sent is None:
            self._sent = torch.empty(size, dtype=dtype, device=device)
            return self._sent
        received, self._sent = self._sent, None
        return received


def _resharding(count: int, mesh: Mesh, config: ParallelConfig) -> Sequence[bool | int]:
    """What each unit does after its forward: keep its weights, free them, or share them in the node."""
    policy, dp_shard = config.reshard_after_forward, mesh.fsdp.size(-1)
    if policy == "node":
        return [config.shards_per_node(dp_shard, mesh.ranks_per_node)] * count
    if policy == "auto" and dp_shard > 1:
        return [True] * (count - 1) + [False] * min(count, 1)
    return [policy == "always"] * count


def _prefetch(root: FSDPModule, units: list[FSDPModule], count: int) -> None:
    """Have each unit gather the weights of the next ``count`` ones, in forward and in backward."""
    # The root begins a forward, but not a backward: that it does once per output that has a gradient,
    # the second time when the last units are done. FSDP2 itself gathers the last unit there.
    for order, prefetch in (
        ([root, *units], FSDPModule.set_modules_to_forward_prefetch),
        (units[::-1], FSDPModule.set_modules_to_backward_prefetch),
    ):
        for index, module in enumerate(order):
            if following := order[index + 1 : index + 1 + count]:
                prefetch(module, following)


def _offload(mesh: Mesh, config: ParallelConfig) -> OffloadPolicy:
    if not config.offload_parameters:
        return OffloadPolicy()
    # Only pinned memory is copied beside the computation, and only to a GPU.
    return CPUOffloadPolicy(pin_memory=mesh.fsdp.device_type == "cuda")


def shard_frozen(
    model: nn.Module, plan: ParallelPlan, ranks: DeviceMesh, methods: Iterable[str], *, backward: bool
) -> None:
    """Split a frozen model's weights over ``ranks`` in place; a unit is whole only while it computes.

    Args:
        model: With its weights, none of which wants a gradient.
        plan: The model's own plan.
        ranks: 1-D mesh; each of them calls the model equally often, each with its own rows.
        methods: What is called beside ``forward`` from outside and reads weights of the root.
        backward: Each forward is followed by a backward, to an input. Then the root stays whole
            from the first call until that backward ends, instead of being gathered by every call.
    """
    if ranks.size() == 1:
        return  # FSDP would keep a second copy of what is in work
    modules = dict(model.named_modules())
    for name in plan.fsdp_units:
        fully_shard(modules[name], mesh=ranks, reshard_after_forward=True)
    fully_shard(model, mesh=ranks, reshard_after_forward=not backward)
    for name in methods:
        register_fsdp_forward_method(model, name)


def tensor_group(mesh: Mesh) -> TensorGroup:
    """The ranks that compute one share of the batch together."""
    return TensorGroup(None if mesh.tp is None else mesh.tp.get_group())


def _split_tensors(model: nn.Module, plan: ParallelPlan, tp: DeviceMesh, group: TensorGroup) -> None:
    """Make every parameter a DTensor over the tensor-parallel ranks, and tell the modules who they are.

    Also those that stay whole: clipping and checkpoints want all parameters on one mesh.
    """
    for key, size in plan.tensor_divides.items():
        if size % tp.size():
            raise ValueError(f"parallel.tp={tp.size()} must divide {key}={size}")
    for module_name, module in model.named_modules():
        if hasattr(module, "tp"):
            module.tp = group
        for name, parameter in module.named_parameters(recurse=False):
            dim = _split_dim(plan, f"{module_name}.{name}")
            placement = Replicate() if dim is None else Shard(dim)
            sharded = distribute_tensor(parameter, tp, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(sharded))


def _split_dim(plan: ParallelPlan, name: str) -> int | None:
    dims = [dim for end, dim in plan.tensor_dims.items() if f".{name}".endswith(f".{end}")]
    return dims[0] if dims else None


def _mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    # Inputs are never cast on the way into a unit: a residual stream or a loss input that a model
    # keeps in fp32 would be rounded silently. A model casts where it means to; where it forgets
    # to, the matrix product raises.
    if precision == "fp32":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def materialize(
    model: nn.Module,
    device: torch.device,
    init: Callable[[str, torch.Size, torch.dtype], Tensor],
    *,
    offload: bool = False,
) -> None:
    """Give a meta model memory on ``device`` and weights that do not depend on the layout.

    Every rank makes each whole tensor on the CPU, one at a time, and keeps its own shard: the same
    ``init`` gives the same weights on 1 or 64 ranks, and nothing is communicated.

    Args:
        model: From :func:`apply_parallel`. Its ``reset_buffers()``, if it has one, fills the
            buffers that no checkpoint holds.
        device: Where the model computes.
        init: ``init(name, shape, dtype)`` returns the whole CPU tensor of a parameter or persistent
            buffer. It must be a function of its arguments alone.
        offload: Parameters lie on the CPU, as ``parallel.offload_parameters`` wants them.

    Raises:
        ValueError: ``init`` returned another shape.
    """
    model.to_empty(device="cpu" if offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for name, target in _named_state(model):
        _write(name, target, init(name, target.shape, target.dtype))
    reset_buffers = getattr(model, "reset_buffers", None)
    if reset_buffers is not None:
        reset_buffers()


def load_full_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the model's shards.

    Args:
        model: Sharded or not, with memory.
        tensors: Whole tensors by the model's own names, exactly those of its parameters and
            persistent buffers; each is read once, so a lazy mapping keeps one in memory at a time.

    Raises:
        ValueError: A name is missing or unknown, or a shape differs. Nothing was changed if it is
            a name.
    """
    targets = dict(_named_state(model))
    missing, unknown = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(f"weights do not match the model: missing {missing}, unknown {unknown}")
    for name, target in targets.items():
        _write(name, target, tensors[name])


def gather_full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's whole weights on rank 0; a collective over all ranks.

    Returns:
        On rank 0 fp32 CPU copies (integer tensors keep their dtype) by name, in the model's order;
        elsewhere an empty dict. One whole tensor at a time is on each device.
    """
    full: dict[str, Tensor] = {}
    is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name, tensor in _named_state(model):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_main:
            dtype = torch.float32 if whole.is_floating_point() else whole.dtype
            full[name] = whole.to(device="cpu", dtype=dtype, copy=True)
    return full


def _named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers by name, sharded ones as DTensors that share memory."""
    # FSDP's own hook on state_dict() frees gathered weights first.
    yield from model.state_dict().items()


@torch.no_grad()
def _write(name: str, target: Tensor, full: Tensor) -> None:
    """Copy the whole tensor ``full`` into ``target``, or into the shard of it that this rank holds."""
    if full.shape != target.shape:
        raise ValueError(f"{name} has shape {tuple(full.shape)}, but the model's is {tuple(target.shape)}")
    if not isinstance(target, DTensor):
        target.copy_(full)
        return
    local = full.detach().to(device=target.device, dtype=target.dtype)
    # Each rank cuts its shard from its own copy, which costs no communication. (distribute_tensor
    # does not know the strided shards of FSDP over tensor parallelism.)
    whole = DTensor.from_local(local, target.device_mesh, [Replicate()] * target.device_mesh.ndim)
    target.to_local().copy_(whole.redistribute(placements=target.placements).to_local())
