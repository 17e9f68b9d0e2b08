"""What a finished run leaves for others: weights in the published formats, written by rank 0."""

from __future__ import annotations

from pathlib import Path

from parallel.engine import Engine
from trainer.concepts.sae_formats import save_sae
from trainer.concepts.sae_training import SaeLearner
from trainer.config import RunConfig
from trainer.model.formats import save_model


def published_path(config: RunConfig) -> Path:
    """The file whose presence says that the run is published."""
    name = "sae.pt" if config.objective.name == "sae" else "model.safetensors"
    return Path(config.run.dir) / "model" / name


def publish(config: RunConfig, engine: Engine, tokenizer: str, *, is_main: bool) -> Path:
    """Write the trained weights below ``RUN/model``; a collective over all ranks.

    A student or teacher becomes a model folder (``trainer.model.formats``), an autoencoder the
    published .pt. The file appears whole or not at all.

    Args:
        config: the run's.
        engine: with the weights after the last step.
        tokenizer: SHA-256 of the one that made the run's tokens; noted beside the step.
        is_main: whether this rank writes.
    """
    path = published_path(config)
    state = engine.gather()
    if not is_main:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(engine.model, SaeLearner):
        save_sae(path, engine.model.to_sae(state))
    else:
        assert config.model is not None
        notes = {"step": str(config.train.steps), "tokenizer": tokenizer}
        save_model(path.parent, state, config.model, config.insertion, notes)
    return path
