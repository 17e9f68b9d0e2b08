"""Runs over several sources: resumed, on other ranks, with stored targets, evaluated by source."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from data.config import DataConfig
from data.prepare import PrepareOptions, prepare
from data.source import open_manifest, windows_per_chunk
from launch.preflight import check_data
from tests.ranks import run_ranks
from tests.trainer.test_run import losses, main_in_child, run_in_child, stop_after, train_on_ranks
from tests.trainer.tiny_run import tiny_config, with_changes
from trainer.analysis.compare import read_runs
from trainer.analysis.evaluate import main as evaluate_main
from trainer.analysis.inspect import main as inspect_main
from trainer.analysis.model_card import model_card
from trainer.analysis.trained import open_trained
from trainer.concepts.label import label
from trainer.concepts.train_sae import measure
from trainer.config import RunConfig
from trainer.config_io import dump_config, from_dict
from trainer.metrics.json_lines import read_json_lines

ROWS = 12 * 6
WINDOWS = 16


@pytest.fixture(scope="module")
def songs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few other texts, by the same tokenizer."""
    root = tmp_path_factory.mktemp("songs")
    (root / "text").mkdir()
    for number in range(5):
        (root / "text" / f"{number}.txt").write_text(f"over the hills and far away {number} " * 8)
    options = PrepareOptions(
        input=root / "text", out=root / "songs", tokenizer=tiny_world / "data" / "tokenizer.json",
        val_fraction=0.3, chunk_tokens=64,
    )  # fmt: skip
    prepare(options)
    return root / "songs"


def sources(world: Path, songs: Path, **limits: float) -> list[dict[str, Any]]:
    return [
        {"name": "tales", "dir": str(world / "data"), "weight": 3},
        {"name": "songs", "dir": str(songs), "weight": 1, **limits},
    ]


def mixture(world: Path, songs: Path, run_dir: Path, objective: str = "cocomix", **changes: Any) -> RunConfig:
    mixed = {"data__dir": "", "data__sources": sources(world, songs), "data__mixture_period": 8}
    return tiny_config(world, run_dir, objective, **{**mixed, **changes})


@pytest.fixture(scope="module")
def whole(tiny_world: Path, songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over both sources that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_in_child(mixture(tiny_world, songs, run_dir)) == 0
    return run_dir


def test_the_documented_section_loads() -> None:
    """Catches an example that nobody can copy."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = text.partition("## Mixtures")[2].partition("```yaml\ndata:\n")[2].partition("```")[0]
    body = "\n".join(line.removeprefix("  ") for line in section.splitlines())
    config = from_dict(DataConfig, {**yaml.safe_load(body), "seq_len": 1024}, "docs/data.md")
    assert [source.name for source in config.sources] == ["web", "code", "books"]
    assert config.sources[2].max_tokens == 2 * 10**9


@pytest.mark.dist
def test_a_resumed_mixture_is_the_uninterrupted_one_bitwise(
    whole: Path, tiny_world: Path, songs: Path, tmp_path: Path
) -> None:
    """Catches a place in the schedule, or a count of a source, that a checkpoint forgets."""
    parts = mixture(tiny_world, songs, tmp_path / "run", checkpoint__every_steps=0)
    stop_after(parts, 2)
    stop_after(parts, 3)
    train_on_ranks(parts, 1)
    assert losses(tmp_path / "run") == losses(whole)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", whole)]
    assert weights[0] == weights[1]
    kept = [key for key in record(whole, 12) if "/" in key]
    assert len(kept) > 6
    for step in (6, 12):
        ours, theirs = record(tmp_path / "run", step), record(whole, step)
        assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept}


def record(run_dir: Path, step: int) -> dict[str, Any]:
    return next(item for item in read_json_lines(run_dir / "metrics.jsonl") if item["step"] == step)


@pytest.mark.dist
def test_other_ranks_train_on_the_same_rows(
    whole: Path, tiny_world: Path, songs: Path, tmp_path: Path
) -> None:
    """Catches a schedule that depends on the ranks or on the microbatch: 2 ranks, another microbatch."""
    train_on_ranks(mixture(tiny_world, songs, tmp_path / "run", train__microbatch_size=3), 2)
    for ours, theirs in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        for key, value in theirs.items():
            assert ours[key] == (value if value is None else pytest.approx(value, abs=1e-5)), key
    last = record(tmp_path / "run", 12)
    assert [last[f"tokens/{name}"] for name in ("tales", "songs")] == [54 * WINDOWS, 18 * WINDOWS]


def test_tokens_epochs_and_validation_by_source(whole: Path, tiny_world: Path, songs: Path) -> None:
    """Catches shares that are not the weights', and an overall loss that is not that of the mixture."""
    for step in (1, 5, 12):
        found = record(whole, step)
        assert found["tokens/tales"] + found["tokens/songs"] == found["tokens"] == 6 * step * WINDOWS
        assert abs(found["tokens/songs"] / WINDOWS - 6 * step / 4) < 1
    last = record(whole, 12)
    assert last["epochs/songs"] > 1 > last["epochs/tales"] > 0
    for key in ("loss_ntp", "loss_concept", "loss_total"):
        tales, other = (last[f"val_{key}/{name}"] for name in ("tales", "songs"))
        assert tales != other
        assert last[f"val_{key}"] == pytest.approx(0.75 * tales + 0.25 * other, rel=1e-12)
    log = (whole / "logs" / "rank_0.log").read_text()
    assert "source tales: 0.75 of the rows; 864 tokens, " in log
    assert "epochs by step 12" in log


@pytest.mark.dist
def test_a_mixture_of_one_trains_as_the_folder_bitwise(tiny_world: Path, tmp_path: Path) -> None:
    """Catches a source that is read in another order than ``data.dir``."""
    one = [{"name": "tales", "dir": str(tiny_world / "data"), "weight": 0.5}]
    for name, changes in (("dir", {}), ("one", {"data__dir": "", "data__sources": one})):
        config = tiny_config(tiny_world, tmp_path / name, "ntp", train__steps=6, **changes)
        assert run_in_child(config) == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "dir")
    assert record(tmp_path / "one", 6)["val_loss_ntp/tales"] == record(tmp_path / "dir", 6)["val_loss_ntp"]


