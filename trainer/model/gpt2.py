"""The GPT-2 block stack: the frozen teacher, the next-token baseline and the trunk of CoCoMix.

Pre-LN blocks, learned positions, gelu with the tanh approximation, tied head unless configured
otherwise (Radford et al. 2019). Shape legend in docs/architecture.md: B microbatch, T tokens,
D width, H heads, V vocabulary.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.plan import ParallelPlan
from parallel.tensor import TensorGroup, local
from trainer.config import ModelConfig
from trainer.kernels.distillation import Distilled, distillation_loss
from trainer.kernels.lm_head import lm_head_loss
from trainer.kernels.matmul import linear
from trainer.model.documents import Documents, attention_mask
from trainer.model.padding import padded

TENSOR_DIMS = MappingProxyType(
    {
        "wte.weight": 0,
        "lm_head.weight": 0,
        "attn.qkv.weight": 0,
        "attn.qkv.bias": 0,
        "attn.proj.weight": 1,
        "mlp.fc.weight": 0,
        "mlp.fc.bias": 0,
        "mlp.proj.weight": 1,
        "mixer.predict.weight": 0,
        "mixer.predict.bias": 0,
        "mixer.compress_weight": 1,
    }
)
"""The dimension along which tensor parallelism splits a parameter, by the end of its name."""


class ConceptSums(NamedTuple):
    """Detached counts of how well concepts were predicted, summed over the microbatch."""

    num_targets: Tensor
    """() targets that are not masked."""
    num_recalled: Tensor
    """() of these, targets among the A largest concept logits."""
    rank_sum: Tensor
    """() their ranks among the M logits, 1 is best; 0 when ranks were not asked for."""
    ids: Tensor
    """(B, C, K) int64 concepts with the largest logits, at the C tokens that have concepts."""


class ModelOutput(NamedTuple):
    """What one forward returns; fields that were not asked for are ``None``."""

    loss_ntp: Tensor | None = None
    """() fp32 summed cross entropy of the next token, nats."""
    loss_concept: Tensor | None = None
    """() fp32 summed concept loss (mean over the A targets of a token) in nats, or distance of a state."""
    distilled: Distilled | None = None
    """Loss towards a teacher's distribution; in place of ``loss_ntp``."""
    logits: Tensor | None = None
    """(B, T, V), or (B, 1, V) with ``last_only``; only without labels."""
    concepts: ConceptSums | None = None


class TeacherHead(NamedTuple):
    """What a frozen GPT-2 of the same vocabulary says about a batch, short of its logits."""

    hidden: Tensor
    """(B, T, D_t) after its final LayerNorm."""
    weight: Tensor
    """(V, D_t) of its LM head, V padded."""
    divergence_weight: float
    """Of KL(teacher || student) beside the cross entropy."""
    temperature: float
    """Divides the logits of both in the divergence."""


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the width; every tensor-parallel rank normalises its part of the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        return F.layer_norm(x, self.normalized_shape, local(self.weight), local(self.bias), self.eps)


Positions = slice | Tensor
"""Some positions of a sequence, ascending: every so many of them, or an index (R,) int64."""


def take(x: Tensor, positions: Positions) -> Tensor:
    """What stands at some positions of x (B, T, ...): (B, R, ...)."""
    return x[:, positions] if isinstance(positions, slice) else x.index_select(1, positions)


class Past(Protocol):
    """Keys and values of the positions before those that a block is given (``trainer.model.decoding``)."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, read: Positions | None) -> Tensor:
        """Take new keys and values (B, H, T, D/H) in; attend from queries (B, H, R, D/H) of ``read``."""
        ...


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values.

    The rows of the fused weight are ordered (head, query/key/value, feature), so that a contiguous part
    of them is a number of whole heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.d_model // config.n_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)
        self.tp = TensorGroup()

    def forward(
        self,
        x: Tensor,
        read: Positions | None = None,
        past: Past | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from all positions of x (B, T, D), or from those of ``read`` only: (B, R, D).

        With ``past``, x are the positions after those that it holds; it takes them in. With ``mask``, which
        is (B, 1, T, T) and added to the scores, a position sees what that leaves of those before it.
        """
        x = self.tp.gather_sequence(x)
        if read is None:
            query, key, value = self._project(x, slice(None))
        else:
            (query,) = self._project(take(x, read), slice(0, 1))
            key, value = self._project(x, slice(1, 3))
        if past is not None:
            mixed = past.attend(query, key, value, read)
        elif mask is not None:
            mask = mask if read is None else mask[:, :, read]
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        elif read is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            position = torch.arange(x.shape[1], device=x.device)
            mask = position <= position[read].unsqueeze(1)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        partial = linear(mixed.transpose(1, 2).flatten(2), local(self.proj.weight))
        return self.tp.sum_to_sequence(partial) + local(self.proj.bias)

    def _project(self, x: Tensor, which: slice) -> tuple[Tensor, ...]:
        """Queries, keys and values, or those of ``which``: each (B, H/tp, T, D/H)."""
        by_kind = (-1, 3, self.head_dim)
        weight = local(self.qkv.weight).unflatten(0, by_kind)[:, which].flatten(0, 2)
        bias = local(self.qkv.bias).unflatten(0, by_kind)[:, which].flatten()
        kinds = len(range(3)[which])
        # As rows: of every other position of x it is a product and a sum on their own otherwise.
        out = linear(x.flatten(0, 1), weight, bias)
        num_heads = out.shape[-1] // (kinds * self.head_dim)
        # Not -1: a rank may have no rows at all.
        return out.view(*x.shape[:2], num_heads, kinds, self.head_dim).permute(3, 0, 2, 1, 4).unbind(0)


