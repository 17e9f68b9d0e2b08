"""Labels belong to their windows, are written once by many processes, and no damaged one is read."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.label_cache import MASKED_ID, LabelCache, LabelSettings, found_chunks, read_labels
from data.label_writer import LabelWriter
from data.loader import TokenLoader, validation_batches
from data.manifest import DataError, Manifest, read_manifest
from data.source import open_label_cache, windows_per_chunk
from data.storage import LocalStorage
from data.stream import read_chunk
from data.verify import main as verify
from tests.data.http_server import serving

SEQ_LEN = 32
NUM_TARGETS = 3
SPLITS = ("train", "val")


def settings_of(manifest: Manifest) -> LabelSettings:
    return LabelSettings(
        data=manifest.sha256, teacher="a" * 64, sae="b" * 64, seq_len=SEQ_LEN, num_targets=NUM_TARGETS,
        num_concepts=1000, sae_layer=0, targets="attribution", attribution="signed", mask_non_positive=True,
        mask_documents=False, precision="fp32", arithmetic=1, rows_per_pass=4,
    )  # fmt: skip


def labels_of(tokens: np.ndarray) -> np.ndarray:
    """Labels that say which tokens they belong to: (..., T + 1) tokens -> (..., T, A) ids."""
    here, after = tokens[..., :-1].astype(np.int64), tokens[..., 1:].astype(np.int64)
    ids = np.stack([here % 997, after % 991, (here * 31 + after) % 1000], axis=-1).astype(np.uint16)
    ids[..., 2][here % 7 == 0] = MASKED_ID
    return ids


def chunk_labels(folder: Path, manifest: Manifest, split: str, number: int) -> np.ndarray:
    tokens = read_chunk(LocalStorage(folder), manifest.dtype, *manifest.splits[split].chunks[number])
    windows = (len(tokens) - 1) // SEQ_LEN
    return labels_of(
        np.lib.stride_tricks.sliding_window_view(tokens, SEQ_LEN + 1)[: windows * SEQ_LEN : SEQ_LEN]
    )


def new_writer(shards: Path, out: Path, overwrite: bool = False, **changes: object) -> LabelWriter:
    manifest = read_manifest(shards)
    windows = {split: windows_per_chunk(manifest, split, SEQ_LEN) for split in SPLITS}
    settings = dataclasses.replace(settings_of(manifest), **changes)  # type: ignore[arg-type]
    return LabelWriter(out, settings, windows, overwrite=overwrite)


def fill(shards: Path, out: Path, pause_s: float = 0.0, limit: int | None = None) -> bool:
    writer = new_writer(shards, out)
    for done, (split, number) in enumerate(writer.claims(), start=1):
        time.sleep(pause_s)
        writer.write(split, number, chunk_labels(shards, read_manifest(shards), split, number))
        if done == limit:
            return False
    return writer.finish()


@pytest.fixture(scope="module")
def labels(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labels") / "labels"
    assert fill(shard_folder, out)
    return out


def opened(shards: Path, labels: Path, **changes: object) -> LabelCache:
    wanted = dataclasses.replace(settings_of(read_manifest(shards)), **changes)  # type: ignore[arg-type]
    return open_label_cache(config_of(shards), str(labels), wanted)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config_of(shards: Path, **changes: object) -> DataConfig:
    config = DataConfig(dir=str(shards), seq_len=SEQ_LEN, lanes=8)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def test_batches_bring_the_labels_of_their_windows(shard_folder: Path, labels: Path) -> None:
    """Catches labels of a neighbouring window, across epochs, world sizes, resumes and skipped rows."""
    cache = opened(shard_folder, labels)
    config = config_of(shard_folder, skip=((24, 36),))
    state = None
    for world_size, steps in ((1, 9), (3, 40), (2, 30)):
        for rank in range(world_size):
            loader = TokenLoader(config, rows_per_step=12, rank=rank, world_size=world_size, labels=cache)
            if state is not None:
                loader.load_state_dict(state)
            for _ in range(steps):
                batch = next(loader)
                assert batch.targets is not None
                assert batch.targets.shape == (12 // world_size, SEQ_LEN, NUM_TARGETS)
                assert np.array_equal(batch.targets.numpy(), labels_of(batch.tokens.numpy()))
            after = loader.state_dict()
            loader.close()
        state = after
    for rank in range(2):
        for batch in validation_batches(config, share=1.0, rows=5, rank=rank, world_size=2, labels=cache):
            assert batch.targets is not None
            assert np.array_equal(batch.targets.numpy(), labels_of(batch.tokens.numpy()))


def test_labels_behind_a_url(shard_folder: Path, labels: Path, tmp_path: Path) -> None:
    """Catches remote shards whose labels must lie here, and labels that the node's cache mixes up."""
    shards = tmp_path / "shards"
    shutil.copytree(shard_folder, shards)
    shutil.copytree(labels, shards / "labels")
    with serving(shards) as (url, behaviour):
        config = config_of(shards, dir=url, cache_dir=str(tmp_path / "cache"), remote_timeout_s=4.0)
        for first in (True, False):
            behaviour.requests.clear()
            behaviour.truncate = 2 * first
            cache = open_label_cache(config, f"{url}/labels", settings_of(read_manifest(shards)))
            loader = TokenLoader(config, rows_per_step=12, rank=0, world_size=1, labels=cache)
            for _ in range(9):
                batch = next(loader)
                assert batch.targets is not None
                assert np.array_equal(batch.targets.numpy(), labels_of(batch.tokens.numpy()))
            loader.close()
            assert any(".u16 bytes=" in request for request in behaviour.requests) == first