@pytest.mark.dist
@pytest.mark.parametrize("beside", [True, False], ids=["beside the shards", "in a folder of their own"])
def test_stored_targets_of_every_source(
    beside: bool, whole: Path, tiny_world: Path, songs: Path, tmp_path: Path
) -> None:
    """Catches labels of another source's windows: losses must be those of targets made on the fly."""
    here = tmp_path / "data"
    for name, folder in (("tales", tiny_world / "data"), ("songs", songs)):
        shutil.copytree(folder, here / name)
    moved = [{**item, "dir": str(here / item["name"])} for item in sources(tiny_world, songs)]
    config = mixture(
        tiny_world, songs, tmp_path / "run", data__sources=moved,
        concepts__labels=None if beside else str(tmp_path / "labels"),
    )  # fmt: skip
    assert run_ranks(lambda world: label(config, world), 1) == [True]
    place = here / "songs" / "labels" if beside else tmp_path / "labels" / "songs"
    assert (place / "labels.json").is_file()
    cached = with_changes(config, concepts__source="cache", concepts__teacher="gone")
    assert run_in_child(cached) == 0
    assert losses(tmp_path / "run") == losses(whole)


def test_an_autoencoder_is_measured_on_every_source(tiny_world: Path, songs: Path, tmp_path: Path) -> None:
    """Catches a report on the first source alone."""
    config = mixture(tiny_world, songs, tmp_path / "run", "sae")
    cpu = torch.device("cpu")
    found, windows = [], []
    for part in config.data.by_source.values():
        found.append(measure(replace(config, data=part), tiny_world / "sae.pt", cpu)["loss_clean"])
        windows.append(sum(windows_per_chunk(open_manifest(part), "val", part.seq_len)))
    assert found[0] != found[1]
    mean = sum(loss * count for loss, count in zip(found, windows, strict=True)) / sum(windows)
    assert measure(config, tiny_world / "sae.pt", cpu)["loss_clean"] == pytest.approx(mean, rel=1e-6)


def test_analyses_of_a_mixture(
    whole: Path, tiny_world: Path, songs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches tools that know one folder only: evaluation, page, card, comparison, preflight."""
    assert evaluate_main([str(whole), "--no_concepts"]) == 0
    body = json.loads((whole / "evaluation" / "validation_00000012.json").read_text())["sources"]
    assert set(body) == {"tales", "songs"}
    for name, report in body.items():
        assert report["loss"] == pytest.approx(record(whole, 12)[f"val_loss_ntp/{name}"], abs=1e-5)
    assert inspect_main([str(whole), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000
    capsys.readouterr()
    card = model_card(open_trained(whole), "x", "hf")
    assert "`tales`, weight 3" in card
    assert "`songs`, weight 1" in card
    config = mixture(tiny_world, songs, tmp_path / "other")
    assert f"{songs}: " in check_data(config)
    shutil.copytree(whole, tmp_path / "other")
    assert len(read_runs([whole, tmp_path / "other"])) == 1
    heavier = [{**item, "weight": 1} for item in sources(tiny_world, songs)]
    (tmp_path / "other" / "config.yaml").write_text(dump_config(with_changes(config, data__sources=heavier)))
    with pytest.raises(ValueError, match="was validated on other data"):
        read_runs([whole, tmp_path / "other"])


@pytest.mark.dist
def test_what_does_not_fit_is_refused_in_one_line(tiny_world: Path, songs: Path, tmp_path: Path) -> None:
    """Catches a limit that is passed in silence, and a command line that cannot choose sources."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config(tiny_world, tmp_path / "run", "ntp", train__steps=2)))
    both = json.dumps(sources(tiny_world, songs))
    once = json.dumps(sources(tiny_world, songs, max_epochs=0.5))
    here = [f"--data.sources={once}", "--data.dir=", "--train.steps=500"]
    for overrides, message in (
        ([f"--data.sources={both}"], "data.dir="),
        ([*here], "songs: train.steps=500 would train on 12,000 tokens of it"),
        ([*here], "max_epochs=0.5"),
        (["--data.dir=", "--data.sources=[{name: a, dir: b}]"], "data.sources[0].weight is missing"),
        (["--data.dir=", "--data.sources=[{name: a, dir: b, weight: -1}]"], "data.sources[0].weight=-1"),
    ):
        code, error = main_in_child(["--config", str(path), *overrides])
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
    code, _ = main_in_child(["--config", str(path), f"--data.sources={once}", "--data.dir="])
    assert code == 0
