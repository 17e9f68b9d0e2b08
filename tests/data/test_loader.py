"""Batches are the corpus's windows, exactly once, resumable by any number of ranks."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.config import DataConfig
from data.loader import TokenLoader, validation_batches
from data.manifest import Chunk, DataError, Manifest, Shard, read_manifest
from data.prepare import PrepareOptions, prepare
from data.source import open_source, windows_per_chunk
from data.storage import LocalStorage, Storage
from data.stream import read_chunk, read_windows
from tests.data.conftest import make_texts, read_tokens, write_jsonl

SEQ_LEN = 32


@pytest.fixture
def config(shard_folder: Path) -> DataConfig:
    return DataConfig(dir=str(shard_folder), seq_len=SEQ_LEN, lanes=8)


def corpus_windows(folder: Path, manifest: Manifest, split: str) -> list[bytes]:
    """Return all windows of a split as bytes, cut from the memory-mapped tokens."""
    tokens = read_tokens(folder, manifest, split)
    count = (len(tokens) - 1) // SEQ_LEN  # chunks are multiples of SEQ_LEN, so windows do not see them
    return [tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1].tobytes() for i in range(count)]


def rows_of(batch: Batch) -> list[bytes]:
    return [row.tobytes() for row in batch.tokens[: batch.num_rows].numpy()]


def step(loaders: list[TokenLoader]) -> list[bytes]:
    return [row for loader in loaders for row in rows_of(next(loader))]


def make(config: DataConfig, rows: int, world_size: int) -> list[TokenLoader]:
    return [
        TokenLoader(config, rows_per_step=rows, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


def take_many(loader: TokenLoader) -> None:
    for _ in range(1000):
        next(loader)


def close(loaders: list[TokenLoader]) -> None:
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("prefetch_steps", [0, 3])
def test_one_epoch_over_world_sizes_4_2_3(
    config: DataConfig, shard_folder: Path, prefetch_steps: int
) -> None:
    """Catches windows lost or repeated when a run goes on with another number of ranks."""
    config = dataclasses.replace(config, prefetch_steps=prefetch_steps)
    wanted = corpus_windows(shard_folder, read_manifest(shard_folder), "train")
    seen: list[bytes] = []
    state = None
    for world_size, rows, steps in ((4, 12, 5), (2, 10, 7), (3, 15, 4), (1, 1, len(wanted) - 190)):
        loaders = make(config, rows, world_size)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            seen += step(loaders)
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
        close(loaders)
    assert len(seen) == len(wanted) > 200
    assert sorted(seen) == sorted(wanted)
    assert seen != wanted  # shuffled


def test_batch_is_uint16_of_one_step(config: DataConfig) -> None:
    """Catches batches that are cut by rank instead of by row, or widened on the host."""
    (loader,) = make(config, 6, 1)
    batch = next(loader)
    assert batch.tokens.shape == (6, SEQ_LEN + 1)
    assert batch.num_rows == 6
    assert batch.tokens.dtype == torch.uint16
    assert next(iter(loader)).tokens.shape == batch.tokens.shape
    loader.close()


@pytest.mark.parametrize("prefetch_steps", [0, 1, 5])
def test_state_counts_returned_batches_only(config: DataConfig, prefetch_steps: int) -> None:
    """Catches a state that is ahead by what the thread has read."""
    config = dataclasses.replace(config, prefetch_steps=prefetch_steps)
    (straight,), (resumed,) = make(config, 7, 1), make(config, 7, 1)
    batches = [rows_of(next(straight)) for _ in range(60)]  # crosses epochs
    for number in (0, 1, 13, 59):
        resumed.load_state_dict({**straight.state_dict(), "next_row": 7 * number})
        assert resumed.state_dict()["next_row"] == 7 * number
        assert rows_of(next(resumed)) == batches[number]
        assert resumed.state_dict()["next_row"] == 7 * (number + 1)
    close([straight, resumed])


def test_epochs_wrap_inside_one_step(config: DataConfig, shard_folder: Path) -> None:
    """Catches a batch larger than the data set, and an epoch that repeats the order before it."""
    wanted = corpus_windows(shard_folder, read_manifest(shard_folder), "train")
    (loader,) = make(config, 3 * len(wanted), 1)
    rows = rows_of(next(loader))
    assert sorted(rows) == sorted(wanted * 3)
    loader.close()


def test_other_data_or_order_is_refused(config: DataConfig) -> None:
    """Catches a resume that silently goes on in another order or in other data."""
    (loader,) = make(config, 4, 1)
    state = loader.state_dict()
    for key, other in (("seed", 5), ("lanes", 9), ("seq_len", 64), ("manifest_sha256", "x"), ("version", 0)):
        with pytest.raises(DataError, match=f"{key} was {other!r}, is "):
            loader.load_state_dict({**state, key: other})
    assert len(json.dumps(state)) < 300


def test_uint32_shards_are_int32_batches(corpus_file: Path, tmp_path: Path, config: DataConfig) -> None:
    """Catches wide shards read as narrow ones."""
    options = PrepareOptions(
        input=corpus_file, out=tmp_path / "wide", vocab_size=320, val_fraction=0.1, chunk_tokens=256,
        chunks_per_shard=4, dtype="uint32",
    )  # fmt: skip
    prepare(options)
    (wide,) = make(dataclasses.replace(config, dir=str(tmp_path / "wide")), 4, 1)
    (narrow,) = make(config, 4, 1)
    tokens = next(wide).tokens
    assert tokens.dtype == torch.int32
    assert torch.equal(tokens, next(narrow).tokens.to(torch.int32))
    close([wide, narrow])


@pytest.mark.parametrize(("rows", "world_size"), [(1, 1), (3, 1), (4, 3), (1000, 2)])
def test_validation_sees_each_window_once(
    config: DataConfig, shard_folder: Path, rows: int, world_size: int
) -> None:
    """Catches windows counted twice by padding, and ranks with different numbers of batches (a hang)."""
    wanted = corpus_windows(shard_folder, read_manifest(shard_folder), "val")
    per_rank = [
        list(validation_batches(config, share=1.0, rows=rows, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = [row for step in zip(*per_rank, strict=True) for batch in step for row in rows_of(batch)]
    assert seen == wanted
    assert all(batch.tokens.shape == (rows, SEQ_LEN + 1) for batches in per_rank for batch in batches)


def test_share_of_the_validation_windows(config: DataConfig, shard_folder: Path) -> None:
    """Catches a share that depends on the number of ranks, and a share of nothing."""
    wanted = corpus_windows(shard_folder, read_manifest(shard_folder), "val")
    for share, count in ((0.5, round(len(wanted) / 2)), (1e-9, 1)):
        for world_size in (1, 3):
            ranks = [
                validation_batches(config, share=share, rows=4, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            assert sum(batch.num_rows for batches in ranks for batch in batches) == count
    with pytest.raises(ValueError, match=r"share=0 of the validation windows must lie in \(0, 1\]"):
        validation_batches(config, share=0, rows=4, rank=0, world_size=1)
    with pytest.raises(ValueError, match="rows=0"):
        validation_batches(config, share=1.0, rows=0, rank=0, world_size=1)


def test_ranks_must_divide_the_batch(config: DataConfig) -> None:
    """Catches rows dropped in silence."""
    with pytest.raises(
        ValueError, match=r"train\.batch_size=8 is not divisible by the 3 data-parallel ranks"
    ):
        TokenLoader(config, rows_per_step=8, rank=0, world_size=3)
    with pytest.raises(ValueError, match="rank=3 must lie in 0"):
        TokenLoader(config, rows_per_step=9, rank=3, world_size=3)


def _prefetch_threads() -> int:
    return sum(thread.name == "token-prefetch" for thread in threading.enumerate())


def test_no_thread_is_left(config: DataConfig) -> None:
    """Catches prefetch threads that outlive close() or their loader."""
    loaders = make(config, 4, 2)
    step(loaders)
    assert _prefetch_threads() == 2
    loaders[0].close()
    loaders[0].close()
    assert _prefetch_threads() == 1
    del loaders
    gc.collect()
    assert _prefetch_threads() == 0


def test_chunks_are_read_once_and_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that thrashes (a chunk read again for each row) or that grows with the data."""
    write_jsonl(tmp_path / "corpus.jsonl", make_texts(600))
    options = PrepareOptions(
        input=tmp_path / "corpus.jsonl", out=tmp_path / "out", vocab_size=300, val_fraction=0.1,
        chunk_tokens=1024, chunks_per_shard=8,
    )  # fmt: skip
    manifest = prepare(options)
    read: list[Chunk] = []

    def counting(storage: Storage, dtype: str, shard: Shard, chunk: Chunk, buffer: memoryview) -> np.ndarray:
        read.append(chunk)
        return read_chunk(storage, dtype, shard, chunk, buffer)

    monkeypatch.setattr("data.stream.read_chunk", counting)
    config = DataConfig(dir=str(tmp_path / "out"), seq_len=SEQ_LEN, lanes=6, prefetch_steps=0)
    windows = sum(windows_per_chunk(manifest, "train", SEQ_LEN))
    chunks = len(manifest.splits["train"].chunks)
    assert chunks > 30
    for rows in (2, 6, 24):
        (loader,) = make(config, rows, 1)
        for _ in range(windows // rows):
            next(loader)
        # A chunk on the border of two lanes is read for each: once at an end and once at a start.
        assert chunks <= len(read) <= chunks + config.lanes
        read.clear()


def damaged(shard_folder: Path, tmp_path: Path, position: int, mask: int = 1) -> Path:
    """Return a copy whose first training shard has one byte changed."""
    folder = tmp_path / "damaged"
    shutil.copytree(shard_folder, folder)
    path = folder / "train-000000.tar"
    raw = bytearray(path.read_bytes())
    raw[position] ^= mask
    path.write_bytes(raw)
    return folder


@pytest.mark.parametrize("prefetch_steps", [0, 2])
@pytest.mark.parametrize("position", [0, 100, 130, 150, 156, 260, 512, 800, 512 + 513])
def test_flipped_byte_is_found_at_read(
    config: DataConfig, shard_folder: Path, tmp_path: Path, position: int, prefetch_steps: int
) -> None:
    """Catches damage in a tar header or in tokens that would be trained on, or skipped in silence."""
    folder = damaged(shard_folder, tmp_path, position)
    (loader,) = make(dataclasses.replace(config, dir=str(folder), prefetch_steps=prefetch_steps), 4, 1)
    with pytest.raises(DataError, match=r"train-000000\.tar at offset 0: .*damaged") as caught:
        take_many(loader)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError):  # it does not go on after the error
        next(loader)
    loader.close()


