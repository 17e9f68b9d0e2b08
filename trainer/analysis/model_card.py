"""The model card of an exported folder: only what configuration, manifest and records say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from data.config import DataConfig
from data.manifest import DataError
from data.source import open_manifest
from trainer.analysis.curves import LOSS_KEY
from trainer.analysis.trained import TrainedModel
from trainer.config import ConceptsConfig, RunConfig
from trainer.flops import parameter_count
from trainer.metrics.json_lines import read_json_lines
from trainer.model.cocomix import CoCoMix
from trainer.model.student import insertion_of

Row = tuple[str, object]

_KINDS = {
    "ntp": "A GPT-2 trained with next-token prediction.",
    "kd": "A GPT-2 trained with next-token prediction and towards a teacher's token distribution.",
    "cocomix": "A GPT-2 trained with continuous concepts (CoCoMix, "
    "[arXiv 2502.08524](https://arxiv.org/abs/2502.08524)): it predicts concepts of a sparse autoencoder and "
    "mixes them into its hidden states, one more position after every token.",
}


def model_card(trained: TrainedModel, name: str, layout: str) -> str:
    """README.md of an exported folder.

    Args:
        trained: the model and, where there is one, its run.
        name: title.
        layout: ``hf`` or ``authors``.
    """
    is_cocomix = isinstance(trained.model, CoCoMix)
    tags = ["gpt2", *(["cocomix", "continuous-concepts"] if is_cocomix else [])]
    parts = [
        _front_matter(tags),
        f"# {name}",
        _kind(trained),
        _usage(name, layout, is_cocomix=is_cocomix),
        "## Model",
        _table(_model_rows(trained)),
    ]
    if trained.config is not None:
        data = _data_rows(trained.config.data)
        parts += ["## Training data", _table(data), "## Training", _table(_training_rows(trained.config))]
        parts += ["All settings: `training_config.yaml`.", "## Results", _results(trained)]
    else:
        parts.append(f"Written from `{trained.path}`, which holds no record of the training.")
    return "\n\n".join(parts) + "\n"


def _kind(trained: TrainedModel) -> str:
    if isinstance(trained.model, CoCoMix):
        return _KINDS["cocomix"]
    is_distilled = trained.config is not None and trained.config.objective.name == "kd"
    return _KINDS["kd" if is_distilled else "ntp"]


def _front_matter(tags: Sequence[str]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _usage(name: str, layout: str, *, is_cocomix: bool) -> str:
    if is_cocomix and layout == "authors":
        return (
            "In the layout of the authors' code: `GPT2CoCoMixLMHeadModel.from_pretrained` reads the folder, "
            "its further arguments stand in `config.yaml`. Other classes leave the concepts out silently."
        )
    trust = ", trust_remote_code=True" if is_cocomix else ""
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})',
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
    ]
    return "\n".join(["```python", *code, "```"])


def _model_rows(trained: TrainedModel) -> list[Row]:
    config, insertion = trained.model.config, insertion_of(trained.model)
    counts = parameter_count(config, insertion)
    rows: list[Row] = [
        ("parameters", f"{sum(counts.values()):,}"),
        ("width, blocks, heads", f"{config.d_model}, {config.n_layer}, {config.n_head}"),
        ("vocabulary", config.vocab_size),
        ("positions", config.n_positions),
    ]
    if isinstance(insertion, ConceptsConfig):
        rows += [
            ("concepts, kept per token", f"{insertion.num_concepts}, {insertion.top_k}"),
            ("concepts enter before block", insertion.insert_layer),
        ]
    return rows


def _data_rows(config: DataConfig) -> list[Row]:
    if not config.sources:
        return _source_rows(config)
    rows: list[Row] = []
    for source, part in zip(config.sources, config.by_source.values(), strict=True):
        rows += [("source", f"`{source.name}`, weight {source.weight:g}"), *_source_rows(part)]
    return rows


def _source_rows(config: DataConfig) -> list[Row]:
    rows: list[Row] = [("folder", f"`{config.dir}`")]
    try:
        manifest = open_manifest(config)
    except DataError:  # gone since; a tokenizer was given in its place
        return rows
    keys = ("corpus", "corpus_files", "corpus_bytes", "corpus_sha256", "val_fraction", "seed")
    rows += [(key.replace("_", " "), manifest.recipe[key]) for key in keys if key in manifest.recipe]
    rows += [
        (f"{split}, documents and tokens", f"{part.documents:,} and {part.tokens:,}")
        for split, part in manifest.splits.items()
    ]
    return [*rows, ("tokenizer, SHA-256", manifest.tokenizer.sha256)]


def _training_rows(config: RunConfig) -> list[Row]:
    rows: list[Row] = [
        ("objective", config.objective.name),
        ("planned steps", config.train.steps),
        ("tokens per step", config.tokens_per_step),
        ("tokens per row", config.data.seq_len),
        ("documents of a row", "kept apart" if config.data.mask_documents else "read as one text"),
        ("learning rate", f"{config.optim.lr:g} to {config.optim.min_lr:g}, {config.optim.schedule}"),
        ("weight decay", config.optim.weight_decay),
        ("precision", config.train.precision),
        ("seed of the weights", config.run.seed),
    ]
    if config.objective.name == "kd" and config.kd is not None:
        rows += [
            ("teacher", f"`{config.kd.teacher}`"),
            ("divergence, weight and temperature", f"{config.kd.weight}, {config.kd.temperature}"),
        ]
    concepts = config.predicted_concepts
    if concepts is not None:
        by = f"{concepts.attribution} attribution" if concepts.targets == "attribution" else concepts.targets
        rows += [
            ("concept loss weight", config.objective.concept_weight),
            ("teacher", f"`{concepts.teacher}`, after block {concepts.sae_layer}"),
            ("autoencoder", f"`{concepts.sae}`"),
            ("targets per token, ranked by", f"{concepts.num_targets}, {by}"),
        ]
    return rows


def _results(trained: TrainedModel) -> str:
    """The newest validation at or before the weights, as the run recorded it."""
    records = read_json_lines(trained.path / "metrics.jsonl")
    last = math.inf if trained.step is None else trained.step
    validations = [item for item in records if LOSS_KEY in item and item["step"] <= last]
    if not validations:
        return f"The weights are those after step {trained.step}. No validation is on record."
    record = validations[-1]
    rows: list[Row] = [("after step", record["step"]), ("tokens seen", f"{record['tokens']:,}")]
    rows += [
        (f"validation {_reading(key)}", _number(record[key])) for key in record if key.startswith("val_")
    ]
    if isinstance(record[LOSS_KEY], float):
        rows.append(("validation perplexity", _number(math.exp(record[LOSS_KEY]))))
    text = f"The weights are those after step {trained.step}. Losses are in nats per token."
    return f"{text}\n\n{_table(rows)}"


def _reading(key: str) -> str:
    return key.removeprefix("val_").replace("_", " ")


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Row]) -> str:
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
