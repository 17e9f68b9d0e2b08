"""Reading three file formats of TopK sparse autoencoders, and writing the published one.

| on disk | written by |
|---|---|
| ``*.pt`` | github.com/openai/sparse_autoencoder, its ``v5_32k`` files; also :func:`save_sae` |
| folder with ``cfg.json`` and ``sae_weights.safetensors`` | SAELens, before and since version 6 |
| folder with ``cfg.json`` and ``sae.safetensors`` | EleutherAI/sparsify |

All become a :class:`~trainer.concepts.sae.TopKSae` in fp32. An option that would make the latents differ from
what the file's own library computes is refused, never ignored.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.files import replace_file
from trainer.concepts.sae import TopKSae

SAELENS_WEIGHTS = "sae_weights.safetensors"
SPARSIFY_WEIGHTS = "sae.safetensors"


def load_sae(path: str | os.PathLike[str], *, layer: int | None = None) -> TopKSae:
    """Read a TopK sparse autoencoder; the format is recognised from what ``path`` is.

    Args:
        path: published .pt file, SAELens folder or sparsify folder.
        layer: teacher block after which the residual will be read; compared with the hook that a SAELens
            folder names (the other formats do not say).

    Returns:
        The autoencoder on the CPU, fp32, frozen (``requires_grad=False``).

    Raises:
        ValueError: one line naming the path, the key, the value and what it must be.
    """
    weights = sae_files(path)[-1]
    if weights.name == SAELENS_WEIGHTS:
        sae = _load_saelens(weights.parent, layer)
    elif weights.name == SPARSIFY_WEIGHTS:
        sae = _load_sparsify(weights.parent)
    else:
        sae = _load_published(weights)
    return sae.requires_grad_(False)


def sae_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The files that an autoencoder is read from, its weights last.

    Raises:
        ValueError: one line naming the path and what it must be.
    """
    source = Path(path)
    if source.is_dir():
        for name in (SAELENS_WEIGHTS, SPARSIFY_WEIGHTS):
            if (source / name).is_file():
                return source / "cfg.json", source / name
        raise ValueError(
            f"{source}: holds neither {SAELENS_WEIGHTS} (SAELens) nor {SPARSIFY_WEIGHTS} (sparsify)"
        )
    if source.suffix == ".safetensors":
        raise ValueError(
            f"{source}: give the folder that holds this file and its cfg.json, or a published .pt file"
        )
    if not source.is_file():
        raise ValueError(f"{source}: no such file or folder")
    return (source,)


def save_sae(path: str | os.PathLike[str], sae: TopKSae) -> None:
    """Write the published .pt format: complete or not at all, fp32, readable with ``weights_only=True``.

    The statistics that the format carries hold their initial values; readers of the format want them present.

    Raises:
        ValueError: ``sae.normalize`` is off. Readers of this format standardise wherever the activation is
            TopK, so such a file would silently give other latents.
    """
    target = Path(path)
    if not sae.normalize:
        raise ValueError(
            f"{target}: normalize=False cannot be written, the published format implies normalize=True"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, lambda temporary: torch.save(_published_state(sae), temporary))


def check_fits(sae: TopKSae, width: int, num_concepts: int) -> None:
    """Check an autoencoder against the teacher and the student's concept head.

    Args:
        sae: what ``concepts.sae`` names.
        width: the teacher's residual width D_t.
        num_concepts: ``concepts.num_concepts`` M.

    Raises:
        ValueError: a size differs.
    """
    if sae.width != width:
        raise ValueError(
            f"concepts.teacher has width {width}, but concepts.sae needs a teacher of width {sae.width}"
        )
    if sae.num_latents != num_concepts:
        raise ValueError(
            f"concepts.num_concepts={num_concepts} must be {sae.num_latents}, the latents of concepts.sae"
        )


# --- published .pt --------------------------------------------------------------------------------


def _load_published(path: Path) -> TopKSae:
    state = _read_pt(path)
    options = _Options(path, state)
    # The format has no key for standardising: its authors standardise if and only if the activation is TopK.
    options.require("activation", "TopK")
    activation = state.get("activation_state_dict")
    if not isinstance(activation, Mapping):
        raise ValueError(
            f"{path}: activation_state_dict={activation!r} must be a mapping with k and postact_fn"
        )
    nested = _Options(path, activation, prefix="activation_state_dict.")
    nested.require("postact_fn", "ReLU")
    tensors = _Tensors(path, state)
    encoder = tensors.take("encoder.weight", None, None)
    num_latents, width = encoder.shape
    return _assemble(
        encoder=encoder,
        decoder=tensors.take("decoder.weight", width, num_latents).t(),
        latent_bias=tensors.take("latent_bias", num_latents),
        pre_bias=tensors.take("pre_bias", width),
        top_k=nested.top_k("k", num_latents),
        normalize=True,
    )


