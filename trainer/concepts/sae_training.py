"""Training a TopK sparse autoencoder (Gao et al. 2024, arXiv 2406.04093, sections 2 and A).

:class:`SaeLearner` is the module that the project's training loop trains; the loop owns optimizer, sharding
and gradients. After each optimizer step the loop calls, in this order,

1. :meth:`SaeLearner.after_step`: decoder rows back to unit norm, on local shards, no communication;
2. :meth:`SaeLearner.sync_buffers`: the counters behind "dead", one all-reduce (MIN) of M integers;

and, when wanted, :meth:`SaeLearner.project_gradients` between the last backward and the step.

Shapes: N tokens, D_t teacher width, M latents, K active latents per token, K_aux dead latents per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.plan import ParallelPlan
from parallel.tensor import local
from trainer.concepts.sae import TopKSae, preactivations, sum_of_rows
from trainer.config import SaeConfig
from trainer.kernels.columns import LocalColumns
from trainer.kernels.spread_topk import join, merge_top_k, pick
from trainer.kernels.topk import TopK
from trainer.model.padding import padded

TENSOR_DIMS = MappingProxyType({"encoder.weight": 0, "latent_bias": 0, "decoder": 0})
"""The dictionary is split by rows; see :attr:`trainer.model.gpt2.TENSOR_DIMS`."""


class SaeTerms(NamedTuple):
    """Sums over the tokens of one forward (fp32 scalars); divide by the global number of tokens for means."""

    loss: Tensor
    """What to differentiate: ``normalized_mse + aux_weight * aux``."""
    normalized_mse: Tensor
    """Squared error over the token's power in standardised space, detached."""
    aux: Tensor
    """AuxK: what dead latents leave of the error over the same power, detached; 0 while no latent is dead."""
    num_active: Tensor
    """Latents above 0, at most K per token."""