def test_microbatches_and_no_labels(shard_folder: Path, labels: Path) -> None:
    """Catches targets that are cut otherwise than their tokens."""
    cache = opened(shard_folder, labels)
    loader = TokenLoader(config_of(shard_folder), rows_per_step=7, rank=0, world_size=1, labels=cache)
    parts = next(loader).microbatches(3)
    assert [part.num_rows for part in parts] == [3, 3, 1]
    for part in parts:
        assert part.targets is not None
        assert np.array_equal(part.targets.numpy(), labels_of(part.tokens.numpy()))
    loader.close()
    plain = TokenLoader(config_of(shard_folder), rows_per_step=7, rank=0, world_size=1)
    assert all(part.targets is None for part in next(plain).microbatches(3))
    plain.close()


def test_many_processes_share_the_work(shard_folder: Path, labels: Path, tmp_path: Path) -> None:
    """Catches chunks done twice or by nobody, and a folder that depends on who wrote it."""
    out = tmp_path / "labels"
    processes = start(3, lambda: fill(shard_folder, out, pause_s=0.005))
    inodes: dict[str, int] = {}
    while any(process.is_alive() for process in processes):
        for path in out.glob("*/*/*.u16"):
            # A second writer would put another file into the place of the first.
            assert inodes.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0] * 3
    assert len(inodes) > 20
    assert contents(out) == contents(labels)


