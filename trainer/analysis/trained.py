"""Open what a run trained: from its directory, while it runs or after, or from an exported folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.manifest import TOKENIZER_NAME
from data.source import open_tokenizer
from data.tokenizer import Tokenizer, load_tokenizer
from trainer.checkpoint.io import load_newest_model
from trainer.concepts.extractor import load_teacher
from trainer.concepts.sae import TopKSae
from trainer.concepts.sae_formats import check_fits, load_sae
from trainer.config import RunConfig
from trainer.config_io import load_config
from trainer.model.formats import load_model, read_notes
from trainer.model.gpt2 import GPT2
from trainer.model.student import build_student
from trainer.publish import published_path


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A language model on the CPU, frozen and in evaluation."""

    path: Path
    """What was opened."""
    source: str
    """Where the weights come from, to be shown."""
    model: GPT2
    tokenizer: Tokenizer
    config: RunConfig | None
    """The run's; ``None`` for a model folder."""
    step: int | None
    """Optimizer steps behind the weights; ``None`` for a model folder."""

    @property
    def document_end(self) -> int | None:
        """The token between documents that did not see each other in training, ``None`` where they did."""
        masked = self.config is not None and self.config.data.mask_documents
        return self.tokenizer.eot_id if masked else None


@dataclass(frozen=True, slots=True)
class _Weights:
    """A model, and what is known of it."""

    model: GPT2
    source: str
    step: int | None = None
    tokenizer: str = ""
    """SHA-256 of the tokenizer behind its training; empty where nobody noted it."""


def open_trained(path: Path, tokenizer: Path | None = None) -> TrainedModel:
    """Open a run directory or a model folder.

    A run that is published is read from ``RUN/model``, unless it was continued since: then, and where it is
    not published, from its newest good checkpoint.

    Args:
        path: directory of a run, or folder with weights and config.json.
        tokenizer: as for :func:`data.tokenizer.load_tokenizer`; by default the run's data folder or the
            model folder itself has one.

    Raises:
        ValueError: it is the run of an autoencoder, has no weights yet, or its tokenizer does not fit.
        OSError, DataError, CheckpointError: missing or damaged files.
    """
    if not path.is_dir():
        raise FileNotFoundError(2, "no such run directory or model folder", str(path))
    config = None
    if is_run(path):
        config = load_config(RunConfig, path / "config.yaml")
        weights = _open_run(path, config)
    else:
        file = path / "model.safetensors"
        notes = read_notes(file) if file.is_file() else {}
        weights = _Weights(load_model(path), str(path), tokenizer=notes.get("tokenizer", ""))
    loaded = _tokenizer(path, config, tokenizer)
    _check_tokenizer(path, weights, loaded)
    model = weights.model.requires_grad_(False).eval()
    return TrainedModel(path, weights.source, model, loaded, config, weights.step)


def _check_tokenizer(path: Path, weights: _Weights, tokenizer: Tokenizer) -> None:
    size = weights.model.config.vocab_size
    if tokenizer.vocab_size > size:
        raise ValueError(
            f"{path}: its vocabulary has {size} tokens, so a tokenizer of {tokenizer.vocab_size} "
            "is not its own"
        )
    if weights.tokenizer and weights.tokenizer != tokenizer.sha256:
        raise ValueError(
            f"{path}: was trained on tokens of tokenizer {weights.tokenizer[:12]}..., not "
            f"{tokenizer.sha256[:12]}...: give its own with --tokenizer"
        )


def _tokenizer(path: Path, config: RunConfig | None, given: Path | None) -> Tokenizer:
    data = None if config is None else next(iter(config.data.by_source.values()))
    if given is None and data is not None and data.is_remote:
        return open_tokenizer(data)
    place = given or (path if data is None else Path(data.dir))
    if given is None and not _has_tokenizer(place):
        raise FileNotFoundError(2, f"no {TOKENIZER_NAME} there: give --tokenizer", str(place))
    return load_tokenizer(place)


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory; a model folder may hold a config.yaml beside its config.json."""
    return (path / "config.yaml").is_file() and not (path / "config.json").is_file()


def _has_tokenizer(place: Path) -> bool:
    return any((place / name).is_file() for name in (TOKENIZER_NAME, "vocab.json"))


def _open_run(path: Path, config: RunConfig) -> _Weights:
    if config.objective.name == "sae":
        raise ValueError(f"{path}: objective.name=sae trains no language model")
    file = path / "model" / published_path(config).name  # the run may have been moved since
    total = config.train.steps
    if not file.is_file():
        found = _newest_checkpoint(path, config)
        if found is None:
            raise ValueError(f"{path}: has no weights yet, neither model/ nor a checkpoint")
        return found
    notes = read_notes(file)
    step = int(notes.get("step", total))
    found = None if step == total else _newest_checkpoint(path, config, after=step)
    if found is not None:
        return replace(found, source=f"{found.source}, newer than model/ of step {step}")
    of_step = "" if step == total else f" of step {step} of {total}"
    return _Weights(load_model(file.parent), f"{file.parent}{of_step}", step, notes.get("tokenizer", ""))


def _newest_checkpoint(path: Path, config: RunConfig, after: int = -1) -> _Weights | None:
    """Weights of the newest good checkpoint behind step ``after``."""
    assert config.model is not None
    with torch.device("meta"):
        model = build_student(config.model, config.insertion)
    model.to_empty(device="cpu")
    found = load_newest_model(path / "checkpoints", model.state_dict(), after=after)
    if found is None:
        return None
    source = f"checkpoint of step {found.step} of {config.train.steps}"
    return _Weights(model, source, found.step, str(found.info.get("tokenizer", "")))


def open_teacher(trained: TrainedModel) -> tuple[GPT2, TopKSae, int]:
    """Teacher, autoencoder and the layer between them, as the run's ``concepts`` section names them.

    Raises:
        ValueError: it is not the directory of a run with such a section, or the parts do not fit.
        OSError: a path does not exist any more.
    """
    if trained.config is None or trained.config.concepts is None:
        raise ValueError(f"{trained.path}: --teacher needs the directory of a run with a concepts section")
    concepts = trained.config.concepts
    teacher = load_teacher(concepts.teacher, concepts.sae_layer, key="concepts.sae_layer")
    sae = load_sae(concepts.sae, layer=concepts.sae_layer)
    check_fits(sae, teacher.config.d_model, concepts.num_concepts)
    return teacher, sae, concepts.sae_layer
