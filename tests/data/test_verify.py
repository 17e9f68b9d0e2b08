"""The verify command finds every damage, each on one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.manifest import DataError, read_manifest, write_manifest
from data.verify import main, verify_folder
from tests.data.conftest import read_tokens


@pytest.fixture
def folder(shard_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(shard_folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_sound_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches false alarms, and documents or tokens counted twice at chunk overlaps."""
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["train", "val"]
    split = read_manifest(folder).splits["train"]
    assert lines[0] == (
        f"train: ok, {split.documents} documents, {split.tokens:,} tokens, "
        f"{len(split.chunks)} chunks, {len(split.shards)} shards"
    )


def flip(position: int) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "train-000001.tar"
        raw = bytearray(path.read_bytes())
        raw[position] ^= 1
        path.write_bytes(raw)

    return damage


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        body = json.loads((folder / "manifest.json").read_bytes())
        del body["checksum"]
        change(body)
        (folder / "manifest.json").write_text(json.dumps(body))

    return damage


def truncate(folder: Path) -> None:
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (flip(512), "train-000001.tar at offset 0: chunk is damaged"),
    (flip(5), "train-000001.tar at offset 0: damaged tar header"),
    (flip(512 + 514 + 3), "train-000001.tar: SHA-256 is not the manifest's"),  # padding
    (flip(-1), "train-000001.tar: SHA-256 is not the manifest's"),
    (truncate, "train-000001.tar: shard has 3000 bytes, the manifest says"),
    (lambda folder: (folder / "val-000000.tar").unlink(), "val-000000.tar: shard is missing"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
    (edit(lambda body: body["tokenizer"].update(sha256="00")), "sha256 is"),
    (edit(lambda body: body["tokenizer"].update(eot_id=1)), "eot_id is 0, the manifest says 1"),
    (edit(lambda body: body["tokenizer"].update(vocab_size=100)), "is beyond the vocabulary of 100"),
    (edit(lambda body: body["splits"]["val"].update(documents=1)), "documents, the manifest says 1"),
    (edit(lambda body: body["splits"]["val"].update(tokens=7)), "tokens, the manifest says 7"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_found(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], message: str
) -> None:
    """Catches a check that is skipped."""
    damage(folder)
    assert main([str(folder)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert any(message in line for line in errors)


def test_chunks_that_do_not_join(folder: Path) -> None:
    """Catches two chunks that were exchanged, each sound on its own."""
    manifest = read_manifest(folder)
    train = manifest.splits["train"]
    first, second, *rest = train.shards
    swapped = dataclasses.replace(train, shards=(second, first, *rest))
    write_manifest(folder, dataclasses.replace(manifest, splits={**manifest.splits, "train": swapped}))
    assert any("chunks do not join" in problem for problem in verify_folder(folder)[1])


def test_id_beyond_the_vocabulary(folder: Path) -> None:
    """Catches ids that would index outside the embedding although every checksum fits."""
    path = folder / "val-000000.tar"
    raw = bytearray(path.read_bytes())
    raw[512:514] = (5000).to_bytes(2, "little")
    path.write_bytes(raw)
    manifest = read_manifest(folder)
    val = manifest.splits["val"]
    shard = val.shards[0]
    chunk = shard.chunks[0]
    payload = bytes(raw[512 : 512 + 2 * chunk.tokens])
    chunks = (dataclasses.replace(chunk, crc32=zlib.crc32(payload)), *shard.chunks[1:])
    shard = dataclasses.replace(shard, chunks=chunks, sha256=hashlib.sha256(raw).hexdigest())
    val = dataclasses.replace(val, shards=(shard, *val.shards[1:]))
    write_manifest(folder, dataclasses.replace(manifest, splits={**manifest.splits, "val": val}))
    assert verify_folder(folder)[1] == [f"{path} at offset 0: token id 5000 is beyond the vocabulary of 320"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(version=9), "version=9, this program reads version 1"),
        (lambda body: body.update(dtype="int8"), "dtype='int8' is not one of uint16, uint32"),
        (lambda body: body.pop("tokenizer"), "not a valid manifest: KeyError: 'tokenizer'"),
        (lambda body: body.update(splits=[]), "not a valid manifest"),
        (lambda body: body.update(chunk_tokens=-1), "chunk_tokens=-1 is not a whole number"),
        (
            lambda body: body["splits"]["val"]["shards"][0].update(name="../x.tar"),
            "shard name '../x.tar' leaves the folder",
        ),
        (lambda body: body["splits"]["val"]["shards"][0].update(bytes=100), "the shard has 100"),
        (
            lambda body: body["splits"]["val"]["shards"][0]["chunks"].append([0, 5, 5]),
            "chunk at offset 0 is empty or overlaps another",
        ),
    ],
)
def test_bad_manifest(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    """Catches a manifest that leads outside its folder or its files."""
    edit(change)(folder)
    assert main([str(folder)]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(DataError):
        read_manifest(folder)


def test_manifest_round_trip(folder: Path) -> None:
    """Catches fields lost in writing; the hash is that of the file."""
    manifest = read_manifest(folder)
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, manifest)
    assert (folder / "manifest.json").read_bytes() == before
    assert read_manifest(folder) == manifest
    assert manifest.sha256 == hashlib.sha256(before).hexdigest()
    assert not list(folder.glob("*.tmp"))


def test_the_documented_program_writes_a_valid_folder(tmp_path: Path, shard_folder: Path) -> None:
    """Catches a documented format that differs from the real one: the page's own program is run."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    manifest = read_manifest(shard_folder)
    splits = {
        name: (read_tokens(shard_folder, manifest, name), split.documents)
        for name, split in manifest.splits.items()
    }
    names["write_folder"](
        tmp_path,
        splits,
        (shard_folder / "tokenizer.json").read_bytes(),
        manifest.tokenizer.vocab_size,
        manifest.tokenizer.eot_id,
        manifest.chunk_tokens,
    )
    summaries, problems = verify_folder(tmp_path)
    assert (len(summaries), problems) == (2, [])
    for name, (tokens, _) in splits.items():
        written = read_manifest(tmp_path)
        assert read_tokens(tmp_path, written, name).tolist() == tokens.tolist()
        pairs = zip(written.splits[name].chunks, manifest.splits[name].chunks, strict=True)
        assert all((mine.tokens, mine.crc32) == (its.tokens, its.crc32) for (_, mine), (_, its) in pairs)
