"""Continue token sequences with a language model of any kind, sharded or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def continue_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    max_context: int,
    device: torch.device,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> list[list[int]]:
    """Sample ``new_tokens`` tokens after each prompt.

    The whole context is run again for every token. Ranks that share a sharded model must call this
    together with equal arguments; they then draw equal tokens.

    Args:
        model: maps (1, t) token ids to ``logits`` (1, 1, V) with ``last_only=True``.
        prompts: token ids, at least one each.
        max_context: positions of the model; older tokens are dropped.
        temperature: divides the logits; 0 takes the largest.
        top_k: draw among the k largest logits; 0 draws among all.
        seed: of the draws.

    Returns:
        For each prompt the prompt's ids followed by the new ones.

    Raises:
        ValueError: an empty prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    results = []
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt must have at least one token")
        ids = list(prompt)
        for _ in range(new_tokens):
            context = torch.tensor([ids[-max_context:]], device=device)
            logits = model(context, last_only=True).logits[0, -1].float().cpu()
            ids.append(_draw(logits, temperature, top_k, generator))
        results.append(ids)
    model.train(was_training)
    return results


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        kept = logits.topk(min(top_k, logits.shape[0]))
        choice = torch.multinomial((kept.values / temperature).softmax(-1), 1, generator=generator)
        return int(kept.indices[choice])
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
