"""``python -m benchmarks.bench_prepare [--megabytes 24] [--tokenizer DIR] [--record]``: text to shards.

CPU time of whole preparations (reading, tokenizing, writing) against the tokenizer alone, on generated
documents. A rate is the slope between a short and a long corpus, so that the second that a start takes does
not count. The tokenizer is measured again beside each preparation, so that drift of the machine falls on
both; a case's rate is its median share of the tokenizer's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.data_suite import Row, Suite, add_arguments, make_rows, run_suites
from benchmarks.documents import generate_documents
from benchmarks.layouts import write_corpus
from benchmarks.record import command_line
from data.cli import run_cli
from data.fast_bpe import FastEncoder
from data.manifest import Manifest
from data.prepare import PrepareOptions, prepare
from data.tokenizer import Tokenizer, load_tokenizer, train_bpe, use_one_thread

SUITE = "prepare"
VOCAB_SIZE = 50257
TRAINING_CHARACTERS = 30_000_000
SHORT = 8
"""The short corpus is the long one divided by this."""
RAW = "the fast encoder alone"


@dataclass(frozen=True, slots=True)
class PrepareBench:
    """What is measured."""

    megabytes: float = 24.0
    """Text of the long corpus."""
    repeats: int = 3
    tokenizer: Path | None = None
    """``None`` trains one of GPT-2's size on generated documents."""
    layouts: tuple[str, ...] = ("arrow", "parquet", "subsets", "jsonl", "jsonl.gz", "jsonl.zst", "txt")
    """The others are read by the same code."""
    processes: int = 2
    """Of the last cases."""

    def __post_init__(self) -> None:
        if not self.megabytes > 0.0:
            raise ValueError(f"--megabytes {self.megabytes} must be above 0")
        for name in ("repeats", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")


def measure(bench: PrepareBench, folder: Path) -> list[Row]:
    """Measure below an existing folder; the first row is the tokenizer alone."""
    use_one_thread()
    tokenizer = _tokenizer(bench, folder)
    texts = list(generate_documents(int(bench.megabytes * 1e6), seed=1))
    halves = texts[: max(1, len(texts) // SHORT)], texts
    fast = FastEncoder(tokenizer)
    raw = [_cost(partial(_encode, fast, texts)) for _ in range(bench.repeats)]
    rates = [(RAW, median(cost.tokens / cost.all_s for cost in raw), "")]
    for case in _cases(bench, folder, halves):
        turns = [_turn(case, partial(_encode, fast, texts)) for _ in range(bench.repeats)]
        ratio, start_s, own_s = (median(values) for values in zip(*turns, strict=True))
        note = f"{max(start_s, 0.0):.1f} s to start"
        if case.processes > 1:
            note += f", {max(own_s, 0.0) * 1e9:.0f} ns per token in the process that reads for all"
        rates.append((case.name, rates[0][1] * ratio, note))
    return make_rows(SUITE, rates)


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    short: Callable[[], int]
    """Prepares the short corpus and returns its number of tokens."""
    long: Callable[[], int]
    processes: int = 1


class _Cost(NamedTuple):
    all_s: float
    """CPU time, finished children included."""
    own_s: float
    """CPU time of this process."""
    tokens: int


def _turn(case: _Case, baseline: Callable[[], int]) -> tuple[float, float, float]:
    """Return the rate as a share of the baseline's beside it, seconds of a start, and own ones per token."""
    base, short, long = _cost(baseline), _cost(case.short), _cost(case.long)
    tokens = long.tokens - short.tokens
    per_token_s = (long.all_s - short.all_s) / tokens
    start_s = short.all_s - per_token_s * short.tokens
    return base.all_s / base.tokens / per_token_s, start_s, (long.own_s - short.own_s) / tokens


def _cost(work: Callable[[], int]) -> _Cost:
    own_s, children_s = _cpu_s()
    tokens = work()
    own_end_s, children_end_s = _cpu_s()
    own_s = own_end_s - own_s
    return _Cost(own_s + children_end_s - children_s, own_s, tokens)


def _encode(encoder: FastEncoder, texts: list[str]) -> int:
    return sum(map(len, encoder.encode_batch(texts)))


def _tokenizer(bench: PrepareBench, folder: Path) -> Tokenizer:
    if bench.tokenizer:
        tokenizer = load_tokenizer(bench.tokenizer)
    else:
        tokenizer = train_bpe(generate_documents(TRAINING_CHARACTERS), VOCAB_SIZE)
    (folder / "tokenizer.json").write_bytes(tokenizer.json_bytes)
    return tokenizer


def _cases(bench: PrepareBench, folder: Path, halves: tuple[list[str], list[str]]) -> Iterator[_Case]:
    corpora = folder / "short", folder / "long"
    for corpus, texts in zip(corpora, halves, strict=True):
        corpus.mkdir()
        for layout in bench.layouts:
            write_corpus(corpus, layout, texts)

    def case(name: str, layout: str, processes: int = 1, encoder: str = "fast") -> _Case:
        run = partial(_prepare, folder, processes=processes, encoder=encoder)
        short, long = (partial(run, corpus / layout) for corpus in corpora)
        return _Case(name, short, long, processes)

    for layout in bench.layouts:
        yield case(layout, layout)
    yield case(f"{bench.layouts[0]}, reference encoder", bench.layouts[0], encoder="reference")
    for layout in bench.layouts:
        yield case(f"{layout}, {bench.processes} processes", layout, bench.processes)


def _prepare(folder: Path, corpus: Path, *, encoder: str = "fast", processes: int = 1) -> int:
    """Prepare a corpus from nothing and return its number of tokens."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    options = PrepareOptions(
        input=corpus,
        out=out,
        tokenizer=folder / "tokenizer.json",
        split="huggingface",
        encoder=encoder,
        processes=processes,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        manifest: Manifest = prepare(options)
    return sum(split.tokens for split in manifest.splits.values())


def _cpu_s() -> tuple[float, float]:
    """Return the CPU time of this process and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time(), children.ru_utime + children.ru_stime


def suite(bench: PrepareBench | None = None) -> Suite:
    """Return this measurement, for ``benchmarks.bench_data``."""
    bench = bench or PrepareBench()
    tokenizer = "given" if bench.tokenizer else f"bpe:{VOCAB_SIZE}"
    return Suite(SUITE, {**asdict(bench), "tokenizer": tokenizer}, partial(measure, bench))


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Measure, print the table and write the record if that is wanted; returns 0."""
    bench = PrepareBench(megabytes=args.megabytes, repeats=args.repeats, tokenizer=args.tokenizer)
    return run_suites(SUITE, [suite(bench)], args, command_line("benchmarks.bench_prepare", argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_prepare", description="Measure what preparing a corpus costs"
    )
    parser.add_argument("--megabytes", type=float, default=24.0, help="text of the long corpus")
    parser.add_argument("--repeats", type=int, default=3, help="preparations of each case")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, or folder with GPT-2's files")
    add_arguments(parser)
    return run_cli(partial(run, argv=argv), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