def test_every_flipped_bit_of_a_shard_is_found_or_harmless(
    config: DataConfig, shard_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """Catches any other place where a changed bit changes tokens unseen."""
    order = np.array([[i, 0, w] for i, w in enumerate(range(8))])
    folder = tmp_path / "damaged"
    shutil.copytree(shard_folder, folder)
    path = folder / "train-000000.tar"
    raw = path.read_bytes()
    (good,) = read_windows(LocalStorage(shard_folder), manifest, "train", SEQ_LEN, [order], 1)
    found = 0
    positions = [*range(0, 512, 3), *range(512, 1536, 37)]
    for number, position in enumerate(positions):
        bad = bytearray(raw)
        bad[position] ^= 1 << number % 8
        path.write_bytes(bad)
        try:
            (read,) = read_windows(LocalStorage(folder), manifest, "train", SEQ_LEN, [order], 1)
            assert np.array_equal(read.tokens, good.tokens)
        except DataError:
            found += 1
    assert found >= len(positions) - 40  # what is left is padding


def test_zeroed_member_and_truncation_after_the_start(
    config: DataConfig, shard_folder: Path, tmp_path: Path
) -> None:
    """Catches files that vanish or shrink after the check at the start."""
    for damage, message in (
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "no tar member there"),
        (lambda path: path.write_bytes(path.read_bytes()[:700]), "cut short: 700 of|cut short: 0 of"),
        (lambda path: path.unlink(), "file is missing"),
    ):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shard_folder, folder)
        (loader,) = make(dataclasses.replace(config, dir=str(folder)), 4, 1)
        for path in folder.glob("train-*.tar"):
            damage(path)
        with pytest.raises(DataError, match=message):
            take_many(loader)
        loader.close()


