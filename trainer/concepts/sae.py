"""TopK sparse autoencoder: residuals to a few active latents, and back (Gao et al. 2024, arXiv 2406.04093).

Shapes: N tokens, D_t teacher width, M latents, K active latents per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.tensor import TensorGroup, local
from trainer.kernels import split_bf16
from trainer.kernels.columns import LocalColumns
from trainer.kernels.matmul import linear
from trainer.kernels.spread_topk import join, merge_top_k, pick

STANDARDIZE_EPS = 1e-5
"""Added to the standard deviation, outside the root, as the published dictionaries were trained."""


class TopKSae(nn.Module):
    """Dictionary of M directions of which every token uses at most K.

    With ``x_n`` the standardised residual::

        a = W_enc (x_n - pre_bias) + latent_bias        (M)
        z = ReLU(the K largest of a), 0 elsewhere
        x_n' = sum_m z_m W_dec[m] + pre_bias

    **Precision.** Weights may be fp32 or bf16. Standardising, pre-activations, selection and values are
    fp32 whatever the residual's and the weights' dtype: pre-activations rounded to bf16 tie, and ties
    choose other latents. Where pre-activations are equal, smaller ids come first.

    **Tensor parallelism.** ``tp`` ranks may hold equally many rows of the dictionary each. Every method
    then takes the same tokens on all of them and returns the same on all of them, as one rank would.

    Attributes:
        pre_bias: (D_t) origin of the latents in standardised space.
        latent_bias: (M).
        encoder: linear map without bias, weight (M, D_t).
        decoder: (M, D_t), one row per latent, so that a token touches K contiguous rows.
        num_latents: M.
        top_k: K.
        tp: the ranks that hold the other rows; alone by default.
        normalize: whether residuals are standardised per token; otherwise ``x_n`` is the residual.
        split_products: whether a GPU encodes by ``trainer.kernels.split_bf16`` where weights are fp32: on
            tensor cores, with errors of 2**-16 instead of 2**-24.

    All weights are zero until a loader or an initialisation fills them.
    """

    def __init__(
        self,
        width: int,
        num_latents: int,
        top_k: int,
        *,
        num_rows: int | None = None,
        normalize: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        """Make an all-zero autoencoder.

        ``num_rows`` are the rows of the weights, M by default; those behind the last latent stay zero and
        are never active.

        Raises:
            ValueError: a size is below 1 (``width`` below 2), or ``top_k`` is above ``num_latents``.
        """
        super().__init__()
        for name, size in (("num_latents", num_latents), ("top_k", top_k)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if width < 2:
            raise ValueError(f"width={width} must be at least 2, one number has no standard deviation")
        if top_k > num_latents:
            raise ValueError(f"top_k={top_k} must be at most num_latents={num_latents}")
        num_rows = num_rows or num_latents
        self.num_latents = num_latents
        self.top_k = top_k
        self.normalize = normalize
        self.split_products = False
        self.tp = TensorGroup()
        self.pre_bias = nn.Parameter(torch.zeros(width, device=device))
        self.latent_bias = nn.Parameter(torch.zeros(num_rows, device=device))
        # A meta layer, then zeros: nn.Linear's own initialisation would draw from the global generator.
        self.encoder = nn.Linear(width, num_rows, bias=False, device="meta")
        self.encoder.weight = nn.Parameter(torch.zeros(num_rows, width, device=device))
        self.decoder = nn.Parameter(torch.zeros(num_rows, width, device=device))

    @property
    def width(self) -> int:
        """D_t."""
        return self.decoder.shape[1]

    @property
    def columns(self) -> LocalColumns:
        """Which latents this rank holds."""
        return LocalColumns(self.num_latents, local(self.decoder).shape[0], self.tp)

    def split(self, tp: TensorGroup) -> None:
        """Keep this rank's rows of a whole dictionary only, M/tp rounded up."""
        rows = -(-self.num_latents // tp.size)
        mine = slice(tp.rank * rows, (tp.rank + 1) * rows)
        for owner, name in ((self, "latent_bias"), (self, "decoder"), (self.encoder, "weight")):
            held = getattr(owner, name)
            part = held.new_zeros(rows, *held.shape[1:])
            found = held.detach()[mine]
            part[: len(found)] = found
            setattr(owner, name, nn.Parameter(part, requires_grad=held.requires_grad))
        self.tp = tp

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        sizes = f"width={self.width}, num_latents={self.num_latents}, top_k={self.top_k}"
        return f"{sizes}, normalize={self.normalize}"

    def standardize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Subtract the token's mean and divide by its unbiased standard deviation + 1e-5.

        Args:
            x: (..., D_t) residuals of any floating dtype.

        Returns:
            ``x_n`` (..., D_t), mean (..., 1) and standard deviation (..., 1) without the epsilon; all fp32.
            With ``normalize=False`` the residual itself, zeros and ones.
        """
        x = x.float()
        if not self.normalize:
            return x, torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        mean = x.mean(dim=-1, keepdim=True)
        centered = x - mean
        std = torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / (self.width - 1) ** 0.5
        return centered / (std + STANDARDIZE_EPS), mean, std

    @torch.no_grad()
    def encode(self, x: Tensor, chunk_rows: int = 1024) -> tuple[Tensor, Tensor]:
        """Active latents of each token, largest first; no gradient.

        Args:
            x: (..., D_t) residuals of any floating dtype.
            chunk_rows: tokens whose M pre-activations exist at one time (4 * M bytes each).

        Returns:
            Values (..., K) fp32 after the ReLU (so some may be 0) and ids (..., K) int64.
        """
        x_n = self.standardize(x)[0].reshape(-1, self.width)
        chunks = torch.split(x_n - local(self.pre_bias).float(), chunk_rows)
        score = self._scorer()
        # A name for the pre-activations would keep one chunk's alive beside the next one's.
        picks = [pick(score(rows), self.top_k, self.columns) for rows in chunks]
        (best,) = merge_top_k([join(picks)], [self.top_k], self.tp)
        shape = (*x.shape[:-1], self.top_k)
        return best.values.relu().view(shape), best.ids.view(shape)

    def _scorer(self) -> Callable[[Tensor], Tensor]:
        """Centered residuals (n, D_t) -> pre-activations (n, M/tp) fp32 of the latents that are here."""
        weight, bias, columns = local(self.encoder.weight), local(self.latent_bias), self.columns
        if self.split_products and split_bf16.on_tensor_cores(weight) and weight.dtype == torch.float32:
            split = split_bf16.SplitWeight(weight)
            return lambda rows: columns.mask_padding_(split.product(rows).add_(bias))
        return lambda rows: columns.mask_padding_(preactivations(rows, weight, bias))

    def decode(self, values: Tensor, ids: Tensor) -> Tensor:
        """Standardised residual of sparse latents: ``sum_k values_k * decoder[ids_k] + pre_bias``.

        Args:
            values: (..., K) latents; any K.
            ids: (..., K) int64 rows of the decoder.

        Returns:
            (..., D_t) fp32. Differentiable in ``values`` and in the weights.
        """
        flat = (values.flatten(0, -2), ids.flatten(0, -2))
        # Each rank adds its share of the origin to its partial sum, and gets that share of its gradient.
        origin = local(self.pre_bias).float() / self.tp.size
        return self.tp.sum_parts(self.combine(*flat) + origin).view(*ids.shape[:-1], self.width)

    def combine(self, values: Tensor, ids: Tensor) -> Tensor:
        """``sum_k values_k * decoder[ids_k]`` (N, D_t) fp32 over the latents that this rank holds.

        values: (N, K), ids: (N, K) int64; differentiable as :meth:`decode` is.
        """
        index, here = self.columns.find(ids)
        return sum_of_rows(values.masked_fill(~here, 0.0), index, local(self.decoder))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, chunk_rows: int = 1024) -> Tensor:
        """Residuals (..., D_t) as the K active latents describe them, in the residual's units and dtype."""
        _, mean, std = self.standardize(x)
        return (self.decode(*self.encode(x, chunk_rows)) * std + mean).to(x.dtype)


def preactivations(centered: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``centered @ weight.T + bias`` (N, M) in fp32 for fp32 or lower-precision weights.

    Args:
        centered: (N, D_t) fp32, standardised residual minus ``pre_bias``.
        weight: (M, D_t) of any floating dtype.
        bias: (M) of any floating dtype.
    """
    if weight.dtype != torch.float32 and weight.device.type == "cuda":
        # The tensor cores accumulate in fp32; only a rounded output would lose the order of the latents.
        product = torch.mm(centered.to(weight.dtype), weight.t(), out_dtype=torch.float32)
        return product.add_(bias.float())
    return linear(centered, weight.float(), bias.float())


def sum_of_rows(values: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """``sum_k values[n, k] * table[ids[n, k]]`` without an (N, K, D) intermediate.

    Args:
        values: (N, K) coefficients.
        ids: (N, K) int64 rows of ``table``.
        table: (M, D).

    Returns:
        (N, D) fp32, differentiable in ``values`` and ``table``.
    """
    if table.requires_grad and torch.is_grad_enabled():
        # A popular row's gradient has thousands of summands: collect them in fp32, whatever the weights are.
        table = table.float()
    return F.embedding_bag(ids, table, per_sample_weights=values.to(table.dtype), mode="sum").float()