def start(count: int, work: Callable[[], object]) -> list[multiprocessing.context.ForkProcess]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def wait_for_files(out: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(list(out.glob("*/*/*.u16"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_killed_writers_are_replaced(shard_folder: Path, labels: Path, tmp_path: Path) -> None:
    """Catches a chunk that stays locked or half-written, and finished ones that are written again."""
    out = tmp_path / "labels"
    kept: dict[Path, int] = {}
    for count in (1, 9, 20):
        first, second = start(2, lambda: fill(shard_folder, out, pause_s=0.01))
        wait_for_files(out, count)
        for process in (first, second):
            process.kill()
            process.join()
        for path, inode in kept.items():
            assert path.stat().st_ino == inode
        kept = {path: path.stat().st_ino for path in out.glob("*/*/*.u16")}
        with pytest.raises(DataError, match=r"no labels\.json, so there are no finished labels"):
            opened(shard_folder, out)
    (out / "train" / "000000" / ".000000000.0000000000000000.u16.tmp").write_bytes(b"half")
    (worker,) = start(1, lambda: fill(shard_folder, out))
    worker.join()
    assert contents(out) == contents(labels)
    assert all(path.stat().st_ino == inode for path, inode in kept.items())


def test_a_dead_process_leaves_its_chunk_to_one_that_is_past_it(
    shard_folder: Path, labels: Path, tmp_path: Path
) -> None:
    """Catches a last process that ends with a gap: its neighbour died with a chunk in hand."""
    out = tmp_path / "labels"

    def claim_and_hang() -> None:
        next(new_writer(shard_folder, out).claims())
        (tmp_path / "claimed").touch()
        time.sleep(60)

    (hanging,) = start(1, claim_and_hang)
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    (worker,) = start(1, lambda: os._exit(0 if fill(shard_folder, out, pause_s=0.01) else 1))
    wait_for_files(out, 5)
    hanging.kill()
    hanging.join()
    worker.join()
    assert worker.exitcode == 0
    assert contents(out) == contents(labels)


def test_labels_of_something_else_are_refused(shard_folder: Path, labels: Path, tmp_path: Path) -> None:
    """Catches targets of another teacher, dictionary, tokenisation or window length."""
    others = {"data": "c" * 64, "teacher": "c" * 64, "sae": "c" * 64, "seq_len": 16, "num_targets": 4,
              "num_concepts": 7, "sae_layer": 1, "targets": "random", "attribution": "abs",
              "mask_non_positive": False, "mask_documents": True, "precision": "bf16", "arithmetic": 2,
              "rows_per_pass": 1}  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(LabelSettings)}
    for name, value in others.items():
        with pytest.raises(DataError, match=f"do not fit, {name} was .* and is [^,]*;") as caught:
            opened(shard_folder, labels, **{name: value})
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="teacher was aaaaaaaaaaaa... and is cccccccccccc..., seq_len was 32"):
        opened(shard_folder, labels, teacher="c" * 64, seq_len=8)
    opened(shard_folder, labels, rows_per_pass=None, teacher=None, sae=None)


def test_a_folder_is_continued_for_the_same_settings_only(
    shard_folder: Path, labels: Path, tmp_path: Path
) -> None:
    """Catches labels of two teachers in one folder, and files of somebody else that are removed."""
    out = tmp_path / "labels"
    fill(shard_folder, out, limit=5)
    with pytest.raises(DataError, match="teacher was aaaaaaaaaaaa... and is dddd.*; --overwrite replaces"):
        new_writer(shard_folder, out, teacher="d" * 64)
    with pytest.raises(DataError, match="rows_per_pass was 4 and is 8"):
        new_writer(shard_folder, out, rows_per_pass=8)
    assert sum(map(len, (found_chunks(out, split) for split in SPLITS))) == 5
    new_writer(shard_folder, out, overwrite=True, teacher="d" * 64).close()
    assert not any(found_chunks(out, split) for split in SPLITS)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match=r"not empty and no labels in it; choose another concepts\.labels"):
        new_writer(shard_folder, foreign, overwrite=True)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_a_file_system_without_locks_is_refused(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches processes that all believe to be alone: some network file systems lock nothing."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with pytest.raises(DataError, match="labels: no file locks on this file system: No locks available"):
        new_writer(shard_folder, tmp_path / "labels")


def test_labels_that_are_being_written_are_not_replaced(shard_folder: Path, tmp_path: Path) -> None:
    """Catches --overwrite that pulls the folder from under a running process."""
    out = tmp_path / "labels"
    (worker,) = start(1, lambda: fill(shard_folder, out, pause_s=0.05))
    wait_for_files(out, 2)
    try:
        with pytest.raises(DataError, match="another process is writing these labels"):
            new_writer(shard_folder, out, overwrite=True, teacher="d" * 64)
    finally:
        worker.kill()
        worker.join()
    assert len(list(out.glob("*/*/*.u16"))) >= 2


def take_many(loader: TokenLoader) -> None:
    for _ in range(20):
        next(loader)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (flip, "damaged: its XXH3 is not the one in its name"),
    (lambda path: path.write_bytes(path.read_bytes()[:-2]), r"file has \d+ bytes, the manifest says \d+"),
    (lambda path: path.write_bytes(path.read_bytes() + b"\0"), r"file has \d+ bytes, the manifest says"),
    (lambda path: path.unlink(), "file is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_found_at_read_and_by_verify(
    damage: Callable[[Path], object],
    message: str,
    shard_folder: Path,
    labels: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches changed labels that would be trained on; what is missing can be labelled again."""
    shards = tmp_path / "shards"
    shutil.copytree(shard_folder, shards)
    shutil.copytree(labels, shards / "labels")
    cache = opened(shards, shards / "labels")
    path = sorted((shards / "labels" / "train" / "000000").iterdir())[3]
    damage(path)
    loader = TokenLoader(config_of(shards), rows_per_step=64, rank=0, world_size=1, labels=cache)
    with pytest.raises(DataError, match=message) as caught:
        take_many(loader)
    loader.close()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    for folder in (shards, shards / "labels"):
        assert verify([str(folder)]) == 1
        out, err = capsys.readouterr()
        assert err.count("error: ") == 1
        assert str(path) in err
        assert "labels, val: ok" in out
        assert "labels, train" not in out
    path.unlink(missing_ok=True)
    (worker,) = start(1, lambda: fill(shards, shards / "labels"))
    worker.join()
    assert verify([str(shards)]) == 0
    assert contents(shards / "labels") == contents(labels)


def test_verify_checks_what_labels_mean(
    shard_folder: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches ids beyond the dictionary, files of no chunk, and labels beside other shards."""
    shards = tmp_path / "shards"
    shutil.copytree(shard_folder, shards)
    shutil.copytree(labels, shards / "labels")
    stray = shards / "labels" / "train" / "000000" / "000000000.0000000000000000.u16"
    stray.touch()
    for name in ("manifest.json", "labels/labels.json"):
        body = json.loads((shards / name).read_text())
        del body["checksum"]
        if "settings" in body:
            body["settings"]["num_concepts"] = 990
        (shards / name).write_text(json.dumps(body))
    assert verify([str(shards)]) == 1
    error = capsys.readouterr().err
    assert f"{stray}: no chunk has this file" in error
    assert "is beyond the dictionary of 990" in error
    assert "labels: the labels of other shards" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(version=2), "version=2, this program reads version 1"),
        (lambda body: body["settings"].pop("sae"), "KeyError: 'sae'"),
        (lambda body: body["settings"].update(num_targets="3"), "num_targets='3'"),
        (lambda body: body.update(splits=3), "not a valid manifest"),
    ],
)
def test_a_broken_manifest_is_one_line(
    change: Callable[[dict[str, object]], object], message: str, labels: Path, tmp_path: Path
) -> None:
    """Catches a traceback, or settings that are compared by chance."""
    shutil.copytree(labels, tmp_path / "labels")
    body = json.loads((labels / "labels.json").read_text())
    del body["checksum"]
    change(body)
    (tmp_path / "labels" / "labels.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match=message):
        read_labels(tmp_path / "labels")