def test_open_manifest_errors(config: DataConfig, shard_folder: Path, tmp_path: Path) -> None:
    """Catches bad data that would stop a run in its middle instead of at its start."""

    def check(message: str, **changes: object) -> None:
        with pytest.raises(DataError, match=message):
            open_source(dataclasses.replace(config, **changes))  # type: ignore[arg-type]

    check(r"data\.seq_len=33 does not divide chunk_tokens=256", seq_len=33)
    check(r"seq_len=512 does not divide", seq_len=512)
    check("no such folder", dir=str(tmp_path / "nothing"))
    check("no manifest.json, so the folder is unfinished", dir=str(tmp_path))
    folder = tmp_path / "copy"
    shutil.copytree(shard_folder, folder)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    check("made by another tokenizer", dir=str(folder))
    tokenizer.unlink()
    check(r"tokenizer\.json: file is missing", dir=str(folder))
    shutil.copy(shard_folder / "tokenizer.json", tokenizer)
    shard = folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    check(r"train-000001\.tar: file has \d+ bytes, the manifest says \d+", dir=str(folder))
    shard.unlink()
    check(r"train-000001\.tar: file is missing", dir=str(folder))


def test_zero_windows_says_how_many_tokens_there_are(corpus_file: Path, tmp_path: Path) -> None:
    """Catches a run over nothing: sequences longer than the longest chunk."""
    options = PrepareOptions(input=corpus_file, out=tmp_path / "out", vocab_size=320, val_fraction=0.02)
    tokens = prepare(options).splits["val"].tokens
    message = f"'val' has 0 windows of data.seq_len=8192: its longest chunk has room for {tokens - 1} tokens"
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(dir=str(tmp_path / "out"), seq_len=8192))


