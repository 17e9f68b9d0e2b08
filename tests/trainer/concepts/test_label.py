"""Stored targets are those of the fly: bit for bit, whoever stored them and wherever they are read."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from data.loader import TokenLoader, validation_batches
from data.source import open_source
from data.stream import read_chunk
from data.verify import verify_folder, verify_labels
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.test_run import losses, main_in_child, train_on_ranks
from tests.trainer.tiny_run import tiny_config, with_changes
from trainer.build import build_parts
from trainer.concepts.cache import label_settings, open_labels
from trainer.concepts.extractor import TargetExtractor, unpack_ids
from trainer.concepts.label import label, label_chunk, main
from trainer.concepts.sae_formats import load_sae, save_sae
from trainer.config import RunConfig
from trainer.config_io import dump_config
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.formats import load_model, save_model
from trainer.objective import split_tokens

CPU = torch.device("cpu")


def label_on_ranks(config: RunConfig, num_ranks: int = 1) -> list[bool]:
    return run_ranks(lambda world: label(config, world), num_ranks)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def labels(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "labels"
    config = tiny_config(tiny_world, tiny_world / "unused", concepts__labels=str(folder))
    assert label_on_ranks(config) == [True]
    return folder


def test_two_ranks_and_a_repeated_command_store_what_one_rank_does(
    labels: Path, tiny_world: Path, tmp_path: Path
) -> None:
    """Catches labels that depend on who computes which chunk, and finished ones that are computed again."""
    config = tiny_config(tiny_world, tmp_path / "run", concepts__labels=str(tmp_path / "labels"))
    assert any(label_on_ranks(config, 2))
    assert contents(tmp_path / "labels") == contents(labels)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").rglob("*")}
    for path in (tmp_path / "labels", *before):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert label_on_ranks(config) == [True]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert verify_labels(labels)[1] == []


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_labeller_goes_on(seed: int, labels: Path, tiny_world: Path, tmp_path: Path) -> None:
    """Catches half-written labels, a folder that stays locked, and finished chunks computed again."""
    config = tiny_config(tiny_world, tmp_path / "run", concepts__labels=str(tmp_path / "labels"))
    world = World(rank=0, size=1, local_rank=0, device=CPU)
    generator = random.Random(seed)
    context = multiprocessing.get_context("fork")
    kept: dict[Path, int] = {}
    for _ in range(3):
        process = context.Process(target=label, args=(config, world))
        process.start()
        wait_for_files(tmp_path / "labels", len(kept) + generator.randint(0, 12), process)
        time.sleep(generator.random() * 0.004)
        process.kill()
        process.join()
        assert all(path.stat().st_ino == inode for path, inode in kept.items())
        kept = {path: path.stat().st_ino for path in (tmp_path / "labels").glob("*/*/*.u16")}
    assert label_on_ranks(config) == [True]
    assert all(path.stat().st_ino == inode for path, inode in kept.items())
    assert contents(tmp_path / "labels") == contents(labels)


def wait_for_files(folder: Path, count: int, process: multiprocessing.context.ForkProcess) -> None:
    deadline = time.monotonic() + 30
    while len(list(folder.glob("*/*/*.u16"))) < count and process.is_alive():
        assert time.monotonic() < deadline


def test_stored_targets_are_those_of_the_fly(labels: Path, tiny_world: Path, tmp_path: Path) -> None:
    """Catches targets of another window, and a microbatch whose shape or neighbours change a target."""
    config = tiny_config(tiny_world, tmp_path / "run", concepts__source="cache", concepts__labels=str(labels))
    assert config.concepts is not None
    (cache,) = open_labels(config.concepts, config.data, [open_source(config.data).manifest])
    extractor = TargetExtractor.load(config.concepts, CPU)
    loader = TokenLoader(config.data, rows_per_step=30, rank=0, world_size=1, labels=cache)
    batches = [next(loader) for _ in range(10)]  # one epoch and a bit
    loader.close()
    batches += validation_batches(config.data, share=1.0, rows=5, rank=0, world_size=1, labels=cache)
    masked = 0
    for size in (1, 2, 5):
        for batch in (part for whole in batches for part in whole.microbatches(size)):
            assert batch.targets is not None
            fresh = extractor(*split_tokens(batch))[: batch.num_rows]
            found = unpack_ids(batch.targets)[: batch.num_rows]
            assert torch.equal(found, fresh)
            masked += int((found == MASKED_TARGET).sum())
    assert masked > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_last_pass_of_a_chunk_has_the_shape_of_the_others(
    precision: str, tiny_world: Path, tmp_path: Path
) -> None:
    """Catches a short pass: on a GPU other kernels would round otherwise than in training."""
    config = tiny_config(tiny_world, tmp_path / "run", concepts__precision=precision)
    assert config.concepts is not None
    shapes: list[tuple[int, ...]] = []

    class Watched(TargetExtractor):
        def __call__(self, input_ids: torch.Tensor, *more: Any) -> torch.Tensor:
            shapes.append(tuple(input_ids.shape))
            return super().__call__(input_ids, *more)

    storage, manifest = open_source(config.data)
    tokens = read_chunk(storage, manifest.dtype, *manifest.splits["train"].chunks[0])
    ids = {rows: label_chunk(Watched.load(config.concepts, CPU), tokens, 16, rows, CPU) for rows in (1, 3, 9)}
    assert shapes == [(1, 16)] * 4 + [(3, 16)] * 2 + [(9, 16)]
    assert ids[1].shape == (4, 16, 3)
    assert (ids[1] == ids[3]).all()
    assert (ids[1] == ids[9]).all()


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank, bf16": (1, {"train__precision": "bf16"}),
    "two shards": (2, {}),
    "two tensor-parallel ranks": (2, {"parallel__tp": 2}),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_from_the_cache_is_training_on_the_fly(
    layout: str, labels: Path, tiny_world: Path, tmp_path: Path
) -> None:
    """Catches any other loss, metric or weight: the same bits over 12 steps and two validations."""
    num_ranks, changes = LAYOUTS[layout]
    changes = {"train__batch_size": 10, "concepts__labels": str(labels), **changes}
    for source in ("teacher", "cache"):
        config = tiny_config(tiny_world, tmp_path / source, concepts__source=source, **changes)
        train_on_ranks(config, num_ranks)
    assert losses(tmp_path / "cache") == losses(tmp_path / "teacher")
    assert len(losses(tmp_path / "cache")) == 12
    published = [
        (tmp_path / source / "model/model.safetensors").read_bytes() for source in ("teacher", "cache")
    ]
    assert published[0] == published[1]


@pytest.mark.dist
def test_a_run_goes_on_with_another_source_and_world_size(
    labels: Path, tiny_world: Path, tmp_path: Path
) -> None:
    """Catches a cursor that the labels do not follow: stops in an epoch, skipped rows, 2 -> 1 -> 3 ranks."""
    changes: dict[str, Any] = {
        "optim__min_lr": 3e-3, "train__batch_size": 42, "train__microbatch_size": 7,
        "data__skip": [[50, 90]], "concepts__labels": str(labels),
    }  # fmt: skip
    for run, sources in (("fly", ("teacher",) * 3), ("mixed", ("cache", "teacher", "cache"))):
        for source, steps, num_ranks in zip(sources, (4, 8, 12), (2, 1, 3), strict=True):
            config = tiny_config(
                tiny_world, tmp_path / run, concepts__source=source, train__steps=steps,
                validation__every_steps=4, **changes,
            )  # fmt: skip
            train_on_ranks(config, num_ranks)
    assert losses(tmp_path / "mixed") == losses(tmp_path / "fly")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_before_forks")
def test_the_deepspeed_engine_reads_labels_too(labels: Path, tiny_world: Path, tmp_path: Path) -> None:
    """Catches an engine that loses the targets of a batch."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    for source in ("teacher", "cache"):
        config = tiny_config(
            tiny_world, tmp_path / source, concepts__source=source, concepts__labels=str(labels),
            train__steps=4, parallel__engine="deepspeed", parallel__zero_stage=2,
        )  # fmt: skip
        train_on_ranks(config, 2)
    assert losses(tmp_path / "cache") == losses(tmp_path / "teacher")


