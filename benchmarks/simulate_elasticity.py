"""``python -m benchmarks.simulate_elasticity``: up to 1,024 ranks over OpenWebText, in one process.

A run goes through the training tokens of OpenWebText while its ranks, its rows per step and its microbatches
change at random. Nothing is read, but order, plan of reads and state are the loader's own: the shards are
empty files of the right length. Counted are the windows (each once per epoch, whatever changes), the chunks
that each node reads, and the bytes of the state that a run goes on from.

What may not change within an epoch are ``data.lanes`` and ``data.seed``: they are the order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.record import Transcript, command_line, write_record
from data.cli import run_cli
from data.config import DataConfig
from data.loader import TokenLoader
from data.manifest import (
    TAR_BLOCK,
    TOKENIZER_NAME,
    VERSION,
    Chunk,
    DataError,
    Manifest,
    Shard,
    Split,
    TokenizerInfo,
    write_manifest,
)
from data.order import WindowOrder
from data.source import open_source, windows_per_chunk

SEQ_LEN = 1024
CHUNK_TOKENS = 1 << 20
CHUNKS_PER_SHARD = 64
# OpenWebText by GPT-2's tokenizer and the authors' split; 9,040,017,095 tokens of 8,013,769 documents.
SPLITS = {"train": (8_009_762, 9_035_582_198), "val": (4_007, 4_434_897)}
RANKS_PER_NODE = 8
MAX_RANKS = 1024
MAX_STATE_BYTES = 10_000
BALANCE = 0.1


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a run between two changes."""

    ranks: int
    rows_per_step: int
    microbatch_size: int
    """Rows of one forward; the loader knows nothing of it."""
    steps: int


@dataclass(frozen=True, slots=True)
class SegmentReads:
    """What one segment reads."""

    segment: Segment
    per_node: np.ndarray
    """(nodes,) chunks per step, each rank's own reads together."""
    distinct: np.ndarray
    """(nodes,) chunks per step that a node reads through a cache which its ranks share."""

    @property
    def busiest(self) -> float:
        """Reads of the busiest node over the mean."""
        return float(self.per_node.max() / self.per_node.mean())


def balance(reads: Sequence[SegmentReads]) -> np.ndarray:
    """What each node read over a whole run, over its even share of the steps that it took part in, (nodes,).

    In one segment nodes differ by a chunk or two, as a border between two lanes falls inside a node or not.
    """
    own, even = np.zeros((2, max(len(item.per_node) for item in reads)))
    for item in reads:
        nodes = len(item.per_node)
        own[:nodes] += item.segment.steps * item.per_node
        even[:nodes] += item.segment.steps * item.per_node.mean()
    return own / even


def openwebtext_shards(folder: Path, scale: int = 1) -> Path:
    """Shards of OpenWebText's shape: a manifest as ``prepare`` makes it beside files of holes.

    Args:
        folder: an empty one.
        scale: leave out all but so manieth tokens.
    """
    (folder / TOKENIZER_NAME).write_text("{}")
    splits = {}
    for name, (documents, tokens) in SPLITS.items():
        tokens //= scale
        sizes = [min(CHUNK_TOKENS, tokens - 1 - start) + 1 for start in range(0, tokens - 1, CHUNK_TOKENS)]
        shards = [
            _shard(folder, f"{name}-{number:06d}.tar", sizes[first : first + CHUNKS_PER_SHARD])
            for number, first in enumerate(range(0, len(sizes), CHUNKS_PER_SHARD))
        ]
        splits[name] = Split(documents, tokens, tuple(shards))
    tokenizer = TokenizerInfo(hashlib.sha256(b"{}").hexdigest(), 50257, 50256)
    write_manifest(folder, Manifest(VERSION, "uint16", CHUNK_TOKENS, tokenizer, splits, {}))
    return folder


def _shard(folder: Path, name: str, sizes: Sequence[int]) -> Shard:
    chunks, end = [], 0
    for tokens in sizes:
        chunks.append(Chunk(end, tokens, 0))
        end += chunks[-1].member_bytes("uint16")
    with open(folder / name, "wb") as file:
        file.truncate(end + 2 * TAR_BLOCK)
    return Shard(name, end + 2 * TAR_BLOCK, "0" * 64, tuple(chunks))


