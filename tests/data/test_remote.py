"""Shards behind a real HTTP server that drops, truncates, delays and refuses; and the cache before it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.config import DataConfig
from data.loader import TokenLoader, validation_batches
from data.manifest import DataError, read_manifest
from data.shard_cache import DIGEST_BYTES, CachedStorage
from data.source import open_source, open_tokenizer
from data.storage import LocalStorage, RemoteStorage
from tests.data.http_server import Behaviour, serving

SEQ_LEN = 32
STEPS = 12


@pytest.fixture
def server(shard_folder: Path) -> Iterator[tuple[str, Behaviour]]:
    with serving(shard_folder) as (url, behaviour):
        yield url, behaviour


def remote(url: str, **changes: object) -> DataConfig:
    config = DataConfig(dir=url, seq_len=SEQ_LEN, lanes=4, prefetch_steps=0, remote_timeout_s=4.0)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def read(config: DataConfig, steps: int = STEPS) -> torch.Tensor:
    loader = TokenLoader(config, rows_per_step=6, rank=0, world_size=1)
    try:
        return torch.cat([next(loader).tokens for _ in range(steps)])
    finally:
        loader.close()


def num_ranges(behaviour: Behaviour) -> int:
    return sum("bytes=" in request for request in behaviour.requests)


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_url_gives_the_same_rows(
    server: tuple[str, Behaviour], shard_folder: Path, prefetch_steps: int
) -> None:
    """Catches another order, another window or another validation set behind a URL."""
    url, behaviour = server
    far, near = remote(url, prefetch_steps=prefetch_steps), remote(str(shard_folder))
    assert torch.equal(read(far), read(near))
    assert num_ranges(behaviour) > 3
    pairs = zip(
        validation_batches(far, share=1.0, rows=4, rank=0, world_size=1),
        validation_batches(near, share=1.0, rows=4, rank=0, world_size=1),
        strict=True,
    )
    assert all(torch.equal(a.tokens, b.tokens) and a.num_rows == b.num_rows for a, b in pairs)
    assert open_tokenizer(far).sha256 == open_tokenizer(near).sha256


def test_any_fsspec_url_works(shard_folder: Path) -> None:
    """Catches code that knows http alone."""
    assert torch.equal(read(remote(f"file://{shard_folder}")), read(remote(str(shard_folder))))


@pytest.mark.parametrize(
    "fault", [{"drop": 3}, {"truncate": 3}, {"refuse": [500, 503, 429]}, {"drop": 2, "truncate": 2}]
)
def test_faults_that_pass_change_nothing(
    server: tuple[str, Behaviour], shard_folder: Path, fault: dict[str, object]
) -> None:
    """Catches a half-read range that is used, and a run that ends on one dropped connection."""
    url, behaviour = server
    for name, value in fault.items():
        setattr(behaviour, name, value)
    assert torch.equal(read(remote(url)), read(remote(str(shard_folder))))
    assert (behaviour.drop, behaviour.truncate, behaviour.refuse) == (0, 0, [])


@pytest.mark.parametrize(("stall_s", "drop"), [(0.0, 10**9), (60.0, 0)])
def test_a_dead_server_ends_the_run_after_the_stated_time(
    server: tuple[str, Behaviour], stall_s: float, drop: int
) -> None:
    """Catches a read that waits for ever: for a server that hangs up, and for one that says nothing."""
    url, behaviour = server
    loader = TokenLoader(remote(url, remote_timeout_s=2.0), rows_per_step=6, rank=0, world_size=1)
    behaviour.drop, behaviour.stall_s = drop, stall_s
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        next(loader)
    assert 1.0 < time.monotonic() - started < 4.0
    assert "gave up after" in str(caught.value)
    assert "data.remote_timeout_s=2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_port_without_a_server(server: tuple[str, Behaviour]) -> None:
    """Catches a traceback in place of the URL."""
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:1/manifest\.json: gave up .*Connect"):
        open_source(remote("http://127.0.0.1:1", remote_timeout_s=0.5))


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"refuse": [403]}, "403"), ({"refuse": [404]}, "missing"), ({"ignore_ranges": True}, "byte ranges")],
)
def test_what_cannot_pass_ends_at_once(
    server: tuple[str, Behaviour], fault: dict[str, object], message: str
) -> None:
    """Catches minutes of attempts at a file that is not there or not ours."""
    url, behaviour = server
    loader = TokenLoader(remote(url, remote_timeout_s=60.0), rows_per_step=6, rank=0, world_size=1)
    for name, value in fault.items():
        setattr(behaviour, name, value)
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"train-.*{message}"):
        next(loader)
    assert time.monotonic() - started < 2.0


def test_damage_on_the_server_is_found(tmp_path: Path, shard_folder: Path) -> None:
    """Catches trust in the transport: the bytes arrive as they are, and they are wrong."""
    shutil.copytree(shard_folder, tmp_path / "damaged")
    manifest = read_manifest(shard_folder)
    for shard in manifest.splits["train"].shards:
        content = bytearray((shard_folder / shard.name).read_bytes())
        for chunk in shard.chunks:
            content[chunk.offset + 700] ^= 1
        (tmp_path / "damaged" / shard.name).write_bytes(content)
    with serving(tmp_path / "damaged") as (url, _), pytest.raises(DataError, match="CRC-32"):
        read(remote(url))


def test_credentials_are_refused() -> None:
    """Catches a password that ends in config.yaml, in each checkpoint and in the logs."""
    for url in ("https://me:secret@host/data", "https://host/data?token=secret"):
        with pytest.raises(ValueError, match="without credentials") as caught:
            remote(url)
        assert "secret" not in str(caught.value)


def test_an_unknown_protocol() -> None:
    """Catches a stack of fsspec's own errors."""
    with pytest.raises(DataError, match=r"data\.dir=gopher://host/data: "):
        open_source(remote("gopher://host/data"))