def test_neither_teacher_nor_autoencoder_is_loaded(
    labels: Path, tiny_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches memory and FLOPs of a teacher that nobody asks; that it is not there to be compared is said."""
    config = tiny_config(
        tiny_world, tmp_path / "run", concepts__source="cache", concepts__labels=str(labels),
        concepts__teacher="nowhere", concepts__sae="nowhere.pt",
    )  # fmt: skip

    def build(world: World) -> tuple[list[str], list[str]]:
        with caplog.at_level(logging.WARNING):
            parts = build_parts(config, world)
        return list(parts.flops.parts), caplog.messages

    parts, messages = run_ranks(build, 1)[0]
    assert not [part for part in parts if part.startswith(("teacher", "sae", "attribution"))]
    assert [message.partition(" is not there")[0] for message in messages] == [
        "concepts.teacher=nowhere",
        "concepts.sae=nowhere.pt",
    ]


def another_teacher(world: Path, folder: Path) -> dict[str, Any]:
    teacher = load_model(world / "teacher")
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    state["ln_f.bias"][0] += 1e-3
    save_model(folder / "teacher", state, teacher.config, None)
    return {"concepts__teacher": str(folder / "teacher")}


def another_sae(world: Path, folder: Path) -> dict[str, Any]:
    sae = load_sae(world / "sae.pt")
    sae.latent_bias[3] += 1e-3
    save_sae(folder / "sae.pt", sae)
    return {"concepts__sae": str(folder / "sae.pt")}


def other_data(world: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(world / "data", folder / "data")
    manifest = folder / "data" / "manifest.json"
    body = json.loads(manifest.read_text())
    del body["checksum"]
    manifest.write_text(json.dumps(body | {"recipe": {}}))
    return {"data__dir": str(folder / "data")}


Change = Callable[[Path, Path], dict[str, Any]]
MISFITS: dict[str, tuple[Change, str]] = {
    "teacher": (another_teacher, "labels: these labels do not fit, teacher was "),
    "sae": (another_sae, "labels: these labels do not fit, sae was "),
    "data": (other_data, "labels: these labels do not fit, data was "),
    "seq_len": (lambda *_: {"data__seq_len": 8}, "do not fit, seq_len was 16 and is 8;"),
    "targets": (lambda *_: {"concepts__num_targets": 2}, "do not fit, num_targets was 3 and is 2;"),
    "ranking": (lambda *_: {"concepts__attribution": "abs"}, "attribution was 'signed' and is 'abs';"),
    "dictionary": (lambda *_: {"concepts__num_concepts": 65536}, "num_concepts=65536 must be at most 65535"),
    "nothing there": (
        lambda *_: {"concepts__labels": None},
        "no labels.json, so there are no finished labels",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_run_refuses_labels_that_are_not_its_own(
    misfit: str, labels: Path, tiny_world: Path, tmp_path: Path
) -> None:
    """Catches a run on targets of another teacher, dictionary or tokenisation."""
    change, message = MISFITS[misfit]
    config = tiny_config(tiny_world, tmp_path / "run", concepts__source="cache", concepts__labels=str(labels))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(with_changes(config, **change(tiny_world, tmp_path))))
    code, error = main_in_child(["--config", str(path)])
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_damaged_byte_ends_the_run_in_one_line(labels: Path, tiny_world: Path, tmp_path: Path) -> None:
    """Catches a flipped bit that is trained on."""
    shutil.copytree(labels, tmp_path / "labels")
    for path in (tmp_path / "labels" / "train").glob("*/*.u16"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    config = tiny_config(
        tiny_world, tmp_path / "run", concepts__source="cache", concepts__labels=str(tmp_path / "labels")
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    code, error = main_in_child(["--config", str(tmp_path / "config.yaml")])
    assert code == 2
    assert "damaged: its XXH3 is not the one in its name" in error.splitlines()[-1]
    assert len(verify_labels(tmp_path / "labels")[1]) == len(list((labels / "train").glob("*/*.u16")))


def label_main_in_child(arguments: list[str]) -> tuple[int, str, str]:
    def call(world: World) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        return code, out.getvalue(), err.getvalue()

    code, out, err = run_ranks(call, 1)[0]
    return code, out, err


def test_the_command_line(tiny_world: Path, tmp_path: Path) -> None:
    """Catches a command that needs other keys than training, and refusals of more than a line."""
    shutil.copytree(tiny_world / "data", tmp_path / "data")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config(tiny_world, tmp_path / "run", data__dir=str(tmp_path / "data"))))
    code, out, err = label_main_in_child(["--config", str(path), "--concepts.num_targets=2"])
    assert (code, out) == (0, f"labels: {tmp_path / 'data' / 'labels'}\n")
    assert "labelling: done in" in err
    assert verify_folder(tmp_path / "data")[1] == []
    refusals = [
        (["--concepts.num_targets=3"], "num_targets was 2 and is 3; --overwrite replaces them"),
        (["--objective.name=ntp"], "objective.name=ntp must be cocomix"),
        (["--concepts.num_concepts=65536"], "num_concepts=65536 must be at most 65535 for stored targets"),
        (["--concepts.labels=s3://bucket/labels"], "concepts.labels=s3://bucket/labels must be a folder"),
        (["--concepts.teacher=nowhere", "--concepts.num_targets=1"], "nowhere: model not found"),
        (["--parallel.shard_teacher=true"], "labelling needs parallel.shard_teacher=false"),
        (
            ["--parallel.shard_teacher=true", "--concepts.source=cache"],
            "parallel.shard_teacher=true does not fit concepts.source=cache",
        ),
    ]
    for arguments, message in refusals:
        code, _, err = label_main_in_child(["--config", str(path), *arguments])
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    code, _, _ = label_main_in_child(["--config", str(path), "--concepts.num_targets=3", "--overwrite"])
    assert code == 0
    settings = verify_settings(tmp_path / "data" / "labels")
    assert settings.num_targets == 3


def verify_settings(folder: Path) -> Any:
    from data.label_cache import read_labels

    assert verify_labels(folder)[1] == []
    return read_labels(folder).settings


def test_digests_know_contents_and_not_places(tiny_world: Path, tmp_path: Path) -> None:
    """Catches labels that are refused because a model was moved, or accepted because its name is the same."""
    config = tiny_config(tiny_world, tmp_path / "run")
    assert config.concepts is not None
    manifest = open_source(config.data).manifest

    def digests(**paths: str) -> tuple[str | None, str | None]:
        moved = with_changes(config, **{f"concepts__{key}": path for key, path in paths.items()}).concepts
        assert moved is not None
        found = label_settings(moved, config.data, manifest)
        return found.teacher, found.sae

    shutil.copytree(tiny_world / "teacher", tmp_path / "run2" / "model")
    shutil.copy(tiny_world / "sae.pt", tmp_path / "other.pt")
    here = digests()
    assert None not in here
    assert digests(teacher=str(tmp_path / "run2"), sae=str(tmp_path / "other.pt")) == here
    path = tmp_path / "run2" / "model" / "config.json"
    path.write_text(path.read_text().replace('"n_head": 2', '"n_head": 3'))
    assert digests(teacher=str(tmp_path / "run2"))[0] != here[0]