class MLP(nn.Module):
    """Two linear layers around gelu, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.proj = nn.Linear(4 * config.d_model, config.d_model)
        self.tp = TensorGroup()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D) -> (B, T, D)."""
        x = self.tp.gather_sequence(x)
        inner = F.gelu(linear(x, local(self.fc.weight), local(self.fc.bias)), approximate="tanh")
        partial = linear(inner, local(self.proj.weight))
        return self.tp.sum_to_sequence(partial) + local(self.proj.bias)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        read: Positions | None = None,
        past: Past | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Update all positions of x (B, T, D).

        With ``read`` only those positions are returned, (B, R, D): the others serve as keys and values
        and cost neither queries nor MLP. For a last block of which not everything is read. With ``past``
        x are the positions that follow it. ``mask`` as for :class:`Attention`.
        """
        return self.transform(self.attend(x, read, past, mask))

    def attend(
        self,
        x: Tensor,
        read: Positions | None = None,
        past: Past | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The first sublayer: x and what its positions learn from those before them."""
        attended: Tensor = self.attn(self.ln_1(x), read, past, mask)
        if isinstance(read, Tensor):
            # With tensor parallelism x is a part of the sequence; the pattern is the same in every part.
            read = read[: attended.shape[1]]
        return (x if read is None else take(x, read)) + attended

    def transform(self, x: Tensor) -> Tensor:
        """The second sublayer: x and what the MLP makes of each position."""
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT2(nn.Module):
    """Decoder-only language model with learned positions.

    The losses are computed inside ``forward``: a sharded weight is whole only there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(padded(config.vocab_size), config.d_model)
        self.wpe = nn.Embedding(config.n_positions, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.lm_head = (
            None if config.tied_head else nn.Linear(config.d_model, padded(config.vocab_size), bias=False)
        )
        self.tp = TensorGroup()

    @property
    def plan(self) -> ParallelPlan:
        """Each block is one unit; embeddings, head and what a subclass adds belong to the root."""
        blocks = tuple(f"blocks.{i}" for i in range(self.config.n_layer))
        return ParallelPlan(
            fsdp_units=blocks,
            compiled=blocks,
            recomputed=blocks,
            partly_recomputed=tuple(
                f"{block}.{part}" for block in blocks for part in ("attend", "transform")
            ),
            tensor_dims=TENSOR_DIMS,
            tensor_divides={"model.n_head": self.config.n_head},
        )

    @property
    def head_weight(self) -> Tensor:
        """(V, D) weight of the LM head, V padded; under tensor parallelism this rank's rows."""
        return local(self.wte.weight if self.lm_head is None else self.lm_head.weight)

    def embed(self, input_ids: Tensor, documents: Documents | None = None) -> Tensor:
        """input_ids: (B, T) int64 -> residual stream before block 0, (B, T, D)."""
        length = input_ids.shape[1]
        mine = self.tp.split(length)
        if documents is None:
            positions = torch.arange(mine.start, mine.stop, device=input_ids.device)
        else:
            positions = documents.positions[:, mine]
        if self.tp.size == 1:
            tokens = F.embedding(input_ids, self.wte.weight)
        else:
            rows = self.tp.split(padded(self.config.vocab_size))
            here = (input_ids >= rows.start) & (input_ids < rows.stop)
            index = (input_ids - rows.start).masked_fill(~here, 0)
            found = F.embedding(index, local(self.wte.weight)) * here.unsqueeze(-1)
            tokens = self.tp.sum_to_sequence(found)
        # What is appended to make whole parts may lie beyond the last position; nobody reads it.
        positions = positions.clamp_max(self.config.n_positions - 1)
        out: Tensor = tokens + F.embedding(positions, local(self.wpe.weight))
        return out

    def run_blocks(self, x: Tensor, start: int, stop: int, mask: Tensor | None = None) -> Tensor:
        """Apply blocks start..stop-1 to x (B, T, D); ``mask`` as for :class:`Attention`."""
        for index in range(start, stop):
            x = self.blocks[index](x, mask=mask)
        return x

    def head_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Summed cross entropy in nats from the last block's output x (B, T, D) and labels (B, T)."""
        hidden = self.tp.gather_sequence(self.ln_f(x))
        return lm_head_loss(
            hidden.flatten(0, 1), self.head_weight, labels.flatten(), self.config.vocab_size, self.tp
        )

    def head_logits(self, x: Tensor, length: int, *, last_only: bool) -> Tensor:
        """Next-token logits (B, ``length`` or 1, V) from the last block's output x.

        Not differentiable under tensor parallelism: training reads losses.
        """
        hidden = self.tp.gather_sequence(self.ln_f(x))[:, :length]
        logits = linear(hidden[:, -1:] if last_only else hidden, self.head_weight)
        if self.tp.size > 1:
            logits = self.tp.all_gather(logits).movedim(0, -2).flatten(-2)
        return logits[..., : self.config.vocab_size]

    def whole_parts(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) with zeros behind, so that tensor-parallel ranks get equal parts.

        Causality keeps what is appended from changing anything before it.
        """
        return F.pad(input_ids, (0, -input_ids.shape[1] % self.tp.size))

    def head_distillation(self, x: Tensor, labels: Tensor, teacher: TeacherHead) -> Distilled:
        """Summed loss of the last block's output x (B, T, D) towards labels (B, T) and a teacher."""
        hidden = self.tp.gather_sequence(self.ln_f(x))
        return distillation_loss(
            hidden.flatten(0, 1),
            self.head_weight,
            teacher.hidden.flatten(0, 1),
            teacher.weight,
            labels.flatten(),
            self.config.vocab_size,
            divergence_weight=teacher.divergence_weight,
            temperature=teacher.temperature,
            tp=self.tp,
        )

    def read_out(
        self,
        x: Tensor,
        labels: Tensor | None,
        length: int,
        *,
        last_only: bool,
        teacher: TeacherHead | None = None,
    ) -> ModelOutput:
        """Loss where there are labels, logits of the first ``length`` positions where there are none."""
        if labels is None:
            return ModelOutput(logits=self.head_logits(x, length, last_only=last_only))
        if teacher is not None:
            return ModelOutput(distilled=self.head_distillation(x, labels, teacher))
        return ModelOutput(loss_ntp=self.head_loss(x, labels))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        last_only: bool = False,
        teacher: TeacherHead | None = None,
        documents: Documents | None = None,
    ) -> ModelOutput:
        """Summed loss of ``labels``, or logits without them.

        Args:
            input_ids: (B, T) int64, T at most ``config.n_positions``; with labels a multiple of the
                tensor-parallel ranks.
            labels: (B, T) int64, the next token of each position, ``IGNORED_LABEL`` for none.
            last_only: logits of the last position only, (B, 1, V).
            teacher: with labels, what else to learn from.
            documents: those of ``input_ids``, each of which is computed as if it were alone; T is a multiple
                of the tensor-parallel ranks then. With ``None`` a row is one document.
        """
        length = input_ids.shape[1]
        x = self.stream_after(self.whole_parts(input_ids), self.config.n_layer, documents)
        return self.read_out(x, labels, length, last_only=last_only, teacher=teacher)

    def stream_after(self, input_ids: Tensor, blocks: int, documents: Documents | None = None) -> Tensor:
        """Residual stream (B, T, D) after so many ``blocks``; documents as for :meth:`forward`."""
        x = self.embed(input_ids, documents)
        mask = None if documents is None else attention_mask(documents.ids, x.dtype)
        return self.run_blocks(x, 0, blocks, mask)

    def residual_after(self, input_ids: Tensor, layer: int, documents: Documents | None = None) -> Tensor:
        """Residual stream after block ``layer`` (0-based), (B, T, D)."""
        return self.stream_after(input_ids, layer + 1, documents)

    def final_hidden(self, input_ids: Tensor, documents: Documents | None = None) -> Tensor:
        """What the LM head reads, (B, T, D)."""
        hidden: Tensor = self.ln_f(self.stream_after(input_ids, self.config.n_layer, documents))
        return hidden

    def loss_from_residual(
        self, residual: Tensor, labels: Tensor, layer: int, documents: Documents | None = None
    ) -> Tensor:
        """Summed next-token loss in nats of a residual (B, T, D) put in after block ``layer``."""
        mask = None if documents is None else attention_mask(documents.ids, residual.dtype)
        x = self.run_blocks(residual, layer + 1, self.config.n_layer, mask)
        return self.head_loss(x, labels)
