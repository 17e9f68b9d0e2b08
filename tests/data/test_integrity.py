"""Random damage of every kind is found by training and by verify; skipped rows leave all others in place."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch import Batch, Damage
from data.config import DataConfig
from data.label_cache import LABELS_NAME, LabelCache, read_labels
from data.label_writer import LabelWriter
from data.loader import TokenLoader, validation_batches
from data.manifest import (
    TAR_BLOCK,
    Chunk,
    DamagedData,
    DataError,
    Manifest,
    Shard,
    read_manifest,
    write_manifest,
)
from data.order import WindowOrder
from data.seal import seal
from data.shards import ShardLayout, SplitWriter
from data.source import open_label_cache, windows_per_chunk
from data.verify import main as verify
from tests.data.http_server import serving
from tests.data.test_label_cache import settings_of

SEQ_LEN = 32
CHUNK_TOKENS = 64
ROWS = 4
CORRUPTIONS = 500


def write_shards(folder: Path, like: Path, seed: int) -> Manifest:
    """A small folder with the tokenizer of another one: three training shards of four chunks, one for val."""
    folder.mkdir(parents=True)
    shutil.copy(like / "tokenizer.json", folder / "tokenizer.json")
    generator = np.random.default_rng(seed)
    splits = {}
    for name, tokens in (("train", 12 * CHUNK_TOKENS), ("val", 3 * CHUNK_TOKENS)):
        writer = SplitWriter(folder, name, ShardLayout("uint16", CHUNK_TOKENS, 4))
        ids = generator.integers(1, 320, tokens, dtype=np.uint16)
        ids[-1] = 0
        writer.append(ids, documents=1)
        splits[name] = writer.finish()
    write_manifest(folder, dataclasses.replace(read_manifest(like), chunk_tokens=CHUNK_TOKENS, splits=splits))
    return read_manifest(folder)


def write_labels(folder: Path, manifest: Manifest) -> LabelCache:
    settings = dataclasses.replace(settings_of(manifest), seq_len=SEQ_LEN)
    windows = {split: windows_per_chunk(manifest, split, SEQ_LEN) for split in manifest.splits}
    writer = LabelWriter(folder, settings, windows)
    generator = np.random.default_rng(1)
    for split, number in writer.claims():
        shape = (windows[split][number], *settings.window_shape)
        writer.write(split, number, generator.integers(0, 1000, shape, dtype=np.uint16))
    assert writer.finish()
    writer.close()
    return read_labels(folder)


@pytest.fixture(scope="module")
def other(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another preparation with the same tokenizer, of the same sizes."""
    folder = tmp_path_factory.mktemp("other") / "shards"
    write_labels(folder / "labels", write_shards(folder, shard_folder, seed=5))
    return folder


