"""From a configuration to the student that it describes, and back."""

from __future__ import annotations

from trainer.config import ConceptsConfig, Insertion, ModelConfig, PauseConfig
from trainer.model.ablations import PauseGPT2, RegressionGPT2
from trainer.model.cocomix import CoCoMix, MixingGPT2
from trainer.model.gpt2 import GPT2


def build_student(model: ModelConfig, insertion: Insertion | None) -> GPT2:
    """A student without values, on the default device; a plain GPT-2 where nothing is inserted."""
    if insertion is None:
        return GPT2(model)
    if isinstance(insertion, PauseConfig):
        return PauseGPT2(model, insertion)
    if isinstance(insertion, ConceptsConfig):
        return CoCoMix(model, insertion)
    return RegressionGPT2(model, insertion)


def insertion_of(model: GPT2) -> Insertion | None:
    """What a model's stream takes up, ``None`` for a plain GPT-2."""
    return model.insertion if isinstance(model, MixingGPT2) else None