class SaeLearner(nn.Module):
    """A TopK autoencoder with its loss and its dead-latent counters; the root module to shard and train.

    Per token with ``x`` the standardised residual and ``e = x - x'`` the error of its reconstruction::

        loss = |e|^2 / |x|^2 + aux_weight * |e - e'|^2 / |x|^2        (sections 2.3 and A.2)

    ``e'`` is built from the K_aux largest dead latents, without bias, and ``e`` is a constant there, so that
    the term trains dead latents only. A latent is dead when it was silent for ``dead_after_tokens`` tokens.
    ``|x|^2`` of a standardised token is D_t - 1 whatever the token, so the normalisation only sets the scale.

    Which latents are dead changes in :meth:`sync_buffers` only. So the loss of a step depends neither on the
    number of ranks nor on the number of microbatches.

    Under tensor parallelism each rank holds a part of the rows of encoder and decoder. A latent's encoder
    and decoder row lie on the same rank, so that backward exchanges nothing but the gradient of ``pre_bias``.

    Attributes:
        sae: the parameters; its rows are padded, see :data:`trainer.model.padding.PADDING`.
        tokens_since_active: (M) int64, persistent; tokens of all ranks since each latent was last above 0,
            counted in whole optimizer steps; equal on all ranks.
        activations: (M) int64, not persistent; tokens of this rank that used each latent since the last
            :meth:`sync_buffers`.
    """

    tokens_since_active: Tensor
    activations: Tensor

    def __init__(
        self,
        width: int,
        config: SaeConfig,
        *,
        chunk_rows: int = 2048,
        device: torch.device | str | None = None,
    ) -> None:
        """Make a learner with all-zero weights.

        Args:
            width: D_t.
            config: sizes, weight of the auxiliary loss, and what counts as dead.
            chunk_rows: tokens whose M pre-activations exist at one time.
            device: where the weights are made.
        """
        super().__init__()
        rows = padded(config.num_latents)
        self.sae = TopKSae(width, config.num_latents, config.top_k, num_rows=rows, device=device)
        self.aux_top_k = min(config.aux_top_k, config.num_latents)
        self.aux_weight = config.aux_weight
        self.dead_after_tokens = config.dead_after_tokens
        self.chunk_rows = chunk_rows
        counters = torch.zeros(config.num_latents, dtype=torch.int64, device=device)
        self.register_buffer("tokens_since_active", counters)
        self.register_buffer("activations", counters.clone(), persistent=False)

    @property
    def plan(self) -> ParallelPlan:
        """One FSDP unit, the root: every weight is used in every forward."""
        return ParallelPlan(fsdp_units=(), tensor_dims=TENSOR_DIMS)

    def forward(self, residual: Tensor) -> SaeTerms:
        """Losses of residuals (..., D_t) of any floating dtype; training mode also counts active latents.

        Tensor-parallel ranks take the same residuals and return the same losses.
        """
        x = self.sae.standardize(residual.detach().reshape(-1, residual.shape[-1]))[0]
        dead = self.dead_latents()
        num_aux = self._num_aux(dead)
        selected, ids = _SelectLatents.apply(
            x - local(self.sae.pre_bias).float(),
            local(self.sae.encoder.weight),
            local(self.sae.latent_bias),
            dead,
            self.sae.top_k,
            num_aux,
            self.chunk_rows,
            self.sae.columns,
        )
        counts = [self.sae.top_k, num_aux]
        values, aux_values = selected.relu().split(counts, dim=-1)
        ids, aux_ids = ids.split(counts, dim=-1)
        error = x - self.sae.decode(values, ids)
        # A token without any variation has no power: its error counts as it is instead of dividing by 0.
        power = x.square().sum(-1)
        power = torch.where(power > 0, power, 1.0)
        mse = (error.square().sum(-1) / power).sum()
        aux = self._aux_loss(aux_values, aux_ids, error.detach(), power) * dead.any()
        if self.training:
            self._count_active(values, ids)
        num_active = (values.detach() > 0).sum().float()
        return SaeTerms(mse + self.aux_weight * aux, mse.detach(), aux.detach(), num_active)

    def dead_latents(self) -> Tensor:
        """(M) bool: silent for at least ``dead_after_tokens`` tokens."""
        return self.tokens_since_active >= self.dead_after_tokens

    def sync_buffers(self, reduce_min: Callable[[Tensor], Tensor], tokens_per_step: int) -> None:
        """Advance the counters by one optimizer step; every rank calls it after every step.

        A latent that any rank used is back at 0, every other one ages by the tokens of all ranks.

        Args:
            reduce_min: returns the elementwise minimum over all data-parallel ranks of an (M) int64 tensor;
                the identity on one rank.
            tokens_per_step: tokens of the optimizer step over all ranks.
        """
        aged = self.tokens_since_active + tokens_per_step
        aged.masked_fill_(self.activations > 0, 0)
        self.tokens_since_active.copy_(reduce_min(aged))
        self.activations.zero_()

    def reset_buffers(self) -> None:
        """Zero the buffer that is not saved, for a model that was made on the meta device."""
        self.activations.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        """Scale decoder rows to unit norm, so that latents and not the decoder carry magnitude."""
        rows = _whole_rows(self.sae.decoder)
        rows.copy_(F.normalize(rows, dim=-1))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Drop the gradient component along each unit decoder row.

        :meth:`after_step` undoes a step along it anyway, but it would stay in Adam's moments. Call this on
        reduced gradients, before clipping.
        """
        rows, gradient = _whole_rows(self.sae.decoder), self.sae.decoder.grad
        assert gradient is not None, "project_gradients comes after backward"
        local = _whole_rows(gradient)
        local.sub_((local * rows).sum(-1, keepdim=True) * rows)

    def to_sae(self, state: Mapping[str, Tensor] | None = None) -> TopKSae:
        """The trained autoencoder with its own fp32 CPU weights, frozen.

        Args:
            state: full tensors by this module's names (``sae.decoder`` ...); other names are ignored.
                Needed where parameters are sharded; by default the module's own tensors.
        """
        own = self.sae
        trained = TopKSae(own.width, own.num_latents, own.top_k, normalize=own.normalize)
        full = self.state_dict() if state is None else state
        weights = {
            name: full[f"sae.{name}"][: len(tensor)] if name != "pre_bias" else full["sae.pre_bias"]
            for name, tensor in trained.state_dict().items()
        }
        trained.load_state_dict(weights)
        return trained.requires_grad_(False)

    def _num_aux(self, dead: Tensor) -> int:
        if self.aux_weight == 0:
            return 0
        # Reading the flag costs nothing on the CPU and saves half of the selection; on a GPU it would stall.
        if dead.device.type == "cpu" and not bool(dead.any()):
            return 0
        return self.aux_top_k

    def _aux_loss(self, values: Tensor, ids: Tensor, error: Tensor, power: Tensor) -> Tensor:
        """Sum over tokens of ``|e - e'|^2 / |x|^2``; tokens where it is not finite count 0 (section A.2)."""
        if values.shape[-1] == 0:
            return power.new_zeros(())
        left = self.sae.tp.sum_parts(self.sae.combine(values, ids)) - error
        finite = left.square().sum(-1, keepdim=True).isfinite()
        # Masked before squaring: a mask on the result alone would still send NaN backwards (0 * inf).
        return (torch.where(finite, left, 0.0).square().sum(-1) / power).sum()

    @torch.no_grad()
    def _count_active(self, values: Tensor, ids: Tensor) -> None:
        active = (values > 0).flatten().to(self.activations.dtype)
        self.activations.index_add_(0, ids.flatten(), active)


