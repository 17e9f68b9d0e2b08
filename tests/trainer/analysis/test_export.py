"""Exported folders: what is in them, and that they load here again."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml

from tests.trainer.analysis.test_generate import run_json, write_run
from trainer.analysis import remote_code
from trainer.analysis.export import main
from trainer.analysis.trained import open_trained
from trainer.model.cocomix import CoCoMix
from trainer.model.formats import load_model, read_tensors
from trainer.model.gpt2 import GPT2

GOLDEN = Path(__file__).parents[2] / "golden"


def export(run: Path, out: Path, *flags: str) -> Path:
    assert main([str(run), str(out), *flags]) == 0
    return out


@pytest.mark.parametrize("layout", ["hf", "authors"])
@pytest.mark.parametrize("objective", ["ntp", "cocomix"])
def test_an_exported_folder_is_the_run_again(
    objective: str, layout: str, tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a weight, a size or a tokenizer that does not survive the way out and in, also twice."""
    run = write_run(tiny_world, tmp_path / "run", objective)
    out = export(run, tmp_path / "out", f"--format={layout}")
    again = export(out, tmp_path / "again", "--format=hf")
    capsys.readouterr()
    original = open_trained(run)
    for folder in (out, again):
        copy = open_trained(folder)
        assert type(copy.model) is type(original.model)
        assert copy.model.config == original.model.config
        assert copy.tokenizer.sha256 == original.tokenizer.sha256
        assert all(map(torch.equal, original.model.state_dict().values(), copy.model.state_dict().values()))
        flags = ["--prompt=the cat", "--max_new_tokens=5"]
        assert run_json(capsys, str(folder), *flags) == run_json(capsys, str(run), *flags)
    if objective == "cocomix":
        assert isinstance(original.model, CoCoMix) and isinstance(copy.model, CoCoMix)
        assert copy.model.insert_layer == original.model.insert_layer
        assert copy.model.mixer.top_k == original.model.mixer.top_k


def test_files_of_the_formats(tiny_world: Path, tmp_path: Path) -> None:
    """Catches code that is not packed in, and concept sizes that the authors' loader would not find."""
    run = write_run(tiny_world, tmp_path / "run")
    hf = export(run, tmp_path / "hf")
    authors = export(run, tmp_path / "authors", "--format=authors")
    common = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    common |= {"tokenizer_config.json", "training_config.yaml"}
    assert {path.name for path in hf.iterdir()} == common | {"modeling_cocomix.py"}
    assert {path.name for path in authors.iterdir()} == common | {"config.yaml"}
    code = resources.files(remote_code).joinpath("modeling_cocomix.py").read_text()
    assert (hf / "modeling_cocomix.py").read_text() == code
    assert yaml.safe_load((authors / "config.yaml").read_text()) == {
        "concept_dim": 37,
        "concept_num": 5,
        "insert_layer_index": 1,
    }
    config = json.loads((authors / "config.json").read_text())
    assert config["model_type"] == "gpt2" and "auto_map" not in config
    names = set(read_tensors(authors / "model.safetensors"))
    expected = set(read_tensors(GOLDEN / "student.safetensors"))
    assert {name for name in names if ".h." not in name} == {n for n in expected if ".h." not in n}
    assert {n.split(".h.0.")[1] for n in names if ".h.0." in n} == {
        n.split(".h.0.")[1] for n in expected if ".h.0." in n
    }


@pytest.mark.parametrize("place", ["beside", "above"])
def test_a_folder_of_the_authors_loads(place: str, tmp_path: Path) -> None:
    """Catches reading our own export only: theirs says nothing about concepts in config.json."""
    golden = json.loads((GOLDEN / "config.json").read_text())
    folder = tmp_path / "logs" / "step_100"
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "student.safetensors", folder / "model.safetensors")
    sizes = {"n_embd": golden["d_model"], "activation_function": "gelu_new", "model_type": "gpt2"}
    sizes |= {key: golden[key] for key in ("n_layer", "n_head", "vocab_size", "n_positions")}
    (folder / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(FileNotFoundError, match=r"must hold the concepts. sizes: concept_dim, concept_num"):
        load_model(folder)
    settings = folder / "config.yaml" if place == "beside" else folder.parent / "config.yaml"
    keys = ("concept_dim", "concept_num", "insert_layer_index")
    settings.write_text(yaml.safe_dump({"lr": 6e-4, **{key: golden[key] for key in keys}}))
    model = load_model(folder)
    assert isinstance(model, CoCoMix)
    expected = read_tensors(GOLDEN / "expected.safetensors")
    logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["student.logits"], atol=2e-5, rtol=0)
    settings.write_text(yaml.safe_dump({"concept_dim": golden["concept_dim"]}))
    with pytest.raises(ValueError, match="concept_num is missing or not an integer"):
        load_model(folder)
    settings.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_model(folder)


def test_the_card_says_what_is_on_record_and_nothing_else(tiny_world: Path, tmp_path: Path) -> None:
    """Catches numbers of another step, and numbers where none were measured."""
    run = write_run(tiny_world, tmp_path / "run")
    nothing = (export(run, tmp_path / "nothing") / "README.md").read_text()
    assert "No validation is on record." in nothing and "perplexity" not in nothing
    records = [
        {"step": 6, "tokens": 576, "val_loss_ntp": 4.0, "val_concept_recall_at_A": 0.125},
        {"step": 12, "tokens": 1152, "loss_ntp": 9.0, "val_loss_ntp": 2.0, "val_concept_recall_at_A": 0.25},
        {"step": 18, "tokens": 1728, "val_loss_ntp": 1.0, "val_concept_recall_at_A": 0.5},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    card = (export(run, tmp_path / "card") / "README.md").read_text()
    for row in (
        "| after step | 12 |",
        "| tokens seen | 1,152 |",
        "| validation loss ntp | 2.0000 |",
        "| validation concept recall at A | 0.2500 |",
        "| validation perplexity | 7.3891 |",
        "| vocabulary | 290 |",
        "| concepts, kept per token | 37, 5 |",
    ):
        assert row in card, row
    assert 'from_pretrained("card", trust_remote_code=True)' in card
    bare = (export(tmp_path / "card", tmp_path / "bare") / "README.md").read_text()
    assert "holds no record of the training" in bare and "perplexity" not in bare


def test_bad_input_is_one_line_and_leaves_nothing(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an export over something, and half a folder after an error."""
    run = write_run(tiny_world, tmp_path / "run")
    taken = tmp_path / "taken"
    taken.mkdir()
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "begun")
    sae = write_run(tiny_world, tmp_path / "sae", "sae")
    for source, out, message in (
        (run, taken, "taken: exists already, choose another place or remove it"),
        (tmp_path / "missing", tmp_path / "out", "missing: no such run directory or model folder"),
        (tmp_path / "begun", tmp_path / "out", "has no weights yet"),
        (sae, tmp_path / "out", "objective.name=sae trains no language model"),
    ):
        assert main([str(source), str(out)]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1 and message in text
    assert not (tmp_path / "out").exists() and not list(taken.iterdir())

    class Variant(GPT2):
        """A kind of student that no format knows."""

    model = load_model(run)
    variant = Variant(model.config)
    monkeypatch.setattr("trainer.analysis.trained.load_model", lambda path: variant)
    assert main([str(run), str(tmp_path / "out")]) == 2
    assert "a Variant cannot be exported" in capsys.readouterr().err
    monkeypatch.undo()
    # The last file of all fails.
    monkeypatch.setattr("trainer.analysis.export.model_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(run), str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "run", "sae", "taken"]