@pytest.fixture
def folder(shard_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    write_labels(folder / "labels", write_shards(folder, shard_folder, seed=4))
    return folder


def config_of(folder: Path | str, **changes: object) -> DataConfig:
    config = DataConfig(dir=str(folder), seq_len=SEQ_LEN, lanes=4, prefetch_steps=0)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def open_labels(config: DataConfig, folder: Path | str, manifest: Manifest) -> LabelCache:
    return open_label_cache(config, f"{folder}/labels", settings_of(manifest))


def read_everything(config: DataConfig, manifest: Manifest) -> tuple[list[Batch], list[Batch]]:
    """One epoch as training reads it, and the validation windows."""
    labels = open_labels(config, config.dir, manifest)
    windows = sum(windows_per_chunk(manifest, "train", SEQ_LEN))
    loader = TokenLoader(config, rows_per_step=ROWS, rank=0, world_size=1, labels=labels)
    try:
        train = [next(loader) for _ in range(-(-windows // ROWS))]
    finally:
        loader.close()
    return train, list(validation_batches(config, share=1.0, rows=ROWS, rank=0, world_size=1, labels=labels))


class Corruptor:
    """Random damage of a sound folder."""

    def __init__(self, folder: Path, other: Path, seed: int) -> None:
        self.folder, self.other = folder, other
        self.manifest = read_manifest(folder)
        self.random = random.Random(seed)
        self.sound = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.shards = sorted(folder.glob("*.tar"))
        self.labels = sorted(folder.glob("labels/*/*/*.u16"))
        self.manifests = [folder / "manifest.json", folder / "labels" / LABELS_NAME]
        self.kinds: dict[str, Callable[[], None]] = {
            "flip": self.flip,
            "truncate": self.truncate,
            "delete": self.delete,
            "swap": self.swap,
            "duplicate": self.duplicate,
            "wrong manifest": self.wrong_manifest,
        }

    @contextmanager
    def corrupted(self, kind: str) -> Iterator[None]:
        self.kinds[kind]()
        changed = [path for path, raw in self.sound.items() if not path.is_file() or path.read_bytes() != raw]
        assert changed
        try:
            yield
        finally:
            for path in changed:
                path.write_bytes(self.sound[path])

    def chunk(self) -> tuple[Path, Chunk]:
        split = self.manifest.splits[self.random.choice(["train", "val"])]
        shard, chunk = self.random.choice(split.chunks)
        return self.folder / shard.name, chunk

    def member(self, path: Path, chunk: Chunk) -> bytes:
        return path.read_bytes()[chunk.offset :][: chunk.member_bytes("uint16")]

    def flip(self) -> None:
        """One bit of a chunk, of its header, of labels, of a manifest or of the tokenizer."""
        what = self.random.randrange(4)
        path, chunk = self.chunk()
        # Behind the payload is padding, and the digits of the header's checksum may be written in two ways.
        header = [*range(148), *range(156, TAR_BLOCK)]
        positions = [
            chunk.offset + place for place in (*header, *range(TAR_BLOCK, TAR_BLOCK + 2 * chunk.tokens))
        ]
        if what:
            path = self.random.choice(
                [self.labels, self.manifests, [self.folder / "tokenizer.json"]][what - 1]
            )
            positions = list(range(path.stat().st_size))
        raw = bytearray(path.read_bytes())
        raw[self.random.choice(positions)] ^= 1 << self.random.randrange(8)
        path.write_bytes(raw)

    def any_file(self) -> Path:
        files = [self.folder / "tokenizer.json", *self.manifests]
        return self.random.choice([self.random.choice(group) for group in (self.shards, self.labels, files)])

    def truncate(self) -> None:
        path = self.any_file()
        raw = path.read_bytes()
        path.write_bytes(raw[: self.random.randrange(len(raw))])

    def delete(self) -> None:
        """A file, or the bytes of a chunk."""
        if self.random.random() < 0.5:
            self.random.choice([*self.shards, *self.labels, self.folder / "tokenizer.json"]).unlink()
            return
        path, chunk = self.chunk()
        raw = path.read_bytes()
        path.write_bytes(raw[: chunk.offset] + raw[chunk.offset + chunk.member_bytes("uint16") :])

    def two_chunks(self) -> list[tuple[Path, Chunk]]:
        while True:
            first, second = self.chunk(), self.chunk()
            if first[1].crc32 != second[1].crc32 and first[1].tokens == second[1].tokens:
                return [first, second]

    def write_member(self, path: Path, chunk: Chunk, member: bytes) -> None:
        raw = path.read_bytes()
        path.write_bytes(raw[: chunk.offset] + member + raw[chunk.offset + len(member) :])

    def swap(self) -> None:
        """Two chunks, two shards or the labels of two chunks."""
        if self.random.random() < 0.5:
            pair = self.two_chunks()
            members = [self.member(*place) for place in pair]
            for place, member in zip(pair, reversed(members), strict=True):
                self.write_member(*place, member)
            return
        first, second = self.random.sample(self.random.choice([self.shards, self.labels]), 2)
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)

    def duplicate(self) -> None:
        """A chunk, a shard or a file of labels in the place of another one."""
        if self.random.random() < 0.5:
            source, target = self.two_chunks()
            self.write_member(*target, self.member(*source))
            return
        source, target = self.random.sample(self.random.choice([self.shards, self.labels]), 2)
        target.write_bytes(source.read_bytes())

    def wrong_manifest(self) -> None:
        """Another folder's, one number changed by hand, or one that was written wrong, checksum and all."""
        which = self.random.randrange(3)
        if which == 0:
            name = self.random.choice(["manifest.json", f"labels/{LABELS_NAME}"])
            shutil.copy(self.other / name, self.folder / name)
            return
        path = self.random.choice(self.manifests) if which == 1 else self.manifests[0]
        body = json.loads(path.read_bytes())
        if which == 1:
            self.change_a_number(body)
            path.write_text(json.dumps(body, sort_keys=True))
            return
        del body["checksum"]
        shard = self.random.choice(body["splits"][self.random.choice(["train", "val"])]["shards"])
        self.random.choice(shard["chunks"])[self.random.choice([0, 2])] += self.random.choice([512, -512, 1])
        path.write_text(seal(body))

    def change_a_number(self, body: object) -> None:
        places: list[tuple[dict | list, str | int]] = []  # type: ignore[type-arg]

        def collect(value: object) -> None:
            if isinstance(value, dict | list):
                for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                    if type(item) is int:
                        places.append((value, key))
                    collect(item)

        collect(body)
        holder, key = self.random.choice(places)
        holder[key] += self.random.choice([-1, 1, 2, 64])  # type: ignore[index]


def test_random_corruptions_are_all_found(
    folder: Path,
    other: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    """Catches damage of any kind that would be trained on, by either of the two ways to look for it."""
    manifest = read_manifest(folder)
    config = config_of(folder)
    read_everything(config, manifest)
    assert verify([str(folder)]) == 0
    corruptor = Corruptor(folder, other, seed=2024)
    found: Counter[str] = Counter()
    missed = []
    for number in range(CORRUPTIONS):
        kind = list(corruptor.kinds)[number % len(corruptor.kinds)]
        with corruptor.corrupted(kind):
            try:
                read_everything(config, manifest)
                missed.append((number, kind, "training"))
            except DataError:
                found[kind] += 1
            if verify([str(folder)]) == 0:
                missed.append((number, kind, "verify"))
    capsys.readouterr()
    record_property("found", dict(found))
    print(dict(found))
    assert missed == []
    assert sum(found.values()) == CORRUPTIONS
    assert min(found.values()) >= CORRUPTIONS // len(corruptor.kinds)
    read_everything(config, manifest)


def take_many(loader: TokenLoader) -> None:
    for _ in range(10):
        next(loader)


def damage_chunk(folder: Path, manifest: Manifest, split: str, number: int) -> Shard:
    shard, chunk = manifest.splits[split].chunks[number]
    raw = bytearray((folder / shard.name).read_bytes())
    raw[chunk.offset + TAR_BLOCK + 3] ^= 16
    (folder / shard.name).write_bytes(raw)
    return shard


def test_skipped_rows_are_masked_and_all_others_stay(folder: Path) -> None:
    """Catches rows that move up into the place of skipped ones, wrong counts, and masks of sound rows."""
    manifest = read_manifest(folder)
    sound = read_everything(config_of(folder), manifest)
    damage_chunk(folder, manifest, "train", 5)
    damage_chunk(folder, manifest, "val", 1)
    next((folder / "labels" / "train").rglob("000000002.*")).unlink()
    order = WindowOrder(windows_per_chunk(manifest, "train", SEQ_LEN), seed=0, lanes=4)
    chunks = order.locate(np.arange(24))[2].tolist()
    expected = {"train": {chunk: chunks.count(chunk) for chunk in (5, 2)}, "val": {1: 2}}
    for prefetch_steps in (0, 2):
        found = read_everything(config_of(folder, on_damage="skip", prefetch_steps=prefetch_steps), manifest)
        for split, batches, intact in zip(("train", "val"), found, sound, strict=True):
            lost: Counter[Damage] = Counter()
            for batch, whole in zip(batches, intact, strict=True):
                masked = set(batch.masked_rows) - set(whole.masked_rows)
                lost.update(damage for _, damage in batch.damaged)
                assert batch.num_rows == whole.num_rows
                assert batch.num_counted == whole.num_counted - len(masked)
                assert batch.targets is not None and whole.targets is not None
                for row in range(ROWS):
                    if row not in masked:
                        assert torch.equal(batch.tokens[row], whole.tokens[row])
                        assert torch.equal(batch.targets[row], whole.targets[row])
                kept = [row for row in range(ROWS) if row not in batch.masked_rows]
                assert torch.equal(batch.counted(batch.tokens), whole.tokens[kept])
            assert all(damage.split == split and "\n" not in damage.error for damage in lost)
            assert {damage.chunk: rows for damage, rows in lost.items()} == expected[split]


def test_every_rank_masks_its_own_rows_of_a_damaged_chunk(folder: Path) -> None:
    """Catches ranks that return other numbers of rows or batches than their neighbours, which then hang."""
    manifest = read_manifest(folder)
    damage_chunk(folder, manifest, "train", 7)
    order = WindowOrder(windows_per_chunk(manifest, "train", SEQ_LEN), seed=0, lanes=4)
    _, _, chunks, _ = order.locate(np.arange(24))
    loaders = [
        TokenLoader(config_of(folder, on_damage="skip"), rows_per_step=8, rank=rank, world_size=4)
        for rank in range(4)
    ]
    skipped = 0
    for _ in range(3):
        batches = [next(loader) for loader in loaders]
        assert {batch.tokens.shape for batch in batches} == {(2, SEQ_LEN + 1)}
        skipped += sum(len(batch.damaged) for batch in batches)
    assert skipped == (chunks == 7).sum() == 2
    for loader in loaders:
        loader.close()


def test_microbatches_keep_their_own_damage(folder: Path) -> None:
    """Catches a mask that is not moved with the rows of its microbatch."""
    manifest = read_manifest(folder)
    damage_chunk(folder, manifest, "train", 5)
    (batches, _) = read_everything(config_of(folder, on_damage="skip"), manifest)
    for batch in batches:
        parts = batch.microbatches(3)
        masked = [3 * number + row for number, part in enumerate(parts) for row in part.masked_rows]
        assert masked == batch.masked_rows
        assert sum(part.num_counted for part in parts) == batch.num_counted


@pytest.mark.parametrize("what", ["manifest.json", f"labels/{LABELS_NAME}"])
def test_a_data_set_that_is_gone_is_not_damage(folder: Path, other: Path, what: str) -> None:
    """Catches a run that masks every row because a disk is not mounted or the shards were made anew."""
    manifest = read_manifest(folder)
    config = config_of(folder, on_damage="skip")
    labels = open_labels(config, config.dir, manifest)
    loader = TokenLoader(config, rows_per_step=ROWS, rank=0, world_size=1, labels=labels)
    next(loader)
    for path in [*folder.glob("*.tar"), *folder.glob("labels/*/*/*.u16")]:
        path.unlink()
    for replacement, message in ((None, "file is missing"), (other / what, "changed since it was opened")):
        (folder / what).unlink(missing_ok=True)
        if replacement is not None:
            shutil.copy(replacement, folder / what)
        with pytest.raises(DataError, match=message):
            take_many(loader)
        loader.close()


def test_damage_behind_a_url_is_skipped_and_a_dead_server_is_not(folder: Path) -> None:
    """Catches a server's failure that is taken for damage, and damage that ends a run that skips it."""
    manifest = read_manifest(folder)
    shard = damage_chunk(folder, manifest, "train", 5)
    missing = next(shard for shard, _ in manifest.splits["train"].chunks[8:])
    (folder / missing.name).unlink()
    with serving(folder) as (url, behaviour):
        config = config_of(url, on_damage="skip", remote_timeout_s=2.0)
        labels = open_labels(config, config.dir, manifest)
        loader = TokenLoader(config, rows_per_step=24, rank=0, world_size=1, labels=labels)
        batch = next(loader)
        assert sorted({damage.chunk for _, damage in batch.damaged}) == [5, 8, 9, 10, 11]
        assert f"{shard.name} at offset" in str(batch.damaged)
        assert f"{missing.name}: missing" in str(batch.damaged)
        loader.load_state_dict({**loader.state_dict(), "next_row": 0})
        behaviour.refuse = [503] * 10_000
        with pytest.raises(DataError, match="gave up after .* 503") as caught:
            next(loader)
        assert not isinstance(caught.value, DamagedData)
        loader.close()


def test_a_cache_does_not_keep_damage(folder: Path, tmp_path: Path) -> None:
    """Catches shards that were repaired and a cache on the node that still serves the damaged bytes."""
    manifest = read_manifest(folder)
    shard, _ = manifest.splits["train"].chunks[5]
    sound = (folder / shard.name).read_bytes()
    damage_chunk(folder, manifest, "train", 5)
    config = config_of(folder, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DamagedData, match="its CRC-32"):
        read_everything(config, manifest)
    (folder / shard.name).write_bytes(sound)
    read_everything(config, manifest)


def test_damage_at_the_start_is_named_and_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run with on_damage=skip that ends at its start over what it would skip later."""
    manifest = read_manifest(folder)
    (folder / "train-000001.tar").unlink()
    with pytest.raises(DamagedData, match=r"train-000001\.tar: file is missing"):
        read_everything(config_of(folder), manifest)
    train, _ = read_everything(config_of(folder, on_damage="skip"), manifest)
    assert sum(len(batch.damaged) for batch in train) == 8
    assert "train-000001.tar: file is missing; rows of it that cannot be read are skipped" in caplog.text
