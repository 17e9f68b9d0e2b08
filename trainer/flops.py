"""Exact matmul FLOPs and parameters of every part of a training step (torch-free).

A multiplication of (m, k) by (k, n) counts 2*m*n*k. Only matmuls count, attention's two
included; norms, softmax, activations, gathers, top-K and the optimizer do not. Figures are per
token of data, that is per input position: a sequence of T tokens has T of them, and T + T/s positions
once a vector is interleaved after every s-th one (2T with concepts as published).

The algorithm that is counted is the cheapest one known, not the one that happens to run:
recomputed activations, the scores that a flash backward computes a second time, padded columns
and gradients that nobody reads are waste and must not raise the utilisation.

Sequences are counted whole: with ``data.mask_documents`` a query needs fewer keys, how many the data decide,
and a mask saves the present kernels nothing. So the MFU of such a run is that of the same run without it.

With ``causal=True`` a query at 0-based position p pays for the p + 1 keys that it sees, which is
(S + 1) / 2 on average over S positions: the masked half is NOT counted. With ``causal=False`` it
pays for all S keys, as ``torch.utils.flop_counter`` and the usual 6N + 12*L*D*T do; use it to
compare with utilisations that others publish.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from trainer.config import ConceptsConfig, Insertion, ModelConfig, PauseConfig, RegressionInsertion, SaeConfig

MLP_EXPANSION = 4
"""Width of GPT-2's MLP in units of the model's width."""


class TeacherShape(NamedTuple):
    """Sizes of the frozen teacher: width D_t, blocks and vocabulary."""

    d_model: int
    n_layer: int
    vocab_size: int


class SaeShape(NamedTuple):
    """Sizes of the sparse autoencoder: dictionary size M and active latents K (its width is D_t)."""

    num_latents: int
    top_k: int


@dataclass(frozen=True, slots=True)
class PartFlops:
    """FLOPs of one part per token; ``backward`` holds the gradients of activations and of weights."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Forward plus backward."""
        return self.forward + self.backward

    def __add__(self, other: PartFlops) -> PartFlops:
        return PartFlops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: int) -> PartFlops:
        return PartFlops(self.forward * count, self.backward * count)

    def __floordiv__(self, count: int) -> PartFlops:
        return PartFlops(self.forward // count, self.backward // count)


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """FLOPs per token of data of a training step, part by part."""

    parts: Mapping[str, PartFlops]
    """By name, in the order of the computation; a part that a run has not is absent."""

    @property
    def forward(self) -> int:
        """Forward FLOPs of all parts."""
        return sum(part.forward for part in self.parts.values())

    @property
    def backward(self) -> int:
        """Backward FLOPs of all parts."""
        return sum(part.backward for part in self.parts.values())

    @property
    def total(self) -> int:
        """Forward and backward FLOPs of all parts: the numerator of the MFU."""
        return self.forward + self.backward


class _Block(NamedTuple):
    """Forward FLOPs per token of one GPT-2 block."""

    linear: int
    attention: int

    @property
    def trained(self) -> PartFlops:
        """Backward computes two products for each forward one (attention: dQ, dK, dV and dP for two)."""
        forward = self.linear + self.attention
        return PartFlops(forward, 2 * forward)

    @property
    def activation_gradient_only(self) -> PartFlops:
        """A linear layer with frozen weights needs dX and no dW; attention has no weights to save."""
        return PartFlops(self.linear + self.attention, self.linear + 2 * self.attention)

    @property
    def forward_only(self) -> PartFlops:
        return PartFlops(self.linear + self.attention)


def _block(d_model: int, seq_len: int, *, causal: bool) -> _Block:
    """A block over T positions: query, key, value, projection and MLP, plus scores and values."""
    linear = 2 * (4 + 2 * MLP_EXPANSION) * d_model**2
    pairs = seq_len * (seq_len + 1) // 2 if causal else seq_len**2
    return _Block(linear, 4 * d_model * pairs // seq_len)


def _interleaved_block(d_model: int, seq_len: int, every: int, *, causal: bool) -> _Block:
    """A block over the T + T/s positions of an interleaved stream, per token of data."""
    positions = seq_len + seq_len // every
    linear, attention = _block(d_model, positions, causal=causal)
    return _Block(linear * positions // seq_len, attention * positions // seq_len)


def _read_positions_block(d_model: int, seq_len: int, every: int, *, causal: bool) -> _Block:
    """The last interleaved block where only one position per token is read afterwards.

    Keys and values are needed at T + T/s positions; queries, projection and MLP at T. Token t (0-based) is
    read at position t + (t + 1) // s and sees one key more; s = 1 is T + 1 on average.
    """
    vectors = seq_len // every
    positions = seq_len + vectors
    keys_values = 2 * 2 * d_model**2 * positions // seq_len
    the_rest = 2 * (2 + 2 * MLP_EXPANSION) * d_model**2
    seen = seq_len * (seq_len + 1) // 2 + every * (vectors * (vectors - 1) // 2) + vectors
    pairs = seen if causal else positions * seq_len
    return _Block(keys_values + the_rest, 4 * d_model * pairs // seq_len)


def _matmul(rows: int, columns: int, *, backward_products: int) -> PartFlops:
    """One vector times a (rows, columns) weight, with so many products of that size in backward."""
    forward = 2 * rows * columns
    return PartFlops(forward, backward_products * forward)


def _trunk(
    model: ModelConfig, insertion: Insertion | None, seq_len: int, *, causal: bool, prune_last_block: bool
) -> dict[str, PartFlops]:
    plain = _block(model.d_model, seq_len, causal=causal).trained
    if insertion is None or not _interleaves(insertion):
        return {"embeddings": PartFlops(), "blocks": plain * model.n_layer}
    insert_layer = insertion.insert_layer
    interleaved = _interleaved_block(model.d_model, seq_len, insertion.every, causal=causal).trained
    pruned = _read_positions_block(model.d_model, seq_len, insertion.every, causal=causal).trained
    last = pruned if prune_last_block else interleaved
    return {
        "embeddings": PartFlops(),
        "blocks_below_insertion": plain * insert_layer,
        "blocks_above_insertion": interleaved * (model.n_layer - 1 - insert_layer) + last,
    }


def _interleaves(insertion: Insertion) -> bool:
    return isinstance(insertion, PauseConfig) or insertion.mix == "interleave"


def _insertion(model: ModelConfig, insertion: Insertion | None, *, has_loss: bool) -> dict[str, PartFlops]:
    """What makes the vectors, per token of data: one of ``every`` tokens has one."""
    if insertion is None or isinstance(insertion, PauseConfig):
        return {}
    mixes = insertion.mix != "none"
    if isinstance(insertion, RegressionInsertion):
        product = _matmul(insertion.width, model.d_model, backward_products=2)
        parts = {"state_head": product} | ({"state_compress": product} if mixes else {})
    else:
        kept = _matmul(insertion.top_k, model.d_model, backward_products=2)
        head = _matmul(insertion.num_concepts, model.d_model, backward_products=2 if has_loss else 0)
        # Without a loss gradients arrive through the kept logits alone.
        parts = {"concept_head": head if has_loss else head + PartFlops(0, kept.backward)}
        parts |= {"compress": kept} if mixes else {}
    return {name: part // insertion.every for name, part in parts.items()}


def _check_layer(key: str, layer: int, teacher: TeacherShape) -> None:
    if not 0 <= layer < teacher.n_layer:
        raise ValueError(f"{key}={layer} must be from 0 to {teacher.n_layer - 1}, the teacher's last block")


def _frozen(
    insertion: Insertion | None,
    seq_len: int,
    teacher: TeacherShape,
    sae: SaeShape | None,
    *,
    causal: bool,
) -> dict[str, PartFlops]:
    """What the frozen models compute; the teacher runs no further than somebody reads."""
    block = _block(teacher.d_model, seq_len, causal=causal)
    head = _matmul(teacher.vocab_size, teacher.d_model, backward_products=1)
    if insertion is None or isinstance(insertion, PauseConfig):
        blocks = block.forward_only * teacher.n_layer
        return {"teacher_blocks": blocks, "teacher_head": PartFlops(head.forward)}
    layer = insertion.sae_layer
    _check_layer("concepts.sae_layer", layer, teacher)
    parts = {"teacher_blocks": block.forward_only * (layer + 1)}
    if isinstance(insertion, ConceptsConfig) and insertion.targets == "attribution":
        above = block.activation_gradient_only * (teacher.n_layer - 1 - layer)
        parts = {"teacher_blocks": parts["teacher_blocks"] + above, "teacher_head": head}
    if sae is not None:
        encoder = _matmul(sae.num_latents, teacher.d_model, backward_products=0)
        parts["sae_encoder"] = encoder // insertion.every
    if sae is not None and "teacher_head" in parts:
        dots = _matmul(sae.top_k, teacher.d_model, backward_products=0)
        parts["attribution"] = dots // insertion.every
    return parts


def flops_per_token(
    model: ModelConfig,
    insertion: Insertion | None,
    seq_len: int,
    teacher: TeacherShape | tuple[int, int, int] | None = None,
    sae: SaeShape | tuple[int, int] | None = None,
    *,
    causal: bool = True,
    prune_last_block: bool = True,
    concept_loss: bool = True,
) -> FlopsPerToken:
    """FLOPs per token of one training step of the student and, on the fly, of its targets.

    Args:
        model: the student's trunk.
        insertion: what its stream takes up, or None for a plain GPT-2.
        seq_len: tokens T of a sequence.
        teacher: (D_t, blocks, vocabulary) of the teacher, or None where nothing is computed with one. With
            no insertion it is a distillation's, which runs forward up to its head.
        sae: (M, K) of the autoencoder; given exactly when ``teacher`` is and concepts are inserted.
        causal: count a query's visible keys only; see the module's text.
        prune_last_block: the last block computes queries and MLP only where something is read. That is what
            the loss needs, so the MFU keeps True whatever the model does.
        concept_loss: whether concepts are predicted towards targets.

    Returns:
        Parts ``embeddings`` (0: a gather), ``blocks`` or ``blocks_below_insertion`` and
        ``blocks_above_insertion``, ``concept_head`` (W_pred) or ``state_head``, ``compress`` (W_comp on K
        values) or ``state_compress``, ``lm_head``, ``teacher_blocks``, ``teacher_head``, ``sae_encoder``,
        ``attribution`` (g . W_dec on K latents).

    Raises:
        ValueError: ``teacher`` without ``sae`` or the reverse, or ``concepts.sae_layer`` outside the teacher.
    """
    if isinstance(insertion, ConceptsConfig) and (teacher is None) != (sae is None):
        raise ValueError(f"teacher={teacher} and sae={sae} must be given together or not at all")
    parts = _trunk(model, insertion, seq_len, causal=causal, prune_last_block=prune_last_block)
    parts |= _insertion(model, insertion, has_loss=concept_loss)
    parts["lm_head"] = _matmul(model.vocab_size, model.d_model, backward_products=2)
    if teacher is not None:
        sae = None if sae is None else SaeShape(*sae)
        parts |= _frozen(insertion, seq_len, TeacherShape(*teacher), sae, causal=causal)
    return FlopsPerToken(parts)


def sae_flops_per_token(
    sae: SaeConfig, teacher: TeacherShape | tuple[int, int, int], seq_len: int, *, causal: bool = True
) -> FlopsPerToken:
    """FLOPs per token of one training step of a TopK sparse autoencoder on a teacher's residuals.

    Only K latents carry a gradient (and ``aux_top_k`` dead ones, whose pre-activations the encoder has
    computed already), so everything but the encoder's forward is sparse. Backward has two products for
    the decoder (values, rows) and two for the encoder (rows, pre-bias).

    Returns:
        Parts ``teacher_blocks`` (blocks 0..layer, forward), ``sae_encoder``, ``sae_decoder`` and
        ``sae_auxiliary``.

    Raises:
        ValueError: ``sae.layer`` outside the teacher.
    """
    teacher = TeacherShape(*teacher)
    _check_layer("sae.layer", sae.layer, teacher)
    block = _block(teacher.d_model, seq_len, causal=causal).forward_only
    active = 2 * sae.top_k * teacher.d_model
    auxiliary = 2 * sae.aux_top_k * teacher.d_model
    parts = {
        "teacher_blocks": block * (sae.layer + 1),
        "sae_encoder": PartFlops(2 * sae.num_latents * teacher.d_model, 2 * active),
        "sae_decoder": PartFlops(active, 2 * active),
        "sae_auxiliary": PartFlops(auxiliary, 4 * auxiliary),
    }
    return FlopsPerToken(parts)


def parameter_count(model: ModelConfig, insertion: Insertion | None) -> dict[str, int]:
    """Weights of the student by part; a tied LM head counts under ``token_embedding`` alone.

    Returns:
        ``token_embedding``, ``position_embedding``, ``blocks``, ``final_norm``, ``lm_head`` (0 when tied)
        and what is inserted: ``concept_head``, ``compress``, ``concept_pre_bias``; ``state_head``,
        ``state_compress``, ``concept_pre_bias``; or ``pause``.
    """
    width = model.d_model
    linears = (4 + 2 * MLP_EXPANSION) * width**2 + (3 + 1 + MLP_EXPANSION + 1) * width
    norms = 2 * 2 * width
    counts = {
        "token_embedding": model.vocab_size * width,
        "position_embedding": model.n_positions * width,
        "blocks": model.n_layer * (linears + norms),
        "final_norm": 2 * width,
        "lm_head": 0 if model.tied_head else model.vocab_size * width,
    }
    if insertion is None:
        return counts
    if isinstance(insertion, PauseConfig):
        return counts | {"pause": width}
    if isinstance(insertion, ConceptsConfig):
        size, head, compress = insertion.num_concepts, "concept_head", "compress"
    else:
        size, head, compress = insertion.width, "state_head", "state_compress"
    counts[head] = size * (width + 1)
    if insertion.mix != "none":
        counts[compress] = (size + 1) * width
    counts["concept_pre_bias"] = width
    return counts


def sae_parameter_count(d_model: int, num_latents: int) -> int:
    """Weights of a sparse autoencoder: encoder, decoder, latent bias and pre-bias."""
    return 2 * num_latents * d_model + num_latents + d_model


class _Gpu(NamedTuple):
    """Dense peaks in TFLOP/s (no structured sparsity, fp32 accumulation) of one GPU; None: no such unit."""

    words: str
    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float


# NVIDIA data sheets. A row matches where all its words stand in the device's name; the first match
# wins, so the PCIe variants come before the general name.
_GPUS = (
    _Gpu("GB200", 2500, 2500, 1250, 80),
    _Gpu("B200", 2250, 2250, 1125, 75),
    _Gpu("B100", 1750, 1750, 875, 60),
    _Gpu("GH200", 989, 989, 494, 67),
    _Gpu("H200 NVL", 835, 835, 418, 60),
    _Gpu("H200", 989, 989, 494, 67),
    _Gpu("H100 PCIe", 756, 756, 378, 51),
    _Gpu("H100 NVL", 835, 835, 418, 60),
    _Gpu("H100", 989, 989, 494, 67),
    _Gpu("H800 PCIe", 756, 756, 378, 51),
    _Gpu("H800", 989, 989, 494, 67),
    _Gpu("H20", 148, 148, 74, 44),
    _Gpu("A100", 312, 312, 156, 19.5),
    _Gpu("A800", 312, 312, 156, 19.5),
    _Gpu("A40", 149.7, 149.7, 74.8, 37.4),
    _Gpu("A30", 165, 165, 82, 10.3),
    _Gpu("A10", 125, 125, 62.5, 31.2),
    _Gpu("L40S", 362, 362, 183, 91.6),
    _Gpu("L40", 181, 181, 90.5, 90.5),
    _Gpu("L4", 121, 121, 60, 30.3),
    _Gpu("RTX 4090", 165, 165, 82.6, 82.6),
    _Gpu("RTX 3090", 71, 71, 35.6, 35.6),
    _Gpu("V100 PCIE", None, 112, None, 14),
    _Gpu("V100", None, 125, None, 15.7),
    _Gpu("T4", None, 65, None, 8.1),
)


def peak_flops(device_name: str, precision: Literal["bf16", "fp16", "tf32", "fp32"]) -> float | None:
    """Dense peak of one GPU in FLOP/s by its CUDA device name, None when it is not in the table.

    A MIG slice has a part of its card's units, so its peak is unknown too.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if "mig" in words:
        return None
    for gpu in _GPUS:
        if words.issuperset(gpu.words.lower().split()):
            tera: float | None = getattr(gpu, precision)
            return None if tera is None else tera * 1e12
    return None
