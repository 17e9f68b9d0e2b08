"""Spread a model over the mesh, and move whole weights in and out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.plan import ParallelPlan
from parallel.tensor import TensorGroup

Precision = Literal["fp32", "bf16"]


def apply_parallel(
    model: nn.Module, plan: ParallelPlan, mesh: Mesh, config: ParallelConfig, precision: Precision
) -> nn.Module:
    """Shard ``model`` in place with FSDP2: one unit per module of the plan, the root last.

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
        ValueError: The plan names a module that the model does not have.
    """
    if mesh.tp is not None:
        _split_tensors(model, plan, mesh.tp, tensor_group(mesh))
    policy = _mixed_precision(precision)
    modules = dict(model.named_modules())
    for name in plan.fsdp_units:
        if name not in modules:
            raise ValueError(f"the plan's unit {name!r} is no module of {type(model).__name__}")
        fully_shard(
            modules[name],
            mesh=mesh.fsdp,
            mp_policy=policy,
            reshard_after_forward=config.reshard_after_forward,
        )
    # Backward begins with the root's weights (head and loss): freeing them first saves nothing.
    fully_shard(model, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=False)
    for unit in _fsdp_modules(model):
        unit.set_gradient_divide_factor(1.0)
        # Otherwise a factor is a premultiplied sum, which gloo does not have; at 1.0 a plain sum
        # is the same and needs no scaling kernel either.
        unit.set_force_sum_reduction_for_comms(True)
    return model


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

    Raises:
        ValueError: ``init`` returned another shape.
    """
    model.to_empty(device=device)
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


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


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
