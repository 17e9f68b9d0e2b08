"""Models of a few thousand weights, with random weights large enough that every path matters."""

from __future__ import annotations

import torch

from trainer.config import ConceptsConfig, ModelConfig
from trainer.model.cocomix import CoCoMix
from trainer.model.formats import Layout
from trainer.model.gpt2 import GPT2


def tiny_config(*, n_layer: int = 3, vocab_size: int = 61, d_model: int = 16) -> ModelConfig:
    """Odd vocabulary, three blocks."""
    return ModelConfig(d_model=d_model, n_layer=n_layer, n_head=2, vocab_size=vocab_size, n_positions=24)


def tiny_concepts(*, insert_layer: int = 1, teacher: str = "", sae: str = "") -> ConceptsConfig:
    """Odd dictionary of 53 concepts."""
    return ConceptsConfig(
        teacher=teacher,
        sae=sae,
        sae_layer=1,
        insert_layer=insert_layer,
        num_concepts=53,
        top_k=5,
        num_targets=3,
    )


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Every parameter, biases too, from N(0, 0.2); LayerNorm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    assert isinstance(model, GPT2)
    layout = Layout.of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            parameter.copy_(layout.adopt(name, layout.publish(name, parameter)))  # padding at 0
            if "ln_" in name and name.endswith("weight"):
                parameter += 1.0


def tiny_cocomix(*, insert_layer: int = 1, seed: int = 0) -> CoCoMix:
    """A randomised CoCoMix."""
    model = CoCoMix(tiny_config(), tiny_concepts(insert_layer=insert_layer))
    randomize(model, seed)
    return model


def tiny_gpt2(*, seed: int = 0, n_layer: int = 3, d_model: int = 16, vocab_size: int = 61) -> GPT2:
    """A randomised GPT-2."""
    model = GPT2(tiny_config(n_layer=n_layer, d_model=d_model, vocab_size=vocab_size))
    randomize(model, seed)
    return model
