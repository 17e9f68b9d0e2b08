"""Weights in and out: Hugging Face's GPT-2 layout, and the authors' CoCoMix layout on top of it.

A model folder holds ``model.safetensors`` and ``config.json``.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.files import replace_file, replace_text
from trainer.config import ConceptsConfig, Insertion, ModelConfig
from trainer.model.authors import read_authors_sizes
from trainer.model.cocomix import CoCoMix
from trainer.model.description import describe, find_parts, read_insertion
from trainer.model.gpt2 import GPT2
from trainer.model.padding import padded
from trainer.model.student import build_student

_BLOCK = {
    "ln_1.weight": "ln_1.weight",
    "ln_1.bias": "ln_1.bias",
    "attn.qkv.weight": "attn.c_attn.weight",
    "attn.qkv.bias": "attn.c_attn.bias",
    "attn.proj.weight": "attn.c_proj.weight",
    "attn.proj.bias": "attn.c_proj.bias",
    "ln_2.weight": "ln_2.weight",
    "ln_2.bias": "ln_2.bias",
    "mlp.fc.weight": "mlp.c_fc.weight",
    "mlp.fc.bias": "mlp.c_fc.bias",
    "mlp.proj.weight": "mlp.c_proj.weight",
    "mlp.proj.bias": "mlp.c_proj.bias",
}
_TOP = {
    "wte.weight": "transformer.wte.weight",
    "wpe.weight": "transformer.wpe.weight",
    "ln_f.weight": "transformer.ln_f.weight",
    "ln_f.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
    "mixer.pre_bias": "transformer.pre_bias",
    "mixer.predict.weight": "transformer.concept_predictor.weight",
    "mixer.predict.bias": "transformer.concept_predictor.bias",
    "mixer.compress_weight": "transformer.compress_layer.weight",
    "mixer.compress_bias": "transformer.compress_layer.bias",
    "mixer.to_state.weight": "transformer.state_predictor.weight",
    "mixer.to_state.bias": "transformer.state_predictor.bias",
    "mixer.from_state.weight": "transformer.state_compressor.weight",
    "mixer.from_state.bias": "transformer.state_compressor.bias",
    "pause.weight": "transformer.pause.weight",
}
_TRANSPOSED = re.compile(r"(attn\.(qkv|proj)|mlp\.(fc|proj))\.weight$|^mixer\.compress_weight$")
_MASK_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")


def hf_name(name: str) -> str:
    """The published name of a parameter: ``blocks.3.mlp.fc.bias`` is ``transformer.h.3.mlp.c_fc.bias``."""
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        return f"transformer.h.{index}.{_BLOCK[rest]}"
    return _TOP[name]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model's parameters are stored here and in published files.

    Published linear weights of the blocks are (in, out), here (out, in); queries, keys and values stand
    one after the other, here head by head; vocabulary and dictionary are not padded; the authors'
    compress weight is (D, M), here (M, D).
    """

    config: ModelConfig
    num_concepts: int = 0

    @classmethod
    def of(cls, model: GPT2) -> Layout:
        """The layout of a model."""
        concepts = model.mixer.num_concepts if isinstance(model, CoCoMix) else 0
        return cls(model.config, concepts)

    def publish(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter, or its gradient, as published files hold it."""
        if rows := self.real_rows.get(name):
            tensor = tensor[:rows]
        if ".attn.qkv." in name:
            tensor = tensor.unflatten(0, (self.config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
        return (tensor.t() if _TRANSPOSED.search(name) else tensor).contiguous()

    def adopt(self, name: str, published: Tensor) -> Tensor:
        """Inverse of :meth:`publish`; raises ``ValueError`` when the shape is not the model's."""
        tensor = published.t() if _TRANSPOSED.search(name) and published.ndim == 2 else published
        if rows := self.real_rows.get(name):
            if len(tensor) != rows:
                raise ValueError(f"{len(tensor)} rows instead of {rows}")
            missing = padded(rows) - rows
            tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        if ".attn.qkv." in name:
            if len(tensor) % (3 * self.config.n_head):
                raise ValueError(f"{len(tensor)} features cannot be 3 x n_head={self.config.n_head} parts")
            tensor = tensor.unflatten(0, (3, self.config.n_head, -1)).transpose(0, 1).flatten(0, 2)
        return tensor.contiguous()

    @property
    def real_rows(self) -> dict[str, int]:
        """Rows that are not padding, of each parameter that has padding behind them."""
        vocabulary = dict.fromkeys(("wte.weight", "lm_head.weight"), self.config.vocab_size)
        names = ("mixer.predict.weight", "mixer.predict.bias", "mixer.compress_weight")
        return vocabulary | dict.fromkeys(names, self.num_concepts)


def to_hf(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A full state dict of :class:`GPT2` or of a student built on it, under published names."""
    return {hf_name(name): layout.publish(name, tensor) for name, tensor in state.items()}


def from_hf(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], layout: Layout, source: str
) -> dict[str, Tensor]:
    """Published tensors under this project's names.

    Args:
        tensors: by published name, with or without ``transformer.``; attention mask buffers and a
            copy of the tied head are ignored.
        shapes: the model's parameters.
        layout: of the model.
        source: file named in errors.

    Raises:
        ValueError: a parameter is missing or has another shape, or a tensor is left over.
    """
    left = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in tensors.items()
        if not _MASK_BUFFERS.search(name)
    }
    state = {}
    for name, shape in shapes.items():
        published = hf_name(name)
        if published not in left:
            raise ValueError(f"{source}: tensor {published} is missing")
        tensor = left.pop(published)
        try:
            state[name] = layout.adopt(name, tensor)
            fits = state[name].shape == shape
        except ValueError:
            fits = False
        if not fits:
            expected = layout.publish(name, torch.empty(shape, device="meta")).shape
            raise ValueError(
                f"{source}: tensor {published} has shape {tuple(tensor.shape)}, "
                f"the sizes of the model ask for {tuple(expected)}"
            )
    left.pop("lm_head.weight", None)
    if left:
        raise ValueError(f"{source}: {len(left)} tensors are of no use here, the first is {min(left)}")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one .safetensors, .bin, .pt or .pth file; pickles are read with ``weights_only=True``.

    Raises:
        ValueError: not such a file, or broken.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "weights file not found", str(path))
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if path.suffix in (".bin", ".pt", ".pth"):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable weights file: {reason}") from error
    raise ValueError(f"{path}: weights must be .safetensors, .bin, .pt or .pth, not '{path.suffix}'")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A weights file (or several shards) and its config.json."""

    weights: tuple[Path, ...]
    config: dict[str, Any]
    config_path: Path

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of all files."""
        return {name: tensor for path in self.weights for name, tensor in read_tensors(path).items()}


def _find_weights(folder: Path) -> tuple[Path, ...]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return tuple(folder / Path(shard).name for shard in shards)
    raise FileNotFoundError(2, "no model.safetensors or pytorch_model.bin in the folder", str(folder))


def open_model(path: str | Path) -> ModelFolder:
    """Locate a model: a folder, a run directory that holds ``model/``, or a file beside its config.json.

    Raises:
        FileNotFoundError: nothing there, or no config.json beside the weights.
        ValueError: config.json is not valid JSON.
    """
    path = Path(path)
    if path.is_dir() and (path / "model" / "config.json").is_file():
        path = path / "model"
    if not path.exists():
        raise FileNotFoundError(2, "model not found", str(path))
    weights = _find_weights(path) if path.is_dir() else (path,)
    config_path = (path if path.is_dir() else path.parent) / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(2, "config.json is missing beside the weights", str(config_path))
    try:
        config = json.loads(config_path.read_text())
    except ValueError as error:
        raise ValueError(f"{config_path}: not valid JSON: {error}") from error
    return ModelFolder(weights, config, config_path)


def model_config(folder: ModelFolder) -> ModelConfig:
    """The sizes in a Hugging Face GPT-2 config.json.

    Raises:
        ValueError: a size is missing, or the model is not a GPT-2 as computed here.
    """
    config, path = folder.config, folder.config_path
    if config.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"{path}: activation_function={config['activation_function']} must be gelu_new")
    sizes = {}
    for ours, theirs in (
        ("d_model", "n_embd"),
        ("n_layer", "n_layer"),
        ("n_head", "n_head"),
        ("vocab_size", "vocab_size"),
        ("n_positions", "n_positions"),
    ):
        if not isinstance(config.get(theirs), int):
            raise ValueError(f"{path}: {theirs} is missing or not an integer")
        sizes[ours] = config[theirs]
    try:
        return ModelConfig(
            **sizes,
            layer_norm_eps=config.get("layer_norm_epsilon", 1e-5),
            tied_head=config.get("tie_word_embeddings", True),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_weights(model: GPT2, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put published tensors into an unsharded model, in place; raises ``ValueError`` on a wrong shape."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict(from_hf(tensors, shapes, Layout.of(model), source), assign=True)


def load_model(path: str | Path) -> GPT2:
    """The student of config.json's ``cocomix``, ``regression`` or ``pause`` part, else a GPT-2; on the CPU.

    Weights keep their stored dtype. Where config.json names no part but there are concepts, their sizes
    are read from the authors' config.yaml.
    """
    folder = open_model(path)
    config = model_config(folder)
    tensors = folder.tensors()
    parts = find_parts(folder.config)
    if not parts and any(name.endswith("concept_predictor.weight") for name in tensors):
        parts = {"cocomix": read_authors_sizes(folder.config_path.parent)}
    with torch.device("meta"):
        model = build_student(config, read_insertion(parts, config.n_layer, str(folder.config_path)))
    load_weights(model, tensors, str(folder.weights[0]))
    return model.requires_grad_(False).eval()


def published_config(config: ModelConfig, insertion: Insertion | None) -> dict[str, Any]:
    """config.json of a model folder: Hugging Face's GPT-2 keys, and a part for what is inserted."""
    out: dict[str, Any] = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "n_embd": config.d_model,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_positions": config.n_positions,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tied_head,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    if insertion is not None:
        name, part = describe(insertion)
        out["model_type"] = f"{name}_gpt2"
        out["architectures"] = ["CoCoMixLMHeadModel" if name == "cocomix" else f"{name.title()}LMHeadModel"]
        out[name] = part
    return out


def save_model(
    folder: Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    insertion: Insertion | None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json``; each appears whole, the weights last.

    Equal weights and notes make equal files, bit by bit.

    Args:
        folder: made where it is missing.
        state: whole tensors by parameter name.
        config: sizes of the trunk.
        insertion: what its stream takes up.
        notes: kept in the weights' file for :func:`read_notes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout = Layout(config, insertion.num_concepts if isinstance(insertion, ConceptsConfig) else 0)
    replace_text(folder / "config.json", json.dumps(published_config(config, insertion), indent=2) + "\n")

    def write(path: Path) -> None:
        save_file(to_hf(state, layout), str(path), metadata={"format": "pt", **(notes or {})})
        _order_metadata(path)

    replace_file(folder / "model.safetensors", write)


def _order_metadata(path: Path) -> None:
    """Put a file's metadata, which the library writes in a random order, in that of their names."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(ordered) == size
        file.seek(8)
        file.write(ordered)


def read_notes(weights: Path) -> dict[str, str]:
    """What :func:`save_model` noted in a ``model.safetensors``.

    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        with safe_open(str(weights), framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{weights}: not a readable weights file: {error}") from error
