"""Backward, gradient reduction, clipping and the update, behind one protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from parallel.apply import gather_full_state
from parallel.mesh import Mesh

Clip = Callable[[Iterable[Tensor], float], Tensor]
"""Scales the gradients of parameters to a global norm of at most so much; returns the norm before."""


class Engine(Protocol):
    """Who owns gradients and the optimizer's state."""

    @property
    def model(self) -> nn.Module:
        """The model, spread over the ranks."""
        ...

    def backward(self, loss: Tensor, *, last_microbatch: bool) -> None:
        """Add the gradients of ``loss``; they are complete on all ranks after the last microbatch.

        Args:
            loss: Scalar, summed over this rank's tokens of the microbatch and divided by the number
                of tokens of the global batch, so that gradients add up over microbatches and ranks.
            last_microbatch: Whether :meth:`step` follows. Only then are gradients communicated.
        """

    def step(self, lr: float) -> Tensor:
        """Clip, update and clear the gradients.

        Args:
            lr: Learning rate of this step, for every parameter group.

        Returns:
            The global gradient norm before clipping, a scalar on the device, the same on all ranks.
            If it is not finite, no rank changes any weight or optimizer state. The host does not
            wait for the device.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"model": {name: tensor}, "optimizer": {name: {state: tensor}}}``.

        The tensors share memory with the run and are sharded where the run shards them, so that
        torch.distributed.checkpoint writes each rank's part and reads it back into any layout.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`. Hyper-parameters stay those of this run's configuration.

        Raises:
            ValueError: The state's parameters are not this model's.
        """

    def gather(self) -> dict[str, Tensor]:
        """Return the whole weights on rank 0; a collective over all ranks.

        Returns:
            On rank 0 fp32 CPU copies of parameters and persistent buffers (integer tensors keep their
            dtype) by name, in the model's order; elsewhere an empty dict.
        """
        ...

    def close(self) -> None:
        """Let go of process groups; the engine cannot be used after that."""


class FsdpEngine:
    """Torch's fully_shard (FSDP2) with a fused AdamW over the sharded weights."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        mesh: Mesh,
        clip_norm: float,
        clip: Clip | None = None,
    ) -> None:
        """Allocate the optimizer's state.

        Args:
            model: From :func:`parallel.apply.apply_parallel`, materialized.
            optimizer: ``AdamW(fused=True)`` over the model's sharded parameters.
            mesh: The mesh that the model lies on.
            clip_norm: Largest global gradient norm; 0 does not clip.
            clip: Scales gradients to a norm and returns the norm before; torchtitan's by default.

        Raises:
            ValueError: The optimizer is not fused: only the fused one can skip a step on the device.
        """
        if not all(group["fused"] for group in optimizer.param_groups):
            raise ValueError("the optimizer must be built with fused=True")
        if clip is None:
            # Not at the top: torchtitan is needed only where a mesh was built.
            from parallel.titan import clip_grad_norm_

            clip = clip_grad_norm_

        self.model = model
        self.optimizer = optimizer
        self.mesh = mesh
        self._max_norm = clip_norm if clip_norm > 0 else math.inf
        self._clip_grad_norm_ = clip
        allocate_state(optimizer, _parameters(optimizer))

    def backward(self, loss: Tensor, *, last_microbatch: bool) -> None:
        """See :meth:`Engine.backward`."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last_microbatch)
        loss.backward()

    def step(self, lr: float) -> Tensor:
        """See :meth:`Engine.step`."""
        norm = self._clip_grad_norm_(_parameters(self.optimizer), self._max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The fused kernels read this flag on the device and then change nothing, the step counter
        # included; torch.amp.GradScaler hands it over the same way.
        self.optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.found_inf  # type: ignore[attr-defined]
        self.optimizer.zero_grad(set_to_none=True)
        return norm.to(self.mesh.fsdp.device_type, non_blocking=True)  # it is on the CPU with offloading

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Engine.state_dict`."""
        # The model first: that frees the root's gathered weights, which a forward without backward
        # leaves in place of the sharded ones that the optimizer knows.
        model_state = get_model_state_dict(self.model)
        # Without the parameter groups: their hyper-parameters belong to the configuration.
        optimizer_state = get_optimizer_state_dict(self.model, self.optimizer)["state"]
        return {"model": model_state, "optimizer": optimizer_state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Engine.load_state_dict`."""
        own = self.state_dict()
        for part in ("model", "optimizer"):
            require_same_names(part, own[part], state[part])
        groups = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict={"state": state["optimizer"], "param_groups": groups},
        )

    def gather(self) -> dict[str, Tensor]:
        """See :meth:`Engine.gather`."""
        return gather_full_state(self.model)

    def close(self) -> None:
        """Nothing to do: the groups belong to the mesh."""


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def allocate_state(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Make AdamW's state of ``parameters`` as its first step would.

    A state that torch.distributed.checkpoint has to make before the first step comes from a trial
    step, which leaves the step counter at 1.
    """
    for parameter in parameters:
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def require_same_names(part: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse a state whose names are not ``own``'s.

    Raises:
        ValueError: Lists the names that are missing and unknown.
    """
    missing, unknown = sorted(own.keys() - other.keys()), sorted(other.keys() - own.keys())
    if missing or unknown:
        raise ValueError(f"the {part} state does not fit: missing {missing}, unknown {unknown}")