@pytest.mark.gpu
def test_pinned_batches(config: DataConfig) -> None:
    """Catches a prefetch thread that pins nothing, or that fails without a CUDA context of its own."""
    loader = TokenLoader(config, rows_per_step=4, rank=0, world_size=1, pin_memory=True)
    tokens = next(loader).tokens
    assert tokens.is_pinned()
    assert torch.equal(tokens.cuda(non_blocking=True).cpu(), tokens)
    loader.close()


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_look_at_the_next_batch_counts_nothing(config: DataConfig, prefetch_steps: int) -> None:
    """Catches a cursor that counts a batch before it is trained on, and one shown that is not the next."""
    (loader,) = make(dataclasses.replace(config, prefetch_steps=prefetch_steps), 6, 1)
    next(loader)
    state = loader.state_dict()
    shown = wait_for_a_look(loader)
    assert loader.peek() is not None
    assert loader.state_dict() == state
    assert next(loader) is shown
    wait_for_a_look(loader)
    loader.load_state_dict(state)
    assert torch.equal(next(loader).tokens, shown.tokens)
    close([loader])


def wait_for_a_look(loader: TokenLoader) -> Batch:
    for _ in range(1000):
        batch = loader.peek()
        if batch is not None:
            return batch
        threading.Event().wait(0.01)
    raise AssertionError("the loader reads nothing ahead")


def test_a_look_at_a_damaged_shard_is_left_to_next(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that ends one step early, and an error that a look swallowed."""
    (loader,) = make(dataclasses.replace(config, prefetch_steps=0), 6, 1)
    next(loader)

    def damaged() -> object:
        raise DataError("damaged")

    monkeypatch.setattr(loader._read_ahead(), "_items", iter(damaged, None))
    assert loader.peek() is None
    assert loader.peek() is None
    for _ in range(2):
        with pytest.raises(DataError, match="damaged"):
            next(loader)
