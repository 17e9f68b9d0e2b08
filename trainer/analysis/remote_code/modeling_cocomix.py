"""CoCoMix for the transformers library: a GPT-2 with one continuous concept mixed in after every token.

LLM Pretraining with Continuous Concepts, arXiv 2502.08524. This file needs torch and transformers alone.
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` loads it with the weights.

Shapes: B rows, T new tokens, S tokens so far, D width, H heads, M concepts, K concepts kept per token.
Blocks from ``cocomix.insert_layer`` on work on two positions per token, the token's and its concept's, so
their cached keys are twice as long as those of the blocks before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

_STD_EPS = 1e-5  # added to the standard deviation, not to the variance


class CoCoMixConfig(PretrainedConfig):
    """GPT-2's sizes, and ``cocomix`` with ``num_concepts`` M, ``top_k`` K and ``insert_layer``."""

    model_type = "cocomix_gpt2"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012  (the library's own form)
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_embd: int = 512,
        n_layer: int = 8,
        n_head: int = 8,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        cocomix: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.cocomix = cocomix or {"num_concepts": 32768, "top_k": 32, "insert_layer": 3}
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings


class CoCoMixAttention(nn.Module):
    """Causal self-attention over the positions so far."""

    def __init__(self, config: CoCoMixConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.n_head
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, past: DynamicCache | None) -> Tensor:
        """New positions x (B, R, D) attend to what ``mask`` (B or 1, 1, R, all) lets them see."""
        heads = self.c_attn(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        if past is not None:
            key, value = past.update(key, value, self.layer)
        # Without a mask there is nothing before the new positions, or one query at the end of all.
        is_causal = mask is None and query.shape[2] > 1
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
        out: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return out


class CoCoMixMLP(nn.Module):
    """Two linear layers around gelu."""

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(4 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, 4 * config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, R, D) -> (B, R, D)."""
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return out


class CoCoMixBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: CoCoMixConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CoCoMixAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = CoCoMixMLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, past: DynamicCache | None) -> Tensor:
        """x: (B, R, D) -> (B, R, D)."""
        x = x + self.attn(self.ln_1(x), mask, past)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class CoCoMixPreTrainedModel(PreTrainedModel):
    """What the library must know."""

    config_class = CoCoMixConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["CoCoMixBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    # Cutting n tokens off the cache would leave the upper blocks n concepts too long.
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        # Functions of nn.init alone: the library makes them skip weights that a file has filled.
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)


class CoCoMixModel(CoCoMixPreTrainedModel):
    """Token ids to the hidden states that predict the next tokens."""

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__(config)
        num_concepts = config.cocomix["num_concepts"]
        self.insert_layer = config.cocomix["insert_layer"]
        self.top_k = config.cocomix["top_k"]
        self.wte: nn.Module = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([CoCoMixBlock(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.pre_bias = nn.Parameter(torch.zeros(config.n_embd))
        self.concept_predictor = nn.Linear(config.n_embd, num_concepts)
        self.compress_layer = nn.Linear(num_concepts, config.n_embd)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.wte = value

    def num_cached_tokens(self, past: DynamicCache | None) -> int:
        """Tokens whose keys are in the cache."""
        if past is None:
            return 0
        return int(past.get_seq_length(0)) // (2 if self.insert_layer == 0 else 1)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: DynamicCache | None,
    ) -> Tensor:
        """inputs_embeds (B, T, D) of new tokens -> hidden states (B, T, D) behind the final LayerNorm."""
        num_new, seen = inputs_embeds.shape[1], self.num_cached_tokens(past)
        present = self._present(attention_mask, seen + num_new)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + num_new, device=inputs_embeds.device).unsqueeze(0)
            if present is not None:
                position_ids = (present.long().cumsum(-1) - 1).clamp_min(0)[:, -num_new:]
        x = inputs_embeds + self.wpe(position_ids)
        below, above = self.h[: self.insert_layer], self.h[self.insert_layer :]
        mask = _mask(present, seen, num_new, x.device)
        for block in below:
            x = block(x, mask, past)
        x = torch.stack((x, self.concepts(x)), dim=2).flatten(1, 2)  # token first
        present = None if present is None else present.repeat_interleave(2, dim=1)
        mask = _mask(present, 2 * seen, 2 * num_new, x.device)
        for block in above:
            x = block(x, mask, past)
        out: Tensor = self.ln_f(x[:, 1::2])
        return out

    def _present(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        if attention_mask is None or bool(attention_mask.all()):
            return None
        if attention_mask.shape[1:] != (length,):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, it must be (rows, {length}): "
                "1 for each token so far that is not padding"
            )
        return attention_mask.bool()

    def concepts(self, h: Tensor) -> Tensor:
        """Continuous concepts (B, T, D) of a residual stream h (B, T, D)."""
        wide = h.float()
        mean, std = wide.mean(-1, keepdim=True), wide.std(-1, keepdim=True)
        u = (wide - mean) / (std + _STD_EPS) - self.pre_bias.float()
        logits = self.concept_predictor(u.to(h.dtype)).float()
        values, ids = logits.topk(self.top_k, dim=-1)
        mixed = self._compress(values.to(h.dtype), ids).float() + self.pre_bias.float()
        return (mixed * std + mean).to(h.dtype)

    def _compress(self, values: Tensor, ids: Tensor) -> Tensor:
        """compress_layer of vectors with the K non-zero entries ``values`` at ``ids``, both (B, T, K)."""
        weight = self.compress_layer.weight
        if ids.numel() < weight.shape[1]:  # few tokens: read the columns that they need
            return torch.einsum("btk,dbtk->btd", values, weight[:, ids]) + self.compress_layer.bias
        dense = values.new_zeros(*ids.shape[:-1], weight.shape[1]).scatter(-1, ids, values)
        out: Tensor = self.compress_layer(dense)
        return out


def _mask(present: Tensor | None, start: int, num_new: int, device: torch.device) -> Tensor | None:
    """What R new positions see, (B or 1, 1, R, start + R) bool; ``None`` where that is plainly causal.

    Args:
        present: (B, start + R) bool, positions that are no padding; ``None`` when all are.
        start: positions before the new ones.
        num_new: R.
        device: of the mask.
    """
    if present is None and (start == 0 or num_new == 1):
        return None
    column = torch.arange(start + num_new, device=device)
    row = column[start:].unsqueeze(1)
    mask = (column <= row)[None, None]
    if present is not None:
        # Padding sees itself: a softmax over nothing is not a number.
        mask = mask & present[:, None, None, :] | (column == row)
    return mask


class CoCoMixForCausalLM(CoCoMixPreTrainedModel, GenerationMixin):
    """CoCoMix with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012  (the library's form)

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__(config)
        self.transformer = CoCoMixModel(config)
        self.lm_head: nn.Module = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language-model head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: (B, T) int64, the tokens that are not in the cache yet.
            attention_mask: (B, S) over all tokens so far, 0 for padding on either side.
            position_ids: (B, T); by default padding does not count.
            past_key_values: cache of the tokens before.
            inputs_embeds: (B, T, D) instead of ``input_ids``.
            labels: (B, T), shifted inside; -100 is ignored.
            use_cache: whether keys and values are kept; by default ``config.use_cache``.
            logits_to_keep: how many last positions get logits, 0 for all; or their indices.
            kwargs: passed on to the library's loss function.
        """
        if inputs_embeds is None:
            inputs_embeds = self.transformer.wte(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        if past_key_values is not None and not isinstance(past_key_values, DynamicCache):
            raise ValueError(
                f"cache of type {type(past_key_values).__name__} must be a DynamicCache: "
                "some blocks keep one position per token, others two"
            )
        hidden = self.transformer(inputs_embeds, attention_mask, position_ids, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None
        )
