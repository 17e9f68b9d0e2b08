"""``python -m benchmarks.bench_loader``: the token stream against a memory map in the same loader.

The memory map is the plain alternative: ``numpy.memmap`` over the same bytes, one slice per row, no check of
what is read. Order, batches and the prefetching thread are the loader's in both, so the difference is the
stream's alone. Files are in the page cache; what counts is CPU time, all threads of the process together.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import data.loader
from benchmarks.record import Transcript, command_line, write_record
from data.cli import run_cli
from data.config import DataConfig
from data.label_cache import LabelCache, LabelSettings, chunk_name, read_labels
from data.label_writer import LabelWriter
from data.loader import TokenLoader
from data.manifest import (
    TAR_BLOCK,
    TOKENIZER_NAME,
    VERSION,
    Manifest,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from data.shards import ShardLayout, SplitWriter
from data.source import windows_per_chunk
from data.storage import Storage
from data.stream import Step, Windows, read_windows

TARGET = 0.9
"""Rows per CPU second that the stream is meant to reach, as a share of the memory map's."""
SEQ_LEN = 1024
CHUNK_TOKENS = 1 << 20
NUM_TARGETS = 4
LANES = 16
VOCAB_SIZE = 50257
NUM_CONCEPTS = 32768


@dataclass(frozen=True, slots=True)
class LoaderTimes:
    """CPU seconds of equal passes over the same windows."""

    stream: tuple[float, ...]
    memmap: tuple[float, ...]
    tokens: int
    """Of one pass."""

    @property
    def ratio(self) -> float:
        """Median over pairs of neighbouring passes: rows per CPU second, stream over memory map."""
        return median(plain / own for own, plain in zip(self.stream, self.memmap, strict=True))


def write_shards(folder: Path, num_chunks: int) -> Manifest:
    """A shard folder of random tokens, ``num_chunks`` for training and one for validation."""
    folder.mkdir(parents=True)
    (folder / TOKENIZER_NAME).write_text("{}")
    generator = np.random.default_rng(0)
    splits = {}
    for name, count in (("train", num_chunks), ("val", 1)):
        writer = SplitWriter(folder, name, ShardLayout("uint16", CHUNK_TOKENS, 64))
        for _ in range(count):
            writer.append(generator.integers(0, VOCAB_SIZE, CHUNK_TOKENS, dtype=np.uint16), documents=1)
        splits[name] = writer.finish()
    tokenizer = TokenizerInfo(hashlib.sha256(b"{}").hexdigest(), VOCAB_SIZE, VOCAB_SIZE - 1)
    write_manifest(folder, Manifest(VERSION, "uint16", CHUNK_TOKENS, tokenizer, splits, {}))
    return read_manifest(folder)


def write_random_labels(folder: Path, manifest: Manifest) -> LabelCache:
    """Labels of random ids."""
    settings = LabelSettings(
        data=manifest.sha256,
        targets="attribution",
        teacher=None,
        sae=None,
        seq_len=SEQ_LEN,
        num_targets=NUM_TARGETS,
        num_concepts=NUM_CONCEPTS,
        sae_layer=5,
        attribution="signed",
        mask_non_positive=True,
        mask_documents=False,
        precision="bf16",
        arithmetic=1,
        rows_per_pass=None,
    )
    windows = {split: windows_per_chunk(manifest, split, SEQ_LEN) for split in manifest.splits}
    writer = LabelWriter(folder, settings, windows)
    generator = np.random.default_rng(1)
    for split, number in writer.claims():
        shape = (windows[split][number], SEQ_LEN, NUM_TARGETS)
        writer.write(split, number, generator.integers(0, NUM_CONCEPTS, shape, dtype=np.uint16))
    assert writer.finish()
    writer.close()
    return read_labels(folder)