def random_segments(num_rows: int, changes: int, seed: int) -> list[Segment]:
    """Cut a run of about ``num_rows`` rows into ``changes + 1`` segments at random."""
    generator = random.Random(seed)
    segments: list[Segment] = []
    for _ in range(changes + 1):
        nodes = generator.randint(MAX_RANKS // RANKS_PER_NODE // 4, MAX_RANKS // RANKS_PER_NODE)
        ranks = MAX_RANKS if not segments else nodes * RANKS_PER_NODE
        microbatch = generator.choice([1, 2, 4, 8])
        per_rank = microbatch * generator.choice([1, 2, 4])
        rows = ranks * per_rank
        steps = max(1, round(num_rows / (changes + 1) * generator.uniform(0.7, 1.3) / rows))
        segments.append(Segment(ranks, rows, microbatch, steps))
    return segments


class Simulation:
    """A run over shards that are not read.

    Args:
        folder: of :func:`openwebtext_shards`.
    """

    def __init__(self, folder: Path) -> None:
        self.config = DataConfig(dir=str(folder), seq_len=SEQ_LEN, prefetch_steps=0)
        counts = windows_per_chunk(open_source(self.config).manifest, "train", SEQ_LEN)
        self.order = WindowOrder(counts, seed=self.config.seed, lanes=self.config.lanes)
        self.first_window = np.concatenate([[0], np.cumsum(counts)])
        self.seen: dict[int, np.ndarray] = {}
        """(windows,) uint8 by epoch: how often each was trained on."""
        self.state = self._loader(Segment(1, 1, 1, 0), 0).state_dict()
        self.state_bytes = 0

    def run(self, segment: Segment) -> SegmentReads:
        """Go on from the state by one segment, as other ranks than before."""
        first_row = int(self.state["next_row"])
        table = np.stack(
            [
                self.order.rows_of_step(first_row + step * segment.rows_per_step, segment.rows_per_step)
                for step in range(segment.steps)
            ]
        )
        self._count_windows(table)
        reads = self._count_reads(segment, table)
        self._pass_state_on(segment, first_row + table.shape[0] * table.shape[1])
        return reads

    def _count_windows(self, table: np.ndarray) -> None:
        row, chunk, window = table.reshape(-1, 3).T
        place = self.first_window[chunk] + window
        epoch = row // self.order.num_windows
        for number in np.unique(epoch):
            seen = self.seen.setdefault(int(number), np.zeros(self.order.num_windows, dtype=np.uint8))
            np.add.at(seen, place[epoch == number], 1)

    def _count_reads(self, segment: Segment, table: np.ndarray) -> SegmentReads:
        """Vectorised :func:`data.stream.plan_reads` of all ranks."""
        chunk = table[:, :, 1]
        nodes = -(-segment.ranks // RANKS_PER_NODE)
        keep = self.order.keep_steps(segment.rows_per_step, segment.ranks)
        per_rank = segment.rows_per_step // segment.ranks
        rank = np.arange(segment.rows_per_step) // per_rank
        own = _reads(rank, chunk, keep) // RANKS_PER_NODE
        shared = _reads(rank // RANKS_PER_NODE, chunk, keep)
        counts = [np.bincount(readers, minlength=nodes) / segment.steps for readers in (own, shared)]
        return SegmentReads(segment, *counts)

    def _pass_state_on(self, segment: Segment, next_row: int) -> None:
        """Write the state as a checkpoint does, and read it with other ranks."""
        text = json.dumps({**self.state, "next_row": next_row})
        self.state_bytes = max(self.state_bytes, len(text))
        for rank in (0, segment.ranks - 1):
            loader = self._loader(segment, rank)
            loader.load_state_dict(json.loads(text))
            self.state = loader.state_dict()
            assert self.state["next_row"] == next_row

    def _loader(self, segment: Segment, rank: int) -> TokenLoader:
        return TokenLoader(
            self.config, rows_per_step=segment.rows_per_step, rank=rank, world_size=segment.ranks
        )


def _reads(reader: np.ndarray, chunk: np.ndarray, keep_steps: int) -> np.ndarray:
    """Who reads, once for each read of a chunk.

    Args:
        reader: (rows,) of each row of a step.
        chunk: (steps, rows) of each row.
        keep_steps: a chunk that was unused for longer is read again.
    """
    key = (reader[None, :] * (int(chunk.max()) + 1) + chunk).ravel()
    by_key = np.argsort(key, kind="stable")
    key, step = key[by_key], by_key // chunk.shape[1]
    again = np.ones(len(key), dtype=bool)
    again[1:] = (key[1:] != key[:-1]) | (np.diff(step) > keep_steps)
    return key[again] // (int(chunk.max()) + 1)


def simulate(
    folder: Path, *, epochs: float, changes: int, seed: int
) -> tuple[Simulation, list[SegmentReads]]:
    """Run over shards of :func:`openwebtext_shards`.

    Raises:
        DataError: a window that was not seen once in an epoch, or a state that is too large.
    """
    simulation = Simulation(folder)
    num_rows = int(epochs * simulation.order.num_windows)
    found = [simulation.run(segment) for segment in random_segments(num_rows, changes, seed)]
    *finished, last = sorted(simulation.seen)
    for epoch in finished:
        wrong = int((simulation.seen[epoch] != 1).sum())
        if wrong:
            raise DataError(f"{wrong} windows of epoch {epoch} were not seen exactly once")
    if simulation.seen[last].max() > 1:
        raise DataError(f"windows of epoch {last} were seen twice")
    if simulation.state_bytes >= MAX_STATE_BYTES:
        raise DataError(f"the state has {simulation.state_bytes} bytes, not below {MAX_STATE_BYTES}")
    return simulation, found


def table(reads: Sequence[SegmentReads]) -> str:
    """One line of Markdown per segment."""
    lines = [
        "| ranks | rows per step | microbatch | steps | chunks read per step and node "
        "| busiest node over the mean | with a node cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in reads:
        segment = item.segment
        lines.append(
            f"| {segment.ranks} | {segment.rows_per_step} "
            f"| {segment.microbatch_size} | {segment.steps} | {item.per_node.mean():.3f} "
            f"| {item.busiest:.2f} | {item.distinct.mean():.3f} |"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Simulate and print; returns 1 where nodes are out of balance."""
    for name in ("changes", "epochs", "scale"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="simulate-elasticity-") as name:
        shards = openwebtext_shards(Path(name), args.scale)
        simulation, reads = simulate(shards, epochs=args.epochs, changes=args.changes, seed=args.seed)
    transcript = Transcript()
    transcript.say(table(reads))
    nodes = balance(reads)
    num_rows = sum(item.segment.steps * item.segment.rows_per_step for item in reads)
    whole = sum(bool((seen == 1).all()) for seen in simulation.seen.values())
    order = simulation.order
    transcript.say(
        f"{num_rows:,} rows of {order.num_windows:,} windows in {len(order.windows_per_chunk):,} chunks: "
        f"each once in {whole} whole epochs over {args.changes} changes; "
        f"state {simulation.state_bytes} bytes; "
        f"nodes read {nodes.min():.3f} to {nodes.max():.3f} of their even share; "
        f"{time.monotonic() - started:.0f} s"
    )
    if args.record:
        path = write_record(
            "elasticity",
            command=command_line("benchmarks.simulate_elasticity", argv),
            config={"epochs": args.epochs, "changes": args.changes, "seed": args.seed, "scale": args.scale},
            results=[
                {"ranks": item.segment.ranks, "rows_per_step": item.segment.rows_per_step,
                 "steps": item.segment.steps, "chunks_per_step_and_node": float(item.per_node.mean()),
                 "busiest": item.busiest, "with_cache": float(item.distinct.mean())}
                for item in reads
            ],
            log=transcript.text,
        )  # fmt: skip
        print(f"record: {path}")
    return int(np.abs(nodes - 1).max() > BALANCE)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate_elasticity", description="Changing ranks over OpenWebText's shape"
    )
    parser.add_argument("--epochs", type=int, default=3, help="length of the run")
    parser.add_argument("--changes", type=int, default=20, help="changes of ranks, rows and microbatches")
    parser.add_argument(
        "--scale", type=int, default=1, help="take only this part of the corpus (10: a tenth)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write a record below benchmarks/records")
    return run_cli(partial(run, argv=argv), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
