"""The DeepSpeed engine (ZeRO stages 1 to 3); the only importer of deepspeed.

DeepSpeed cuts flattened weights and optimizer state into one contiguous part per rank, differently per
stage and world size. Checkpoints therefore never hold its own files, but the form of
:meth:`parallel.engine.Engine.state_dict`: whole tensors by parameter name, each split by rows over the
ranks. A run moves through it between stages, world sizes and FSDP2, bit by bit.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from parallel.apply import Precision, materialize
from parallel.config import ParallelConfig
from parallel.engine import allocate_state, require_same_names
from parallel.mesh import Mesh

VERSION = "0.19.8"
"""The one release that this module knows the inside of."""

_MOMENTS = ("exp_avg", "exp_avg_sq")

_WHOLE_BELOW = 100_000
"""Stage 3 leaves smaller parameters whole on every rank: gathering them costs more than it saves."""


@dataclass(frozen=True)
class _Fragment:
    """This rank's contiguous part of one flattened parameter, in the optimizer's own memory."""

    shape: torch.Size
    """Of the whole parameter."""
    start: int
    """First element of the part."""
    weight: Tensor
    """(n,) fp32 master weights; n is 0 on a rank that holds nothing of the parameter."""
    moments: Mapping[str, Tensor]
    """(n,) fp32 optimizer state by its name."""
    step: Tensor
    """() fp32 number of updates; all parameters of one flat buffer share it."""

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a whole tensor of the parameter's shape."""
        return whole.flatten()[self.start : self.start + self.weight.numel()]