def memmap_windows(
    folder: Path,
    storage: Storage,
    manifest: Manifest,
    split: str,
    seq_len: int,
    steps: Iterable[Step],
    keep_steps: int,
    labels: LabelCache | None = None,
    on_damage: str = "raise",
) -> Iterator[Windows]:
    """What :func:`data.stream.read_windows` yields, by slices of memory maps."""
    shards = {
        shard.name: np.memmap(folder / shard.name, dtype="<u2", mode="r")
        for shard in manifest.splits[split].shards
    }
    chunks = [
        (shards[shard.name], (chunk.offset + TAR_BLOCK) // 2)
        for shard, chunk in manifest.splits[split].chunks
    ]
    targets = [] if labels is None else _label_maps(labels, split)
    for step in steps:
        tokens = np.empty((len(step), seq_len + 1), dtype=np.uint16)
        ids = np.empty((len(step), seq_len, NUM_TARGETS), dtype=np.uint16) if targets else None
        for row, (_, chunk, window) in enumerate(step.tolist()):
            values, first = chunks[chunk]
            start = first + window * seq_len
            tokens[row] = values[start : start + seq_len + 1]
            if ids is not None:
                ids[row] = targets[chunk][window]
        yield Windows(tokens, ids)


def _label_maps(labels: LabelCache, split: str) -> list[np.ndarray]:
    return [
        np.memmap(
            f"{labels.place}/{chunk_name(split, number, chunk.digest)}",
            dtype="<u2",
            mode="r",
            shape=(chunk.windows, SEQ_LEN, NUM_TARGETS),
        )
        for number, chunk in enumerate(labels.splits[split])
    ]


@contextmanager
def reading_with(read: Any) -> Iterator[None]:
    """Put another function in place of :func:`data.stream.read_windows`, inside the loader."""
    data.loader.read_windows = read
    try:
        yield
    finally:
        data.loader.read_windows = read_windows


class PassTime(NamedTuple):
    """What one pass took."""

    cpu_s: float
    """Of all threads of this process."""
    wall_s: float


def time_pass(
    config: DataConfig, read: Any, *, rows: int, steps: int, labels: LabelCache | None = None
) -> PassTime:
    """Time ``steps`` steps of a new loader, behind as many that are not timed."""
    with reading_with(read):
        loader = TokenLoader(config, rows_per_step=rows, rank=0, world_size=1, labels=labels)
        try:
            _take(loader, steps)
            cpu, wall = time.process_time(), time.perf_counter()
            _take(loader, steps)
            return PassTime(time.process_time() - cpu, time.perf_counter() - wall)
        finally:
            loader.close()


def _take(loader: TokenLoader, steps: int) -> None:
    for _ in range(steps):
        next(loader)


class Bench:
    """Passes of both kinds over one folder of shards."""

    def __init__(self, folder: Path, rows: int, lanes: int = LANES) -> None:
        self.config = DataConfig(dir=str(folder), seq_len=SEQ_LEN, lanes=lanes)
        self.rows, self.lanes = rows, lanes
        self.ways = {"stream": read_windows, "memmap": partial(memmap_windows, folder)}

    def measure(self, repeats: int, labels: LabelCache | None = None) -> LoaderTimes:
        """Passes in turns; each warms up for a chunk per lane and is measured for another."""
        steps = self.lanes * (CHUNK_TOKENS // SEQ_LEN) // self.rows
        found: dict[str, list[float]] = {way: [] for way in self.ways}
        for _ in range(repeats):
            for way, read in self.ways.items():
                time = time_pass(self.config, read, rows=self.rows, steps=steps, labels=labels)
                found[way].append(time.cpu_s)
        tokens = steps * self.rows * SEQ_LEN
        return LoaderTimes(tuple(found["stream"]), tuple(found["memmap"]), tokens)


def measure_loader(
    *, with_labels: bool = False, rows: int = 64, repeats: int = 9, folder: Path | None = None
) -> tuple[float, dict[str, Any]]:
    """Measure on this machine.

    Args:
        with_labels: read stored targets too.
        rows: sequences per step.
        repeats: passes of each kind.
        folder: where half a gigabyte is written for the time being; a temporary folder by default.

    Returns:
        Rows per CPU second as a share of the memory map's, and what was measured.
    """
    with tempfile.TemporaryDirectory(prefix="bench-loader-", dir=folder) as name:
        shards = Path(name) / "shards"
        manifest = write_shards(shards, 3 * LANES + 2)
        labels = write_random_labels(Path(name) / "labels", manifest) if with_labels else None
        times = Bench(shards, rows).measure(repeats, labels)
    speed = {
        way: times.tokens / median(seconds) / 1e6
        for way, seconds in (("stream", times.stream), ("memmap", times.memmap))
    }
    return times.ratio, {
        "mtokens_per_cpu_second": speed,
        "labels": with_labels,
        "rows": rows,
        "lanes": LANES,
        "seq_len": SEQ_LEN,
        "chunk_tokens": CHUNK_TOKENS,
        "cpu_seconds": asdict(times),
    }


def bench(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Measure, print the table and write the record if that is wanted; returns 0."""
    for name in ("rows", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    transcript = Transcript()
    transcript.say(
        "| batches of | stream, Mtokens per CPU second | memmap | stream / memmap | target |\n"
        "|---|---|---|---|---|"
    )
    results = []
    for with_labels, what in ((False, "tokens"), (True, "tokens and targets")):
        ratio, details = measure_loader(
            with_labels=with_labels, rows=args.rows, repeats=args.repeats, folder=args.dir
        )
        speed = details["mtokens_per_cpu_second"]
        transcript.say(f"| {what} | {speed['stream']:.0f} | {speed['memmap']:.0f} | {ratio:.2f} | {TARGET} |")
        results.append({"batches": what, "ratio": ratio, **details})
    if args.record:
        path = write_record(
            "loader",
            command=command_line("benchmarks.bench_loader", argv),
            config={"rows": args.rows, "repeats": args.repeats},
            results=results,
            log=transcript.text,
        )
        print(f"record: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_loader", description="The token stream against a memory map"
    )
    parser.add_argument("--rows", type=int, default=64, help="sequences of a step")
    parser.add_argument("--repeats", type=int, default=9, help="passes of each kind")
    parser.add_argument("--dir", type=Path, help="where to write shards; a temporary folder by default")
    parser.add_argument("--record", action="store_true", help="write a record below benchmarks/records")
    return run_cli(partial(bench, argv=argv), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
