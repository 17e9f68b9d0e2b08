"""Which concepts mattered to the teacher's prediction (CoCoMix, arXiv 2502.08524, section 3.1).

Legend: B microbatch, T tokens, D_t teacher width, K active latents, A targets per token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.kernels.ops import sparse_dots
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.gpt2 import GPT2


class Residual(NamedTuple):
    """A teacher's residual stream and what its loss says about it."""

    x: Tensor
    """(B, T, D_t) residual after the SAE's block."""
    grad: Tensor
    """(B, T, D_t) gradient of the summed next-token loss with respect to x."""
    loss: Tensor
    """() fp32 summed loss, nats."""


def residual_and_gradient(teacher: GPT2, input_ids: Tensor, labels: Tensor, layer: int) -> Residual:
    """Run the frozen teacher forward, and backward from the loss to the residual after ``layer`` only.

    Blocks up to ``layer`` keep no activations, no parameter gets a gradient.
    """
    with torch.no_grad():
        x = teacher.residual_after(input_ids, layer)
    with torch.enable_grad():
        x.requires_grad_(True)
        loss = teacher.loss_from_residual(x, labels, layer)
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
        scores: (B, T, K) attribution of the active latents.
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