class ZeroEngine:
    """DeepSpeed's ZeRO optimizer around the caller's AdamW.

    :meth:`step` waits for the device, because DeepSpeed decides on the host whether the gradients are
    finite. Stages 2 and 3 reduce the gradients of every microbatch, because no rank keeps whole ones.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.AdamW],
        init: Callable[[str, torch.Size, torch.dtype], Tensor],
        mesh: Mesh,
        config: ParallelConfig,
        *,
        precision: Precision,
        clip_norm: float,
        device: torch.device,
    ) -> None:
        """Build the engine; a collective over all ranks.

        Args:
            model: On the meta device. Every rank makes all of it once, before it is partitioned.
            build_optimizer: Makes an AdamW over the model's parameters.
            init: As in :func:`parallel.apply.materialize`.
            mesh: The run's mesh; each rank has its own share of the batch.
            config: The ``parallel:`` section.
            precision: Of the computation; master weights, optimizer state and reductions are fp32.
            clip_norm: Largest global gradient norm; 0 does not clip.
            device: Where the model computes.

        Raises:
            ValueError: deepspeed is not installed, or is another version.
        """
        deepspeed = load_deepspeed(device)
        assert mesh.dp_size == dist.get_world_size(), "the configuration allows no other axis"
        materialize(model, device, init)
        parameters = dict(model.named_parameters())
        self._names = tuple(model.state_dict())
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.optimizer = build_optimizer(model)
        self._group = _share_group(config.timeout_s)
        # Deepspeed insists on it, also for a run of one rank without a launcher.
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=_settings(config, precision, clip_norm, pin_memory=device.type == "cuda"),
                dist_init_required=False,
            )
        self._device = device
        self._stage = config.zero_stage
        # Stage 3 has no summing reduction: its mean over the ranks is undone beforehand.
        self._loss_factor = mesh.dp_size if config.zero_stage == 3 else 1
        self._cpu_mesh = DeviceMesh("cpu", list(range(mesh.dp_size)))
        allocate_state(self.optimizer, self._flat_weights())
        self._fragments = {name: self._fragment(name, parameter) for name, parameter in parameters.items()}
        if precision == "bf16":
            self._restore_masters(init)

    @property
    def model(self) -> nn.Module:
        """DeepSpeed's wrapper: only its forward gathers what stage 3 has partitioned."""
        wrapper: nn.Module = self._engine
        return wrapper

    def backward(self, loss: Tensor, *, last_microbatch: bool) -> None:
        """See :meth:`parallel.engine.Engine.backward`."""
        self._engine.backward(loss * self._loss_factor, scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor:
        """See :meth:`parallel.engine.Engine.step`; a norm that is not finite is returned as infinity."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._device)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """See :meth:`parallel.engine.Engine.state_dict`; a copy on the CPU, and a collective."""
        model: dict[str, Any] = dict(self._buffers())
        optimizer: dict[str, Any] = {}
        for name, fragment in self._fragments.items():
            model[name] = self._to_rows(fragment, fragment.weight)
            moments = {key: self._to_rows(fragment, moment) for key, moment in fragment.moments.items()}
            optimizer[name] = {"step": fragment.step.to("cpu", copy=True), **moments}
        return {"model": model, "optimizer": optimizer}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`parallel.engine.Engine.load_state_dict`; a collective.

        Raises:
            ValueError: The state's parameters are not this model's, or were updated a different
                number of times: ZeRO keeps one counter for all of them.
        """
        require_same_names("model", dict.fromkeys(self._names), state["model"])
        require_same_names("optimizer", self._fragments, state["optimizer"])
        steps = sorted({float(entry["step"]) for entry in state["optimizer"].values()})
        if len(steps) > 1:
            raise ValueError(f"the optimizer state has steps {steps[0]:g} to {steps[-1]:g}: ZeRO needs one")
        for name, buffer in self._buffers().items():
            buffer.copy_(state["model"][name])
        for name, fragment in self._fragments.items():
            self._from_rows(fragment, fragment.weight, state["model"][name])
            entry = state["optimizer"][name]
            fragment.step.copy_(entry["step"])
            for key, moment in fragment.moments.items():
                self._from_rows(fragment, moment, entry[key])
        self._refresh_model()

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        """See :meth:`parallel.engine.Engine.gather`."""
        is_main = dist.get_rank() == 0
        buffers, full = self._buffers(), {}
        for name in self._names:
            fragment = self._fragments.get(name)
            tensor = buffers[name] if fragment is None else self._collect(fragment, fragment.weight)
            if is_main:
                full[name] = tensor.to("cpu", copy=True)
        return full

    def close(self) -> None:
        """See :meth:`parallel.engine.Engine.close`; also lets go of what deepspeed keeps globally."""
        from deepspeed.utils import groups

        with _quiet():
            self._engine.destroy()
        groups._WORLD_GROUP = None
        self._fragments.clear()
        del self._engine
        gc.collect()

    # This rank's part of a parameter

    def _flat_weights(self) -> list[Tensor]:
        """The flat fp32 buffers that the optimizer updates."""
        if self._stage == 3:
            flat: list[Tensor] = self._engine.optimizer.fp32_partitioned_groups_flat
            return flat
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    def _fragment(self, name: str, parameter: nn.Parameter) -> _Fragment:
        shape = self._shapes[name]
        if self._stage == 3:
            zero = self._engine.optimizer
            index, offset, part = zero.grad_position[zero.get_param_id(parameter)]
            start = min(dist.get_rank() * part, shape.numel())
            length = min(part, shape.numel() - start)  # the last part is padded
        elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            index, start = mapping.param_group_index, mapping.lp_fragment_address.start
            offset, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        else:
            index = offset = start = length = 0
        flat = self._flat_weights()[index]
        state = self.optimizer.state[flat]
        return _Fragment(
            shape=shape,
            start=start,
            weight=flat.detach().narrow(0, offset, length),
            moments={key: state[key].narrow(0, offset, length) for key in _MOMENTS},
            step=state["step"],
        )

    def _buffers(self) -> dict[str, Tensor]:
        """The persistent buffers, which every rank holds."""
        names = (name for name in self._names if name not in self._shapes)
        return {name: self._engine.module.get_buffer(name) for name in names}

    # Whole tensors

    def _whole(self, shape: torch.Size, start: int, part: Tensor) -> Tensor:
        """The whole fp32 tensor, on the device; each rank holds the flat ``part`` from ``start`` on."""
        # Summed as integers, which keeps every bit: 0.0 + -0.0 would lose a sign.
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=self._device)
        bits[start : start + part.numel()] = part.contiguous().view(torch.int32)
        dist.all_reduce(bits, group=self._group)
        return bits.view(torch.float32).view(shape)

    def _collect(self, fragment: _Fragment, part: Tensor) -> Tensor:
        return self._whole(fragment.shape, fragment.start, part)

    def _to_rows(self, fragment: _Fragment, part: Tensor) -> DTensor:
        """The whole tensor split by rows over the ranks, as FSDP splits it; each rank's rows on its CPU."""
        whole = self._collect(fragment, part)
        local = whole[self._rows(fragment.shape)].to("cpu", copy=True)
        return DTensor.from_local(
            local, self._cpu_mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _from_rows(self, fragment: _Fragment, part: Tensor, rows: DTensor) -> None:
        """Copy this rank's part of what :meth:`_to_rows` returned into ``part``."""
        first = self._rows(fragment.shape).start * fragment.shape[1:].numel()
        whole = self._whole(fragment.shape, first, rows.to_local().flatten())
        part.copy_(fragment.cut(whole))

    def _rows(self, shape: torch.Size) -> slice:
        """This rank's rows, as ``Shard(0)`` counts them."""
        rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        per_rank = -(-shape[0] // size)
        return slice(min(rank * per_rank, shape[0]), min((rank + 1) * per_rank, shape[0]))

    # Weights in

    @torch.no_grad()
    def _restore_masters(self, init: Callable[[str, torch.Size, torch.dtype], Tensor]) -> None:
        """Write the initial weights again: deepspeed made the fp32 masters from rounded bf16 weights."""
        for name, fragment in self._fragments.items():
            fragment.weight.copy_(fragment.cut(init(name, fragment.shape, torch.float32)))
        self._refresh_model()

    def _refresh_model(self) -> None:
        """Bring the weights that the model computes with up to the masters."""
        zero = self._engine.optimizer
        if self._stage < 3:
            zero.update_lp_params()
            return
        # What is whole would stay as it is, the small parameters above all.
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def load_deepspeed(device: torch.device) -> ModuleType:
    """Import deepspeed and what its first initialisation would import, for a run on ``device``.

    Raises:
        ValueError: It is not installed, is another version, or was imported for another device.
    """
    if device.type == "cpu":
        # Read at the import; deepspeed would take an accelerator where there is one.
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        with _quiet():
            import deepspeed
    except ModuleNotFoundError as error:
        missing = (error.name or "deepspeed").partition(".")[0]
        raise ValueError(
            f"parallel.engine=deepspeed: {missing} is not installed; install the extra 'cocomix[deepspeed]'"
        ) from error
    if deepspeed.__version__.partition("+")[0] != VERSION:
        raise ValueError(
            f"parallel.engine=deepspeed needs deepspeed {VERSION}, but {deepspeed.__version__} is installed"
        )
    _preload()
    accelerator = deepspeed.accelerator.get_accelerator().device_name().partition(":")[0]
    if accelerator != device.type:
        raise ValueError(f"parallel.engine=deepspeed: deepspeed computes on {accelerator}, not {device.type}")
    module: ModuleType = deepspeed
    return module


def _preload() -> None:
    """Import what deepspeed.initialize imports, and keep it from compiling C++ at run time."""
    with _quiet():
        import deepspeed.ops
        import deepspeed.runtime.zero.muon.muon_optimizer
        import deepspeed.runtime.zero.stage3
    # Torch renamed collectives that deepspeed calls at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # A shared-memory collective for CPUs that gloo already provides.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _share_group(timeout_s: float) -> dist.ProcessGroup:
    """A group of all ranks with the run's time limit, for deepspeed too: its own would wait 30 minutes."""
    from deepspeed.utils import groups

    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    groups._WORLD_GROUP = group
    return group


def _settings(
    config: ParallelConfig, precision: Precision, clip_norm: float, *, pin_memory: bool
) -> dict[str, Any]:
    """Deepspeed's configuration: the trainer owns batches, accumulation and the learning rate."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": _WHOLE_BELOW,
    }
    offload = {"device": "cpu", "pin_memory": pin_memory}
    if config.offload_optimizer:
        zero["offload_optimizer"] = offload
    if config.offload_parameters:
        zero["offload_param"] = offload
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_norm,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if config.zero_stage < 3:
        settings["gradient_allreduce_op"] = "sum"
    return settings


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Drop what deepspeed prints and warns of while it sets itself up; its errors are exceptions."""
    with open(os.devnull, "w") as sink, redirect_stdout(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
