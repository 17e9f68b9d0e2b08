"""The GPT-2 block stack: the frozen teacher, the next-token baseline and the trunk of CoCoMix.

Pre-LN blocks, learned positions, gelu with the tanh approximation, tied head unless configured
otherwise (Radford et al. 2019). Shape legend in docs/architecture.md: B microbatch, T tokens,
D width, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.plan import ParallelPlan
from trainer.config import ModelConfig
from trainer.kernels.lm_head import lm_head_loss


class ConceptSums(NamedTuple):
    """Detached counts of how well concepts were predicted, summed over the microbatch."""

    num_targets: Tensor
    """() targets that are not masked."""
    num_recalled: Tensor
    """() of these, targets among the A largest concept logits."""
    rank_sum: Tensor
    """() their ranks among the M logits, 1 is best; 0 when ranks were not asked for."""
    ids: Tensor
    """(B, T, K) int64 concepts that the student mixes in."""


class ModelOutput(NamedTuple):
    """What one forward returns; fields that were not asked for are ``None``."""

    loss_ntp: Tensor | None = None
    """() fp32 summed cross entropy of the next token, nats."""
    loss_concept: Tensor | None = None
    """() fp32 summed concept loss (mean over the A targets of a token), nats."""
    logits: Tensor | None = None
    """(B, T, V), or (B, 1, V) with ``last_only``; only without labels."""
    concepts: ConceptSums | None = None


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, read: slice | None = None) -> Tensor:
        """Attend from all positions of x (B, T, D), or from those of ``read`` only: (B, R, D)."""
        if read is None:
            query, key, value = map(self._split_heads, self.qkv(x).chunk(3, dim=-1))
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            width = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            query = self._split_heads(F.linear(x[:, read], weight[:width], bias[:width]))
            key, value = map(self._split_heads, F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1))
            position = torch.arange(x.shape[1], device=x.device)
            mask = position <= position[read].unsqueeze(1)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, D/H)."""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers around gelu, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        out: Tensor = self.proj(F.gelu(self.fc(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, read: slice | None = None) -> Tensor:
        """Update all positions of x (B, T, D).

        With ``read`` only those positions are returned, (B, R, D): the others serve as keys and values
        and cost neither queries nor MLP. For a last block of which not everything is read.
        """
        attended = self.attn(self.ln_1(x), read)
        x = (x if read is None else x[:, read]) + attended
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT2(nn.Module):
    """Decoder-only language model with learned positions.

    The losses are computed inside ``forward``: a sharded weight is whole only there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.n_positions, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.lm_head = None if config.tied_head else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def plan(self) -> ParallelPlan:
        """Each block is one FSDP unit; embeddings, head and what a subclass adds belong to the root."""
        return ParallelPlan(fsdp_units=tuple(f"blocks.{i}" for i in range(self.config.n_layer)))

    @property
    def head_weight(self) -> Tensor:
        """(V, D) weight of the LM head."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, T) int64 -> residual stream before block 0, (B, T, D)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        out: Tensor = self.wte(input_ids) + self.wpe(positions)
        return out

    def run_blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Apply blocks start..stop-1 to x (B, T, D)."""
        for index in range(start, stop):
            x = self.blocks[index](x)
        return x

    def head_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Summed cross entropy in nats from the last block's output x (B, T, D) and labels (B, T)."""
        hidden = self.ln_f(x)
        return lm_head_loss(hidden.flatten(0, 1), self.head_weight, labels.flatten())

    def head_logits(self, x: Tensor, *, last_only: bool) -> Tensor:
        """Next-token logits (B, T or 1, V) from the last block's output x (B, T, D)."""
        return F.linear(self.ln_f(x[:, -1:] if last_only else x), self.head_weight)

    def read_out(self, x: Tensor, labels: Tensor | None, *, last_only: bool) -> ModelOutput:
        """Loss where there are labels, logits where there are none."""
        if labels is None:
            return ModelOutput(logits=self.head_logits(x, last_only=last_only))
        return ModelOutput(loss_ntp=self.head_loss(x, labels))

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, *, last_only: bool = False
    ) -> ModelOutput:
        """Summed loss of ``labels``, or logits without them.

        Args:
            input_ids: (B, T) int64, T at most ``config.n_positions``.
            labels: (B, T) int64, the next token of each position, ``IGNORED_LABEL`` for none.
            last_only: logits of the last position only, (B, 1, V).
        """
        x = self.run_blocks(self.embed(input_ids), 0, self.config.n_layer)
        return self.read_out(x, labels, last_only=last_only)

    def residual_after(self, input_ids: Tensor, layer: int) -> Tensor:
        """Residual stream after block ``layer`` (0-based), (B, T, D)."""
        return self.run_blocks(self.embed(input_ids), 0, layer + 1)

    def loss_from_residual(self, residual: Tensor, labels: Tensor, layer: int) -> Tensor:
        """Summed next-token loss in nats of a residual (B, T, D) put in after block ``layer``."""
        x = self.run_blocks(residual, layer + 1, self.config.n_layer)
        return self.head_loss(x, labels)