class _SelectLatents(torch.autograd.Function):
    """Pre-activations of the top latents and of the top dead latents, with a backward that is sparse too.

    A dense graph would keep (N, M) pre-activations and multiply an equally large, almost empty gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        centered: Tensor,
        weight: Tensor,
        bias: Tensor,
        dead: Tensor,
        top_k: int,
        aux_top_k: int,
        chunk_rows: int,
        columns: LocalColumns,
    ) -> tuple[Tensor, Tensor]:
        """Values (N, K + K_aux) fp32 before the ReLU, -inf where too few latents are dead; their ids."""
        active: list[TopK] = []
        auxiliary: list[TopK] = []
        alive = ~columns.part_of(dead)
        for rows in torch.split(centered, chunk_rows):
            scores = columns.mask_padding_(preactivations(rows, weight, bias))
            active.append(pick(scores, top_k, columns))
            if aux_top_k:
                auxiliary.append(pick(scores.masked_fill_(alive, -torch.inf), aux_top_k, columns))
            del scores  # before the next chunk's are made
        picks = [join(chunks) for chunks in (active, auxiliary) if chunks]
        best = merge_top_k(picks, [top_k, aux_top_k][: len(picks)], columns.tp)
        all_values, all_ids = (torch.cat(parts, dim=-1) for parts in zip(*best, strict=True))
        ctx.save_for_backward(centered, weight, bias, all_ids)
        ctx.columns = columns
        ctx.mark_non_differentiable(all_ids)
        return all_values, all_ids

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With g the gradient of the values: ``sum_k g W[id]``, and its transpose for the weights.

        Values of other ranks' latents were not used here, so theirs is 0.
        """
        centered, weight, bias, all_ids = ctx.saved_tensors
        ids, _ = ctx.columns.find(all_ids)
        grad_centered, grad_weight = _bag_and_row_gradient(grads[0], ids, weight, centered)
        ones = centered.new_ones(centered.shape[0], 1)
        _, grad_bias = _bag_and_row_gradient(grads[0], ids, bias[:, None], ones)
        return (
            grad_centered,
            grad_weight.to(weight.dtype),
            grad_bias[:, 0].to(bias.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _bag_and_row_gradient(
    coefficients: Tensor, ids: Tensor, table: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum_k c_nk table[id_nk]`` (N, D), and per row the sum of ``c_nk upstream_n`` over its uses (M, D).

    The second is the first's gradient in the table; the bag's own backward computes it without atomics.
    """
    with torch.enable_grad():
        rows = table.detach().float().requires_grad_()
        combined = sum_of_rows(coefficients, ids, rows)
    (gradient,) = torch.autograd.grad(combined, rows, upstream)
    return combined.detach(), gradient


def _whole_rows(tensor: Tensor) -> Tensor:
    """This rank's rows (possibly none), each of them complete."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Rows that FSDP shards after tensor parallelism have placements of a class of their own.
    dims = [getattr(placement, "dim", 0) for placement in tensor.placements]
    assert not any(dims), f"decoder is sharded along {dims}, rows must stay whole"
    return tensor.to_local()


def init_sae_parameter(
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    *,
    seed: int,
    num_latents: int,
    data_mean: Tensor | None = None,
) -> Tensor:
    """Initial value of a :class:`SaeLearner` tensor; depends on name and seed, not on the order of the calls.

    Decoder rows are random unit vectors, the encoder starts as a copy of them (section A.1), all else is 0,
    rows of padding too.

    Args:
        name: parameter or persistent buffer, ``sae.decoder`` for instance.
        shape: its full shape.
        dtype: its dtype.
        seed: seed of the weights.
        num_latents: rows that are no padding.
        data_mean: (D_t) mean of standardised residuals to start ``pre_bias`` from, instead of 0.

    Returns:
        The full tensor on the CPU.

    Raises:
        ValueError: the name is unknown.
    """
    match name.removeprefix("sae."):
        case "decoder" | "encoder.weight":
            generator = torch.Generator().manual_seed(seed)
            rows = F.normalize(torch.randn(num_latents, *shape[1:], generator=generator), dim=-1)
            return F.pad(rows, (0, 0, 0, shape[0] - num_latents)).to(dtype)
        case "pre_bias" if data_mean is not None:
            return data_mean.to("cpu", dtype).expand(shape).clone()
        case "pre_bias" | "latent_bias" | "tokens_since_active" | "activations":
            return torch.zeros(shape, dtype=dtype)
    raise ValueError(f"{name} is no tensor of a sparse autoencoder")
