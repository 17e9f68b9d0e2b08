"""``python -m benchmarks.bench_stream``: the token stream from every kind of place against a memory map.

The same loader reads the same windows of the same shards in each case: from the folder, from a warm cache on
the node in front of a server, and from the server; the baseline slices a memory map at random places and
checks nothing. Passes take turns, so that what else the machine does hits all cases alike. What counts is the
CPU time of the reading process, all its threads together; the server is another process on loopback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import bench_loader
from benchmarks.bench_loader import PassTime, memmap_windows, time_pass, write_shards
from benchmarks.data_suite import Row, Suite, add_arguments, make_rows, run_suites
from benchmarks.range_server import serving
from benchmarks.record import command_line
from data.cli import run_cli
from data.config import DataConfig
from data.stream import Windows, read_windows

SUITE = "stream"
MEMMAP = "memmap, random access"
LOCAL, CACHED, HTTP = "local folder", "node cache before http", "http, byte ranges"


@dataclass(frozen=True, slots=True)
class StreamBench:
    """What is read."""

    rows: int = 64
    """Sequences of a step."""
    lanes: int = 16
    repeats: int = 9
    """Passes of each case."""


class _Way(NamedTuple):
    config: DataConfig
    read: Callable[..., Iterator[Windows]]


def measure(bench: StreamBench, folder: Path) -> list[Row]:
    """Write shards below an empty folder and read them in every way."""
    shards = folder / "shards"
    write_shards(shards, 3 * bench.lanes + 2)
    local = DataConfig(dir=str(shards), seq_len=bench_loader.SEQ_LEN, lanes=bench.lanes)
    with serving(shards) as url:
        places = {LOCAL: {}, CACHED: {"dir": url, "cache_dir": str(folder / "cache")}, HTTP: {"dir": url}}
        ways = {MEMMAP: _Way(local, partial(memmap_windows, shards))}
        ways |= {name: _Way(_replace(local, changes), read_windows) for name, changes in places.items()}
        times = _in_turns(ways, bench)
    steps = _steps(bench)
    tokens = steps * bench.rows * bench_loader.SEQ_LEN
    return make_rows(
        SUITE,
        [
            (name, tokens / median(time.cpu_s for time in passes), _note(tokens, passes))
            for name, passes in times.items()
        ],
    )


def _replace(config: DataConfig, changes: Mapping[str, str]) -> DataConfig:
    return DataConfig(**{**asdict(config), **changes})


def _steps(bench: StreamBench) -> int:
    """Steps that read as many tokens as one chunk per lane has."""
    return max(1, bench.lanes * (bench_loader.CHUNK_TOKENS // bench_loader.SEQ_LEN) // bench.rows)


def _in_turns(ways: Mapping[str, _Way], bench: StreamBench) -> dict[str, list[PassTime]]:
    steps = _steps(bench)
    found: dict[str, list[PassTime]] = {name: [] for name in ways}
    for turn in range(bench.repeats + 1):
        for name, way in ways.items():
            time = time_pass(way.config, way.read, rows=bench.rows, steps=steps)
            if turn:  # the first one fills the cache and the page cache
                found[name].append(time)
    return found


def _note(tokens: int, passes: Sequence[PassTime]) -> str:
    return f"{tokens / median(time.wall_s for time in passes) / 1e6:.0f} Mtokens/s by the clock"


def suite(bench: StreamBench | None = None) -> Suite:
    """Return this measurement, for ``benchmarks.bench_data``."""
    bench = bench or StreamBench()
    sizes: dict[str, Any] = {"seq_len": bench_loader.SEQ_LEN, "chunk_tokens": bench_loader.CHUNK_TOKENS}
    return Suite(SUITE, {**asdict(bench), **sizes}, partial(measure, bench))


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Measure, print the table and write the record if that is wanted; returns 0."""
    for name in ("rows", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    bench = StreamBench(rows=args.rows, repeats=args.repeats)
    return run_suites(SUITE, [suite(bench)], args, command_line("benchmarks.bench_stream", argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_stream", description="The token stream against a memory map"
    )
    parser.add_argument("--rows", type=int, default=64, help="sequences of a step")
    parser.add_argument("--repeats", type=int, default=9, help="passes of each case")
    add_arguments(parser)
    return run_cli(partial(run, argv=argv), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