# The cache


def test_the_cache_is_read_in_place_of_the_server(
    server: tuple[str, Behaviour], shard_folder: Path, tmp_path: Path
) -> None:
    """Catches a cache that is written and never read."""
    url, behaviour = server
    config = remote(url, cache_dir=str(tmp_path / "cache"))
    first = read(config)
    asked = num_ranges(behaviour)
    assert torch.equal(read(config), first)
    assert torch.equal(first, read(remote(str(shard_folder))))
    assert num_ranges(behaviour) == asked > 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_cache_files_are_read_again(
    server: tuple[str, Behaviour], tmp_path: Path, damage: str
) -> None:
    """Catches a local disk's error that becomes tokens, or that ends the run."""
    url, behaviour = server
    config = remote(url, cache_dir=str(tmp_path / "cache"))
    first = read(config)
    asked = num_ranges(behaviour)
    files = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    for path in files:
        content = bytearray(path.read_bytes())
        content[100] ^= 4
        path.write_bytes({"flip": content, "cut": content[:-5], "empty": b""}[damage])
    assert torch.equal(read(config), first)
    assert num_ranges(behaviour) == 2 * asked
    assert torch.equal(read(config), first)
    assert num_ranges(behaviour) == 2 * asked


def test_the_cache_is_bounded_and_forgets_the_longest_unused(tmp_path: Path) -> None:
    """Catches a node's disk that fills up, and a cache that deletes what is in use."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "shard").write_bytes(bytes(range(256)) * 1000)
    storage = CachedStorage(LocalStorage(source), tmp_path / "cache", max_bytes=20_000, version="1")
    for number in range(200):
        storage.read_range("shard", 0, 1000)  # always in use
        storage.read_range("shard", 1000 * (number + 1), 1000)
        files = [path for path in (tmp_path / "cache").iterdir() if path.name != ".lock"]
        assert sum(path.stat().st_size for path in files) <= 20_000 + 1000 + DIGEST_BYTES
        assert not [path for path in files if path.name.startswith(".")]
    (source / "shard").unlink()
    assert storage.read_range("shard", 0, 1000) == (bytes(range(256)) * 4)[:1000]
    with pytest.raises(DataError, match="missing"):
        storage.read_range("shard", 1000, 1000)


def test_another_version_of_the_data_is_not_mixed_in(tmp_path: Path) -> None:
    """Catches a cache that is keyed by the name alone, as base names are."""
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "shard").write_bytes(version.encode() * 100)
        storage = CachedStorage(
            LocalStorage(tmp_path / version), tmp_path / "cache", max_bytes=10_000, version=version
        )
        assert storage.read_range("shard", 10, 20) == version.encode() * 20


def _fill(source: Path, cache: Path) -> None:
    storage = CachedStorage(LocalStorage(source), cache, max_bytes=60_000, version="1")
    for number in range(100):
        offset = 1000 * (number * 37 % 100)
        assert storage.read_range("shard", offset, 1000) == bytes([offset // 1000]) * 1000


def test_processes_share_a_cache(tmp_path: Path) -> None:
    """Catches files that are read half-written, and two that delete at once."""
    (tmp_path / "shard").write_bytes(b"".join(bytes([number]) * 1000 for number in range(100)))
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_fill, args=(tmp_path, tmp_path / "cache")) for _ in range(4)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0] * 4


def test_a_full_cache_disk_costs_speed_only(
    server: tuple[str, Behaviour], shard_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that ends because a cache cannot be written."""
    url, _ = server
    source = open_source(remote(url))
    storage = CachedStorage(source.storage, tmp_path / "cache", max_bytes=10**6, version="1")
    shutil.rmtree(tmp_path / "cache")
    shard = source.manifest.splits["train"].shards[0]
    assert storage.read_range(shard.name, 0, 512) == (shard_folder / shard.name).read_bytes()[:512]
    assert "not kept in the cache" in caplog.text


def test_ranges_are_read_at_the_same_time(server: tuple[str, Behaviour]) -> None:
    """Catches connections that wait for each other: a far server's latency must not add up."""
    url, behaviour = server
    behaviour.stall_s = 0.2
    config = remote(url, lanes=8, remote_connections=8)
    loader = TokenLoader(config, rows_per_step=8, rank=0, world_size=1)
    started = time.monotonic()
    next(loader)
    assert num_ranges(behaviour) >= 6
    assert time.monotonic() - started < 0.2 * num_ranges(behaviour) / 2
    loader.close()


def _read_manifest(url: str) -> None:
    RemoteStorage(url, timeout_s=5.0, connections=1).read("manifest.json")


def test_storage_opens_after_a_fork(server: tuple[str, Behaviour]) -> None:
    """Catches an event loop that lives in the parent alone: ranks may be forked."""
    url, _ = server
    _read_manifest(url)
    process = multiprocessing.get_context("fork").Process(target=_read_manifest, args=(url,))
    process.start()
    process.join(20)
    assert process.exitcode == 0
