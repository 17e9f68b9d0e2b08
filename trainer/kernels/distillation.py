"""Linear head with cross entropy and a divergence from a teacher's head, in row chunks.

Neither model's (N, V) logits outlive a chunk. As in ``trainer.kernels.lm_head`` gradients are taken in the
forward and scaled in the backward; the two losses are weighted here, so that they share one gradient.
Tensor-parallel ranks hold parts of the vocabulary, of the teacher's too, and exchange three numbers per
token (four where the temperature is not 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.tensor import TensorGroup
from trainer.kernels.chunks import row_blocks, row_chunks
from trainer.kernels.columns import LocalColumns
from trainer.kernels.head_gradients import HeadGradients
from trainer.kernels.matmul import matmul
from trainer.kernels.reference import IGNORED_LABEL


class Distilled(NamedTuple):
    """Losses summed over the rows that have a label, nats."""

    loss: Tensor
    """() fp32: cross entropy + weight * divergence; the only one with a gradient."""
    cross_entropy: Tensor
    """() fp32, of the labels."""
    divergence: Tensor
    """() fp32, temperature^2 * KL(teacher || student) at that temperature."""


class _Scales(NamedTuple):
    divergence_weight: float
    temperature: float


class _Rows(NamedTuple):
    """What is known of n rows besides the logits of this rank's columns, all (n, 1)."""

    label: Tensor  # int64 column of the label, any where it is not here
    here: Tensor  # bool, whether the label is here
    valid: Tensor  # bool, whether there is a label
    lse: Tensor  # fp32 log-sum-exps over all ranks' columns: of the student,
    warm_lse: Tensor  # of the student at the temperature,
    teacher_lse: Tensor  # of the teacher at the temperature


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        columns: LocalColumns,
        scales: _Scales,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = HeadGradients(hidden, weight, need_hidden=with_grad, need_weight=with_grad, need_bias=False)
        cross_entropy = hidden.new_zeros((), dtype=torch.float32)
        divergence = torch.zeros_like(cross_entropy)
        for chunk in row_chunks(hidden.shape[0], weight.shape[0], hidden.device):
            part = hidden[chunk]
            logits = columns.mask_padding_(matmul(part, weight.t()))
            teacher = columns.mask_padding_(matmul(teacher_hidden[chunk], teacher_weight.t()))
            rows, label_logit = _summarise(logits, teacher, labels[chunk], columns, scales.temperature)
            cross_entropy += ((rows.lse - label_logit) * rows.valid).sum()
            for block in row_blocks(logits):
                known = _Rows(*(column[block] for column in rows))
                divergence += _divergence(logits[block], teacher[block], known, columns, scales, with_grad)
            del teacher  # before the products
            if with_grad:
                grads.add(chunk, logits, part, weight)
            del logits  # before the next chunk's are made
        ctx.grads, ctx.weight_dtype = grads, weight.dtype
        divergence = columns.tp.sum(divergence) * scales.temperature**2
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return cross_entropy + scales.divergence_weight * divergence, cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = HeadGradients.taken_from(ctx)
        found.scale_(grads[0])
        grad_weight = None if found.weight is None else found.weight.to(ctx.weight_dtype)
        return found.hidden, grad_weight, *[None] * 6


def _summarise(
    logits: Tensor, teacher: Tensor, labels: Tensor, columns: LocalColumns, temperature: float
) -> tuple[_Rows, Tensor]:
    """Log-sum-exps over all ranks' columns and the logit of the label, in one all-gather."""
    label, here = columns.find(labels.unsqueeze(1))
    picked = logits.gather(1, label).float().masked_fill(~here, 0)
    found = [_lse(logits, 1.0), _lse(teacher, temperature)]
    if temperature != 1:
        found.append(_lse(logits, temperature))
    gathered = columns.tp.all_gather(torch.cat([*found, picked], dim=1))
    lses = gathered[..., :-1].logsumexp(0).split(1, dim=1)
    lse, teacher_lse, warm_lse = (*lses, lses[0])[:3]  # at temperature 1 the student has one only
    valid = (labels != IGNORED_LABEL).unsqueeze(1)
    return _Rows(label, here, valid, lse, warm_lse, teacher_lse), gathered[..., -1:].sum(0)


def _lse(logits: Tensor, temperature: float) -> Tensor:
    """Log-sum-exp of this rank's columns of rows (n, C) at a temperature, (n, 1) fp32."""
    blocks = (logits[rows].float() for rows in row_blocks(logits))
    parts = (block if temperature == 1 else block / temperature for block in blocks)
    return torch.cat([part.logsumexp(-1, keepdim=True) for part in parts])


def _log_probs(logits: Tensor, lse: Tensor, temperature: float) -> Tensor:
    return (logits.float() if temperature == 1 else logits.float() / temperature) - lse


def _divergence(
    logits: Tensor, teacher: Tensor, rows: _Rows, columns: LocalColumns, scales: _Scales, with_grad: bool
) -> Tensor:
    """This rank's part of KL(teacher || student) of rows (n, C); replaces logits by their gradient."""
    weight, temperature = scales
    p = _log_probs(teacher, rows.teacher_lse, temperature)
    q = _log_probs(logits, rows.warm_lse, temperature)
    # Padding is left out: both logarithms are -inf there.
    gap = p[:, : columns.num_valid] - q[:, : columns.num_valid]
    p.exp_()
    out = gap.mul_(p[:, : columns.num_valid]).mul_(rows.valid).sum()
    del gap
    if with_grad:
        # d KL / d logits is (q - p) / temperature.
        q.exp_()
        if temperature == 1:
            dlogits = q.mul_(1 + weight).sub_(p, alpha=weight)
        else:
            dlogits = _log_probs(logits, rows.lse, 1.0).exp_().add_(q.sub_(p), alpha=weight * temperature)
        dlogits.scatter_add_(1, rows.label, -rows.here.float()).mul_(rows.valid)
        logits.copy_(dlogits)
    return out


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    *,
    divergence_weight: float,
    temperature: float,
    tp: TensorGroup | None = None,
) -> Distilled:
    """Summed cross entropy + ``divergence_weight`` * temperature^2 * KL(teacher || student).

    Both distributions of the divergence are softmax(logits / temperature); the square keeps its gradient's
    size at any temperature (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        hidden: (N, D), after the final LayerNorm, the same on all tensor-parallel ranks; their
            gradients are partial and have to be summed.
        weight: (V, D), V at least ``vocab_size``, or this rank's rows of it.
        teacher_hidden: (N, D_t) of the frozen teacher, the same on all ranks.
        teacher_weight: (V, D_t) whole on every rank, no gradient.
        labels: (N,) int64, below ``vocab_size`` or ``IGNORED_LABEL``, which leaves a row out of both losses.
        vocab_size: rows beyond it are padding without a logit.
        divergence_weight, temperature: floats above 0.
        tp: the ranks that hold the other rows of ``weight``.

    Returns:
        The same on all ranks of ``tp``; the loss can be differentiated once.
    """
    tp = tp or TensorGroup()
    columns = LocalColumns(vocab_size, weight.shape[0], tp)
    return Distilled(
        *_Distillation.apply(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight[tp.split(teacher_weight.shape[0])],
            labels,
            columns,
            _Scales(divergence_weight, temperature),
            torch.is_grad_enabled(),
        )
    )
