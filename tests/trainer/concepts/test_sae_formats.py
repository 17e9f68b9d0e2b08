"""File formats: made-up files against the formulas of the libraries that write them, and real faults."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.concepts.sae import TopKSae
from trainer.concepts.sae_formats import check_fits, load_sae, save_sae

GOLDEN_SAE = Path(__file__).parents[2] / "golden" / "sae.pt"
WIDTH, LATENTS, TOP_K = 12, 40, 4

SAELENS_6: dict[str, Any] = {
    "architecture": "topk",
    "d_in": WIDTH,
    "d_sae": LATENTS,
    "k": TOP_K,
    "apply_b_dec_to_input": True,
    "normalize_activations": "layer_norm",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
    "metadata": {"hook_name": "blocks.5.hook_resid_post"},
}
SAELENS_5: dict[str, Any] = {
    "architecture": "standard",
    "d_in": WIDTH,
    "d_sae": LATENTS,
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": TOP_K},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "hook_name": "blocks.6.hook_resid_pre",
    "hook_layer": 6,
    "hook_head_index": None,
}
SPARSIFY: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": LATENTS,
    "k": TOP_K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": WIDTH,
}


def random_tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def saelens_tensors() -> dict[str, Tensor]:
    return random_tensors(W_enc=(WIDTH, LATENTS), W_dec=(LATENTS, WIDTH), b_enc=(LATENTS,), b_dec=(WIDTH,))


def sparsify_tensors() -> dict[str, Tensor]:
    shapes = {"encoder.weight": (LATENTS, WIDTH), "encoder.bias": (LATENTS,)}
    return random_tensors(**shapes, W_dec=(LATENTS, WIDTH), b_dec=(WIDTH,))


def write_folder(folder: Path, weights: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / weights)
    return folder


def saelens_folder(tmp_path: Path, config: dict[str, Any], **tensors: Tensor) -> Path:
    return write_folder(tmp_path / "lens", "sae_weights.safetensors", config, saelens_tensors() | tensors)


def sparsify_folder(tmp_path: Path, config: dict[str, Any], **tensors: Tensor) -> Path:
    return write_folder(tmp_path / "sparsify", "sae.safetensors", config, sparsify_tensors() | tensors)


def residual() -> Tensor:
    return 2 * torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(8)) + 1


def keep_top(scores: Tensor) -> Tensor:
    top = scores.topk(TOP_K, dim=-1)
    return torch.zeros_like(scores).scatter_(-1, top.indices, top.values.relu())


def saelens_formula(config: dict[str, Any], tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense latents and reconstruction as SAELens documents them, option by option, in fp64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = x.double()
    mean, std = torch.zeros(1), torch.ones(1)
    if config["normalize_activations"] == "layer_norm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    shift = w["b_dec"] if config["apply_b_dec_to_input"] else 0
    scores = (x - shift) @ w["W_enc"] + w["b_enc"]
    norm = w["W_dec"].norm(dim=-1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(LATENTS)
    latents = keep_top(scores * norm)
    return latents, ((latents / norm) @ w["W_dec"] + w["b_dec"]) * std + mean


def assert_computes(sae: TopKSae, x: Tensor, latents: Tensor, reconstruction: Tensor) -> None:
    values, ids = sae.encode(x)
    found = torch.zeros_like(latents).scatter_(-1, ids, values.double())
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.reconstruct(x).double(), reconstruction, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", [SAELENS_6, SAELENS_5], ids=["v6", "v5"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize(("shift", "rescale"), [(True, False), (False, False), (True, True), (False, True)])
def test_saelens_folder_computes_what_saelens_computes(
    tmp_path: Path, base: dict[str, Any], normalize: str, shift: bool, rescale: bool
) -> None:
    """Catches a transposed encoder, an option that is read but not folded, or folds in the wrong order."""
    options = {"apply_b_dec_to_input": shift, "rescale_acts_by_decoder_norm": rescale}
    config = base | options | {"normalize_activations": normalize}
    sae = load_sae(saelens_folder(tmp_path, config), layer=5)
    assert_computes(sae, residual(), *saelens_formula(config, saelens_tensors(), residual()))


def test_sparsify_folder_computes_what_sparsify_computes(tmp_path: Path) -> None:
    """Catches residuals that are standardised although the dictionary was trained on raw ones."""
    sae = load_sae(sparsify_folder(tmp_path, SPARSIFY))
    w = {name: tensor.double() for name, tensor in sparsify_tensors().items()}
    latents = keep_top((residual().double() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    assert_computes(sae, residual(), latents, latents @ w["W_dec"] + w["b_dec"])


def test_weights_in_bf16_load_as_fp32(tmp_path: Path) -> None:
    """Catches a dictionary whose selection silently runs in the file's precision."""
    half = {name: tensor.bfloat16() for name, tensor in sparsify_tensors().items()}
    sae = load_sae(sparsify_folder(tmp_path, SPARSIFY, **half))
    assert all(parameter.dtype == torch.float32 for parameter in sae.parameters())
    assert not any(parameter.requires_grad for parameter in sae.parameters())


