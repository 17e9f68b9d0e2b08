"""The loader's benchmark compares equal work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bench_loader
from benchmarks.bench_loader import Bench, main, reading_with, write_random_labels, write_shards
from data.batch import Batch
from data.loader import TokenLoader


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_loader, "CHUNK_TOKENS", 8 * bench_loader.SEQ_LEN)


def test_both_ways_give_the_same_batches(tmp_path: Path) -> None:
    """Catches a baseline that reads less, or other windows."""
    manifest = write_shards(tmp_path / "shards", 20)
    labels = write_random_labels(tmp_path / "labels", manifest)
    bench = Bench(tmp_path / "shards", rows=16, lanes=4)
    for cache in (None, labels):
        found: list[list[Batch]] = []
        for read in bench.ways.values():
            with reading_with(read):
                loader = TokenLoader(bench.config, rows_per_step=16, rank=0, world_size=1, labels=cache)
                found.append([next(loader) for _ in range(30)])
                loader.close()
        for stream, memmap in zip(*found, strict=True):
            assert torch.equal(stream.tokens, memmap.tokens)
            assert (stream.targets is None) == (memmap.targets is None) == (cache is None)
            if stream.targets is not None and memmap.targets is not None:
                assert torch.equal(stream.targets, memmap.targets)


def test_the_command_prints_a_ratio_for_each_kind_of_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a table without numbers, and half a gigabyte that stays."""
    assert main(["--rows", "16", "--repeats", "1", "--dir", str(tmp_path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tokens")]
    assert len(rows) == 2
    assert all(float(row.split("|")[4]) > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []
    assert main(["--repeats", "0"]) == 2