def _published_state(sae: TopKSae) -> OrderedDict[str, Any]:
    weights = {name: tensor.detach().float().cpu() for name, tensor in sae.state_dict().items()}
    num_latents = sae.num_latents
    return OrderedDict(
        [
            ("pre_bias", weights["pre_bias"].clone()),
            ("latent_bias", weights["latent_bias"].clone()),
            ("stats_last_nonzero", torch.zeros(num_latents, dtype=torch.int64)),
            ("latents_activation_frequency", torch.ones(num_latents)),
            ("latents_mean_square", torch.zeros(num_latents)),
            ("encoder.weight", weights["encoder.weight"].clone()),
            ("decoder.weight", weights["decoder"].t().contiguous()),
            ("activation", "TopK"),
            ("activation_state_dict", OrderedDict([("k", sae.top_k), ("postact_fn", "ReLU")])),
        ]
    )


def _read_pt(path: Path) -> Mapping[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged zip or pickle surfaces as nearly any exception; all of them mean the same to the user.
    except (
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        raise ValueError(
            f"{path}: not a readable PyTorch file of plain tensors ({type(error).__name__})"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds a {type(state).__name__}, must hold a state dict")
    return state


# --- SAELens --------------------------------------------------------------------------------------


def _load_saelens(folder: Path, layer: int | None) -> TopKSae:
    """Both layouts of cfg.json: flat (before version 6) and with ``metadata``."""
    config = _read_json(folder / "cfg.json")
    options = _Options(folder / "cfg.json", config)
    top_k_key = _check_saelens_architecture(options)
    normalize = _saelens_normalize(options)
    _check_saelens_hook(options, layer)
    tensors = _Tensors(folder / SAELENS_WEIGHTS, _read_safetensors(folder / SAELENS_WEIGHTS))
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        tensors.require_ones(name)
    encoder = tensors.take("W_enc", None, None).t()
    num_latents, width = encoder.shape
    decoder = tensors.take("W_dec", num_latents, width)
    latent_bias = tensors.take("b_enc", num_latents)
    pre_bias = tensors.take("b_dec", width)
    if not options.get("apply_b_dec_to_input", True):
        # W x + b_enc is W (x - b_dec) + (b_enc + W b_dec); in fp64, so that folding adds no error of its own.
        latent_bias = (latent_bias.double() + encoder.double() @ pre_bias.double()).float()
    if options.get("rescale_acts_by_decoder_norm", False):
        norm = decoder.norm(dim=-1).clamp_min(1e-8)
        encoder, latent_bias, decoder = encoder * norm[:, None], latent_bias * norm, decoder / norm[:, None]
    return _assemble(
        encoder=encoder,
        decoder=decoder,
        latent_bias=latent_bias,
        pre_bias=pre_bias,
        top_k=options.top_k(top_k_key, num_latents),
        normalize=normalize,
    )


def _check_saelens_architecture(options: _Options) -> str:
    """Refuse everything but TopK followed by ReLU; returns the dotted key of k."""
    architecture = options.get("architecture", "standard")
    activation = options.get("activation_fn_str", options.get("activation_fn"))
    if architecture not in ("topk", "standard") or (architecture == "standard" and activation != "topk"):
        raise ValueError(
            f"{options.path}: architecture={architecture!r} with activation_fn={activation!r} must be 'topk'"
        )
    options.refuse_truthy("finetuning_scaling_factor", "use_error_term")
    arguments = options.get("activation_fn_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{options.path}: activation_fn_kwargs={arguments!r} must be an object")
    for name, value in arguments.items():
        if name != "k" and value not in (None, False):
            raise ValueError(f"{options.path}: activation_fn_kwargs.{name}={value!r} is not supported")
    return "k" if options.get("k") is not None else "activation_fn_kwargs.k"


def _saelens_normalize(options: _Options) -> bool:
    value = options.get("normalize_activations") or "none"
    if value not in ("none", "layer_norm"):
        raise ValueError(f"{options.path}: normalize_activations={value!r} must be 'none' or 'layer_norm'")
    return bool(value == "layer_norm")


def _check_saelens_hook(options: _Options, layer: int | None) -> None:
    """The hook, where it is named, must be a residual stream, and the one after block ``layer``."""
    if options.get("reshape_activations", "none") != "none":
        raise ValueError(
            f"{options.path}: reshape_activations={options.get('reshape_activations')!r} must be 'none'"
        )
    hook = options.get("hook_name") or options.get("hook_point") or options.get("metadata.hook_name")
    if hook is None:
        return
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", str(hook))
    if match is None:
        raise ValueError(f"{options.path}: hook_name={hook!r} must be blocks.<n>.hook_resid_pre or ..._post")
    after_block = int(match[1]) - (match[2] == "pre")
    if layer is not None and layer != after_block:
        raise ValueError(
            f"{options.path}: hook_name={hook!r} reads the residual after block {after_block}, "
            f"but layer={layer} was asked for"
        )


# --- sparsify -------------------------------------------------------------------------------------


def _load_sparsify(folder: Path) -> TopKSae:
    """Residuals are not standardised there; ``b_dec`` leaves the input and joins the output."""
    options = _Options(folder / "cfg.json", _read_json(folder / "cfg.json"))
    if options.get("activation", "topk") != "topk":
        options.require("activation", "topk")
    options.refuse_truthy("signed", "transcode", "skip_connection", "embed_skip", "gram_lookup")
    tensors = _Tensors(folder / SPARSIFY_WEIGHTS, _read_safetensors(folder / SPARSIFY_WEIGHTS))
    tensors.refuse("W_skip")
    encoder = tensors.take("encoder.weight", None, None)
    num_latents, width = encoder.shape
    if options.get("d_in", width) != width:
        options.require("d_in", width)
    return _assemble(
        encoder=encoder,
        decoder=tensors.take("W_dec", num_latents, width),
        latent_bias=tensors.take("encoder.bias", num_latents),
        pre_bias=tensors.take("b_dec", width),
        top_k=options.top_k("k", num_latents),
        normalize=False,
    )


# --- shared ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Options:
    """Options of a file, with errors that name the file, the key and the value."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a dotted key, or the default."""
        found: Any = self.values
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    def require(self, key: str, expected: Any) -> None:
        """Refuse every value but one."""
        if self.get(key) != expected:
            raise ValueError(f"{self.path}: {self.prefix}{key}={self.get(key)!r} must be {expected!r}")

    def refuse_truthy(self, *keys: str) -> None:
        """Refuse options that add a term which :class:`TopKSae` has not."""
        for key in keys:
            if self.get(key):
                raise ValueError(f"{self.path}: {self.prefix}{key}={self.get(key)!r} is not supported")

    def top_k(self, key: str, num_latents: int) -> int:
        """K as an integer from 1 to M."""
        value = self.get(key)
        if type(value) is not int or not 1 <= value <= num_latents:
            raise ValueError(
                f"{self.path}: {self.prefix}{key}={value!r} must be an integer from 1 to {num_latents}"
            )
        return value


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Tensors of a file, with errors that name the file, the key and the shape."""

    path: Path
    values: Mapping[str, Any]

    def take(self, key: str, *shape: int | None) -> Tensor:
        """A finite floating-point tensor of this shape (``None`` is any size above 0) in fp32."""
        tensor = self.values.get(key)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{self.path}: tensor {key} is missing")
        expected = tuple("any" if size is None else size for size in shape)
        fits = tensor.ndim == len(shape) and all(
            actual == size or (size is None and actual > 0)
            for actual, size in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{self.path}: {key} has shape {tuple(tensor.shape)}, must be {expected}")
        if not tensor.is_floating_point():
            raise ValueError(f"{self.path}: {key} has dtype {tensor.dtype}, must be floating point")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{self.path}: {key} holds values that are not finite")
        return tensor.float()

    def refuse(self, key: str) -> None:
        """Refuse a tensor that stands for a term which :class:`TopKSae` has not."""
        if key in self.values:
            raise ValueError(f"{self.path}: tensor {key} is not supported")

    def require_ones(self, key: str) -> None:
        """Refuse a scale that scales."""
        scale = self.values.get(key)
        if scale is not None and not bool((scale == 1).all()):
            raise ValueError(f"{self.path}: {key} is not supported unless all of it is 1")


def _assemble(
    *, encoder: Tensor, decoder: Tensor, latent_bias: Tensor, pre_bias: Tensor, top_k: int, normalize: bool
) -> TopKSae:
    num_latents, width = encoder.shape
    sae = TopKSae(width, num_latents, top_k, normalize=normalize)
    with torch.no_grad():
        sae.encoder.weight.copy_(encoder)
        sae.decoder.copy_(decoder)
        sae.latent_bias.copy_(latent_bias)
        sae.pre_bias.copy_(pre_bias)
    return sae


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: holds a {type(values).__name__}, must hold an object")
    return values


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
