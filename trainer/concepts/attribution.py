"""Which concepts mattered to the teacher's prediction (CoCoMix, arXiv 2502.08524, section 3.1).

Legend: B microbatch, T tokens, D_t teacher width, K active latents, A targets per token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.kernels.ops import sparse_dots
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.documents import Documents
from trainer.model.gpt2 import GPT2


class Residual(NamedTuple):
    """A teacher's residual stream and what its loss says about it."""

    x: Tensor
    """(B, T, D_t) residual after the SAE's block."""
    grad: Tensor
    """(B, T, D_t) gradient of the summed next-token loss with respect to x."""
    loss: Tensor
    """() fp32 summed loss, nats."""


def residual_and_gradient(
    teacher: GPT2, input_ids: Tensor, labels: Tensor, layer: int, documents: Documents | None = None
) -> Residual:
    """Run the frozen teacher forward, and backward from the loss to the residual after ``layer`` only.

    Blocks up to ``layer`` keep no activations, no parameter gets a gradient.
    """
    with torch.no_grad():
        x = teacher.residual_after(input_ids, layer, documents)
    with torch.enable_grad():
        x.requires_grad_(True)
        loss = teacher.loss_from_residual(x, labels, layer, documents)
        (grad,) = torch.autograd.grad(loss, x)
    return Residual(x.detach(), grad, loss.detach())


def attribution(grad: Tensor, values: Tensor, ids: Tensor, decoder: Tensor) -> Tensor:
    """S = (g W_dec) z at the active latents, signed (paper equation 2); elsewhere it is 0.

    Args:
        grad: (B, T, D_t) gradient of the loss with respect to the residual.
        values: (B, T, K) active latents z.
        ids: (B, T, K) int64, their places in the dictionary.
        decoder: (M, D_t), one row per latent.

    Returns:
        (B, T, K) fp32.
    """
    flat = sparse_dots(grad.flatten(0, 1), ids.flatten(0, 1), decoder)
    return flat.view_as(values).float() * values.float()


def random_scores(
    input_ids: Tensor, values: Tensor, ids: Tensor, documents: Documents | None = None
) -> Tensor:
    """Uniform scores in (0, 1] of the active latents, 0 where a latent's activation is 0.

    Their ranking draws latents without replacement. A score is a hash of the row's tokens, the position and
    the latent, so that a window has the same targets in each epoch, on each rank and from a cache. With
    ``documents`` it is one of the document's tokens and the position there.

    Args:
        input_ids: (B, T) int64.
        values: (B, C, K) active latents of the C tokens that have a concept, evenly spaced.
        ids: (B, C, K) int64, their places in the dictionary.

    Returns:
        (B, C, K) fp64, which has too many values for ties.
    """
    every = input_ids.shape[1] // ids.shape[1]
    position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if documents is None:
        text = _hash(input_ids * 2**32 + position).sum(1)[:, None]
    else:
        position = documents.positions
        text = documents.totals(_hash(input_ids * 2**32 + position))[:, every - 1 :: every]
    place = position[:, every - 1 :: every]
    bits = _hash(text.unsqueeze(2) ^ _hash(place.unsqueeze(2) * 2**32 + ids)) >> 11
    return ((bits & (2**53 - 1)) + 1).double() * 2.0**-53 * (values > 0)


def _hash(x: Tensor) -> Tensor:
    """A bijection of int64 whose output bits look independent: the finaliser of SplitMix64."""
    # Products wrap around on every device; a shift to the right would copy the sign without the mask.
    x = (x ^ (x >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ (x >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return x ^ (x >> 31 & 2**33 - 1)


def select_targets(
    scores: Tensor,
    ids: Tensor,
    num_targets: int,
    *,
    ranking: Literal["signed", "abs", "negative"] = "signed",
    mask_non_positive: bool = True,
) -> Tensor:
    """Ids of the A largest scores per token.

    Args:
        scores: (B, T, K) of the active latents: attributions, or what ``concepts.targets`` ranks by.
        ids: (B, T, K) int64.
        num_targets: A; where K is smaller the rest is masked.
        ranking: by the score, its absolute value or its negative.
        mask_non_positive: replace targets whose ranked score is not positive by ``MASKED_TARGET``.

    Returns:
        (B, T, A) int64, best first.
    """
    ranked = {"signed": scores, "abs": scores.abs(), "negative": -scores}[ranking]
    best = ranked.topk(min(num_targets, ranked.shape[-1]), dim=-1)
    targets = ids.gather(-1, best.indices)
    if mask_non_positive:
        targets = targets.masked_fill(best.values <= 0, MASKED_TARGET)
    missing = num_targets - targets.shape[-1]
    return torch.nn.functional.pad(targets, (0, missing), value=MASKED_TARGET)
