"""``python -m trainer.analysis.export RUN OUT [--format hf|authors]``: a trained model for other programs.

| format | what reads OUT |
|---|---|
| ``hf`` | ``transformers``: a plain GPT-2 as such, a CoCoMix with ``trust_remote_code=True`` |
| ``authors`` | the authors' code for CoCoMix (``GPT2CoCoMixLMHeadModel.from_pretrained``) |

Both hold safetensors, the tokenizer and a model card, and load here again wherever a model is asked for.
OUT appears whole or not at all; what is there already is never touched.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from data.cli import run_cli
from data.files import make_folder
from data.manifest import TOKENIZER_NAME
from data.tokenizer import Tokenizer
from trainer.analysis import remote_code
from trainer.analysis.model_card import model_card
from trainer.analysis.trained import TrainedModel, open_trained
from trainer.checkpoint.store import CheckpointError
from trainer.config import ConceptsConfig
from trainer.config_io import dump_config
from trainer.model.authors import authors_settings
from trainer.model.cocomix import CoCoMix
from trainer.model.description import describe
from trainer.model.formats import published_config, save_model
from trainer.model.gpt2 import GPT2
from trainer.model.student import insertion_of

ExportFormat = Literal["hf", "authors"]

REMOTE_CODE = "modeling_cocomix"


def export(trained: TrainedModel, out: Path, layout: ExportFormat) -> None:
    """Write a model folder.

    Args:
        trained: the model, its tokenizer and, for the card, its run.
        out: the folder to appear.
        layout: who is to read it.

    Raises:
        ValueError: a kind of model that no format holds.
        FileExistsError: there is something at ``out``.
    """
    _check_kind(trained.model)
    make_folder(out, lambda folder: _fill(folder, trained, out.name, layout))


def _check_kind(model: GPT2) -> None:
    insertion = insertion_of(model)
    known = type(model) in (GPT2, CoCoMix)
    if isinstance(insertion, ConceptsConfig):
        known = known and insertion.mix == "interleave" and insertion.every == 1
    if not known:
        kind = type(model).__name__ if insertion is None else " ".join(map(str, describe(insertion)))
        raise ValueError(
            f"a {kind} cannot be exported: other programs know GPT-2 and CoCoMix with a concept interleaved "
            "after every token"
        )


def _fill(folder: Path, trained: TrainedModel, name: str, layout: ExportFormat) -> None:
    model = trained.model
    save_model(folder, model.state_dict(), model.config, insertion_of(model))
    _write_json(folder / "config.json", export_config(model, trained.tokenizer, layout))
    _write_tokenizer(folder, trained.tokenizer, model.config.n_positions)
    if isinstance(model, CoCoMix):
        _write_concepts(folder, model, layout)
    if trained.config is not None:
        (folder / "training_config.yaml").write_text(dump_config(trained.config), encoding="utf-8")
    card = model_card(trained, name, layout)
    (folder / "README.md").write_text(card, encoding="utf-8")


def export_config(model: GPT2, tokenizer: Tokenizer, layout: ExportFormat) -> dict[str, Any]:
    """config.json: what this project reads, and what the format's reader wants beside it."""
    config = published_config(model.config, insertion_of(model))
    config |= {"dtype": "float32", "use_cache": True} | _special_ids(tokenizer)
    if not isinstance(model, CoCoMix):
        return config
    if layout == "authors":
        # Their class takes a GPT2Config; the concepts' sizes are arguments, read from config.yaml.
        return config | {"model_type": "gpt2", "architectures": ["GPT2CoCoMixLMHeadModel"]}
    auto_map = {
        "AutoConfig": f"{REMOTE_CODE}.CoCoMixConfig",
        "AutoModelForCausalLM": f"{REMOTE_CODE}.CoCoMixForCausalLM",
    }
    return config | {"architectures": ["CoCoMixForCausalLM"], "auto_map": auto_map}


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    # Padding is masked, so any id serves; one that exists serves everywhere.
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot_id)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, n_positions: int) -> None:
    (folder / TOKENIZER_NAME).write_bytes(tokenizer.json_bytes)
    eot = tokenizer.decode([tokenizer.eot_id])
    settings: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), eot)
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": n_positions,
        "padding_side": "left",  # so that generate() continues behind the prompts
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", _special_ids(tokenizer))


def _write_concepts(folder: Path, model: CoCoMix, layout: ExportFormat) -> None:
    """What makes a CoCoMix more than a GPT-2 for its reader: code, or sizes."""
    if layout == "hf":
        code = resources.files(remote_code).joinpath(f"{REMOTE_CODE}.py").read_bytes()
        (folder / f"{REMOTE_CODE}.py").write_bytes(code)
    else:
        concepts = insertion_of(model)
        assert isinstance(concepts, ConceptsConfig)
        settings = yaml.safe_dump(authors_settings(concepts), sort_keys=False)
        (folder / "config.yaml").write_text(settings, encoding="utf-8")


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def _main(args: argparse.Namespace) -> None:
    if os.path.lexists(args.out):  # before minutes are spent on reading
        raise FileExistsError(17, "exists already, choose another place or remove it", str(args.out))
    trained = open_trained(args.run, args.tokenizer)
    export(trained, args.out, args.format)
    print(f"{args.out}: written from {trained.source}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.analysis.export",
        description="Write a trained model for transformers or for the authors' code",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory or exported folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--format", choices=("hf", "authors"), default="hf", help="who reads it (hf)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json or its folder")
    return run_cli(_main, parser, argv, errors=(CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