def published_sae() -> TopKSae:
    sae = TopKSae(WIDTH, LATENTS, TOP_K)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(9))
    return sae


def test_published_file_round_trips_bitwise(tmp_path: Path) -> None:
    """Catches a decoder that is written untransposed or shared storage that bloats the file."""
    save_sae(tmp_path / "new" / "sae.pt", published_sae())
    loaded = load_sae(tmp_path / "new" / "sae.pt")
    for name, tensor in published_sae().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.top_k, loaded.normalize) == (TOP_K, True)
    state = torch.load(tmp_path / "new" / "sae.pt", weights_only=True)
    assert state["decoder.weight"].shape == (WIDTH, LATENTS) and state["decoder.weight"].is_contiguous()
    assert set(state) == {
        key for key in torch.load(GOLDEN_SAE, weights_only=True) if "activation." not in key
    }
    assert stat.S_IMODE((tmp_path / "new" / "sae.pt").stat().st_mode) == 0o644


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a writer that truncates the old file first, or leaves its temporary file behind."""
    path = tmp_path / "sae.pt"
    save_sae(path, published_sae())
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_sae(path, TopKSae(3, 4, 1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["sae.pt"]


def test_unstandardised_autoencoder_is_not_written(tmp_path: Path) -> None:
    """Catches a file that every reader of the format would standardise, so with other latents."""
    with pytest.raises(ValueError, match=r"sae\.pt: normalize=False cannot be written"):
        save_sae(tmp_path / "sae.pt", TopKSae(3, 4, 1, normalize=False))
    assert not os.listdir(tmp_path)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    """Catches a loader that unpickles arbitrary objects."""
    torch.save({"pre_bias": _Payload(tmp_path / "ran")}, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match=r"sae\.pt: not a readable PyTorch file"):
        load_sae(tmp_path / "sae.pt")
    assert not (tmp_path / "ran").exists()


def published_with(tmp_path: Path, **changes: Any) -> Path:
    """The golden file with entries replaced, or removed where the new value is ``None``."""
    state = torch.load(GOLDEN_SAE, weights_only=True) | changes
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "sae.pt")
    return tmp_path / "sae.pt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "ReLU"}, "activation='ReLU' must be 'TopK'"),
        ({"activation": None}, "activation=None must be 'TopK'"),
        ({"activation_state_dict": None}, "activation_state_dict=None must be a mapping"),
        (
            {"activation_state_dict": {"k": 8, "postact_fn": "Identity"}},
            "postact_fn='Identity' must be 'ReLU'",
        ),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "k=None must be an integer from 1 to 512"),
        (
            {"activation_state_dict": {"k": 513, "postact_fn": "ReLU"}},
            "k=513 must be an integer from 1 to 512",
        ),
        ({"activation_state_dict": {"k": True, "postact_fn": "ReLU"}}, "k=True must be an integer"),
        ({"pre_bias": None}, "tensor pre_bias is missing"),
        ({"latent_bias": torch.zeros(5)}, r"latent_bias has shape \(5,\), must be \(512,\)"),
        (
            {"decoder.weight": torch.zeros(512, 48)},
            r"decoder.weight has shape \(512, 48\), must be \(48, 512\)",
        ),
        ({"encoder.weight": torch.zeros(0, 48)}, r"encoder.weight has shape \(0, 48\)"),
        ({"pre_bias": torch.zeros(48, dtype=torch.int64)}, "pre_bias has dtype torch.int64"),
        ({"pre_bias": torch.full((48,), float("nan"))}, "pre_bias holds values that are not finite"),
    ],
)
def test_faulty_published_file_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Catches a fault that surfaces later as another exception, or not at all."""
    path = published_with(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_sae(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", GOLDEN_SAE.read_bytes()[:50_000], b"PK\x03\x04" * 9])
def test_damaged_published_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    """Catches a truncated download that ends in a traceback."""
    (tmp_path / "sae.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"sae\.pt: not a readable PyTorch file") as error:
        load_sae(tmp_path / "sae.pt")
    assert "\n" not in str(error.value)


def test_file_that_holds_no_state_dict_is_refused(tmp_path: Path) -> None:
    """Catches a bare tensor taken for a state dict."""
    torch.save(torch.zeros(3), tmp_path / "sae.pt")
    with pytest.raises(ValueError, match="holds a Tensor, must hold a state dict"):
        load_sae(tmp_path / "sae.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "jumprelu"}, "architecture='jumprelu' with activation_fn=None must be 'topk'"),
        ({"architecture": "standard"}, "architecture='standard' with activation_fn=None must be 'topk'"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations='constant_norm_rescale'"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations='expected_average"),
        ({"normalize_activations": True}, "normalize_activations=True must be"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z' must be 'none'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor=True is not supported"),
        (
            {"activation_fn_kwargs": {"postact_fn": "id"}},
            "activation_fn_kwargs.postact_fn='id' is not supported",
        ),
        ({"k": None}, "activation_fn_kwargs.k=None must be an integer from 1 to 40"),
        ({"k": 41}, "k=41 must be an integer from 1 to 40"),
        ({"hook_name": "blocks.5.hook_mlp_out"}, "hook_name='blocks.5.hook_mlp_out' must be blocks"),
        ({"hook_name": "blocks.5.hook_resid_pre"}, "after block 4, but layer=5 was asked for"),
    ],
)
def test_saelens_option_that_is_not_representable_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Catches an option that is ignored, so that other latents come out than SAELens would give."""
    folder = saelens_folder(tmp_path, SAELENS_6 | changes)
    with pytest.raises(ValueError, match=message) as error:
        load_sae(folder, layer=5)
    assert "cfg.json" in str(error.value) and "\n" not in str(error.value)


def test_saelens_scaling_factor_is_refused_unless_it_is_one(tmp_path: Path) -> None:
    """Catches a fine-tuned scale that is dropped; older files carry one that is 1 throughout."""
    ones = torch.ones(LATENTS)
    load_sae(saelens_folder(tmp_path, SAELENS_6, scaling_factor=ones))
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match="scaling_factor is not supported"):
        load_sae(saelens_folder(tmp_path / "two", SAELENS_6, scaling_factor=2 * ones))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "activation='groupmax' must be 'topk'"),
        ({"transcode": True}, "transcode=True is not supported"),
        ({"skip_connection": True}, "skip_connection=True is not supported"),
        ({"signed": True}, "signed=True is not supported"),
        ({"k": "32"}, "k='32' must be an integer"),
        ({"d_in": 13}, "d_in=13 must be 12"),
    ],
)
def test_sparsify_option_that_is_not_representable_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Catches a transcoder or skip connection that is loaded as a plain autoencoder."""
    with pytest.raises(ValueError, match=message):
        load_sae(sparsify_folder(tmp_path, SPARSIFY | changes))


def test_sparsify_skip_weight_is_refused(tmp_path: Path) -> None:
    """Catches a skip connection whose option older configurations do not name."""
    with pytest.raises(ValueError, match="tensor W_skip is not supported"):
        load_sae(sparsify_folder(tmp_path, SPARSIFY, W_skip=torch.eye(WIDTH)))


def test_missing_and_broken_paths_are_one_line(tmp_path: Path) -> None:
    """Catches a traceback from json, safetensors or the file system."""
    folder = saelens_folder(tmp_path, SAELENS_6)
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds neither"):
        load_sae(tmp_path)
    with pytest.raises(ValueError, match="give the folder"):
        load_sae(folder / "sae_weights.safetensors")
    weights = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(weights[:100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_sae(folder)
    for content, message in (("{", "cfg.json: not JSON"), ("[]", "cfg.json: holds a list")):
        (folder / "cfg.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_sae(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(ValueError, match=r"cfg\.json: no such file"):
        load_sae(folder)


def test_teacher_and_concept_head_must_fit() -> None:
    """Catches a shape error deep inside the first step."""
    sae = TopKSae(WIDTH, LATENTS, TOP_K)
    check_fits(sae, WIDTH, LATENTS)
    with pytest.raises(
        ValueError, match=r"concepts.teacher has width 13, but concepts.sae needs .* width 12"
    ):
        check_fits(sae, 13, LATENTS)
    with pytest.raises(ValueError, match=r"concepts.num_concepts=41 must be 40"):
        check_fits(sae, WIDTH, 41)
