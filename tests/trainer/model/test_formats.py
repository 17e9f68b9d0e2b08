"""Published layouts in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.model.tiny import tiny_cocomix, tiny_concepts, tiny_config, tiny_gpt2
from trainer.model.cocomix import CoCoMix
from trainer.model.formats import Layout, from_hf, load_model, read_notes, read_tensors, save_model, to_hf
from trainer.model.gpt2 import GPT2

GOLDEN = Path(__file__).parents[2] / "golden"


def _adopt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    model = tiny_gpt2()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return from_hf(tensors, shapes, Layout.of(model), "f")


def _published() -> dict[str, Tensor]:
    return to_hf(tiny_gpt2().state_dict(), Layout.of(tiny_gpt2()))


def test_published_names_and_shapes_are_those_of_the_authors() -> None:
    """Catches a name or a transposition that only fits our own files."""
    theirs = read_tensors(GOLDEN / "student.safetensors")
    model = CoCoMix(tiny_config(n_layer=4), tiny_concepts())
    assert set(to_hf(model.state_dict(), Layout.of(model))) == set(theirs)
    weight = to_hf(model.state_dict(), Layout.of(model))["transformer.compress_layer.weight"]
    assert weight.shape == (16, 53)


@pytest.mark.parametrize("kind", ["gpt2", "cocomix"])
def test_folder_round_trip_is_bitwise_and_gives_equal_logits(kind: str, tmp_path: Path) -> None:
    """Catches a weight that is lost, transposed twice or swapped on the way."""
    model = tiny_cocomix() if kind == "cocomix" else tiny_gpt2()
    concepts = tiny_concepts() if kind == "cocomix" else None
    save_model(tmp_path, model.state_dict(), model.config, concepts)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert not list(tmp_path.glob(".*"))


def test_prefix_mask_buffers_and_tied_head_copy_are_optional() -> None:
    """Catches refusing GPT-2 as it is published: no prefix, attn.bias buffers, a tied lm_head."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in _published().items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    bare["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    bare["lm_head.weight"] = bare["wte.weight"]
    state = _adopt(bare)
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_gpt2().state_dict().items())


def test_pickled_weights_load_and_a_malicious_pickle_does_not_run(tmp_path: Path) -> None:
    """Catches torch.load without weights_only."""
    torch.save(_published(), tmp_path / "pytorch_model.bin")
    save_model(tmp_path / "other", tiny_gpt2().state_dict(), tiny_config(), None)
    (tmp_path / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    assert isinstance(load_model(tmp_path), GPT2)

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"wte.weight": Payload()}, tmp_path / "bad.bin")
    with pytest.raises(ValueError, match="not a readable weights file"):
        read_tensors(tmp_path / "bad.bin")
    assert not (tmp_path / "executed").exists()


def test_wrong_files_are_refused_in_one_line(tmp_path: Path) -> None:
    """Catches a traceback, or weights that load into the wrong place."""
    tensors = _published()
    with pytest.raises(ValueError, match=r"f: tensor transformer.wpe.weight is missing"):
        _adopt({name: t for name, t in tensors.items() if "wpe" not in name})
    with pytest.raises(ValueError, match="1 tensors are of no use here, the first is transformer.extra"):
        _adopt({**tensors, "extra": torch.ones(1)})
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
    with pytest.raises(ValueError, match="not a readable weights file"):
        read_tensors(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing beside the weights"):
        load_model(tmp_path)
    folder = tmp_path / "m"
    save_model(folder, tiny_gpt2().state_dict(), tiny_config(), None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_embd": 18}))
    with pytest.raises(ValueError, match=r"wte.weight has shape \(61, 16\), .* ask for \(61, 18\)"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    with pytest.raises(ValueError, match="activation_function=relu must be gelu_new"):
        load_model(folder)


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """Catches the library's random order of what is noted beside the weights."""
    notes = {"step": "7", "tokenizer": "a" * 64, "more": "\u00e4"}
    files = set()
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        save_model(folder, tiny_gpt2().state_dict(), tiny_config(), None, notes)
        files.add((folder / "model.safetensors").read_bytes())
    assert len(files) == 1
    assert read_notes(folder / "model.safetensors") == {"format": "pt", **notes}
    assert load_model(folder).config == tiny_config()
