"""The measurements of data/ measure what they say."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_data, bench_loader, bench_prepare, bench_stream
from benchmarks.bench_prepare import PrepareBench
from benchmarks.bench_stream import StreamBench
from benchmarks.data_suite import make_rows, table
from benchmarks.documents import generate_documents
from benchmarks.record import write_record
from data.fast_bpe import FastEncoder
from data.storage import RemoteStorage
from data.tokenizer import train_bpe


def test_rows_are_compared_with_the_first() -> None:
    """Catches a ratio that is upside down."""
    rows = make_rows("suite", [("base", 4e6, ""), ("case", 1e6, "slow")])
    assert [row.ratio for row in rows] == [1.0, 0.25]
    assert table(rows)[-1] == "| suite | case | 1.00 | 0.25 | slow |"


def test_a_start_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rate that start-up makes look slow: 2 s to start, 1 s for 10 tokens, half in children."""
    clock = [0.0, 0.0]
    monkeypatch.setattr(bench_prepare, "_cpu_s", lambda: tuple(clock))

    def work(own_s: float, children_s: float, tokens: int) -> Callable[[], int]:
        def run() -> int:
            clock[0] += own_s
            clock[1] += children_s
            return tokens

        return run

    case = bench_prepare._Case("case", short=work(2.25, 0.25, 5), long=work(4.0, 2.0, 40), processes=2)
    assert bench_prepare._turn(case, work(2.0, 0.0, 40)) == pytest.approx((0.5, 2.0, 0.05))


def test_documents_are_the_same_for_a_seed_and_look_like_text() -> None:
    """Catches documents that are easier to tokenize than text, one word or one line for ever."""
    first = list(generate_documents(200_000, seed=1))
    assert first == list(generate_documents(200_000, seed=1))
    assert first[0] != next(generate_documents(1, seed=2))
    assert len(set(first)) == len(first)
    tokenizer = train_bpe(first, 8192)
    tokens = sum(map(len, FastEncoder(tokenizer).encode_batch(first)))
    assert 3.0 < sum(map(len, first)) / tokens < 5.0
    words = " ".join(first).split()
    assert 1.1 < tokens / len(words) < 2.0
    assert len(set(words)) > len(words) / 10


def test_a_small_measurement_is_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a benchmark that does not run, and a case that is left out."""
    monkeypatch.setattr("benchmarks.data_suite.write_record", partial(write_record, root=tmp_path))
    monkeypatch.setattr(bench_prepare, "TRAINING_CHARACTERS", 200_000)
    monkeypatch.setattr(bench_prepare, "VOCAB_SIZE", 1000)
    small = PrepareBench(megabytes=0.5, repeats=1, layouts=("jsonl", "txt"), processes=1)
    monkeypatch.setitem(bench_data.SUITES, "prepare", lambda: bench_prepare.suite(small))
    assert bench_data.main(["--suites", "prepare", "--record"]) == 0
    (record,) = tmp_path.iterdir()
    body = json.loads((record / "record.json").read_text())
    cases = [row["case"] for row in body["results"]]
    assert cases[:4] == [bench_prepare.RAW, "jsonl", "txt", "jsonl, reference encoder"]
    assert cases[4:] == ["jsonl, 1 processes", "txt, 1 processes"]
    # The difference of two short runs is noise on a busy machine, even below 0.
    assert all(row["tokens_per_s"] for row in body["results"])
    assert body["config"]["prepare"]["megabytes"] == 0.5
    assert "| prepare | txt |" in capsys.readouterr().out


def test_the_stream_is_measured_from_every_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a case that reads nothing, a cache that stays cold, and a server that is left running."""
    monkeypatch.setattr(bench_loader, "CHUNK_TOKENS", 8 * bench_loader.SEQ_LEN)
    asked: list[str] = []
    sound = RemoteStorage.read_range

    def counting(storage: RemoteStorage, name: str, *place: Any) -> memoryview:
        asked.append(name)
        return sound(storage, name, *place)

    monkeypatch.setattr(RemoteStorage, "read_range", counting)
    found = bench_stream.measure(StreamBench(rows=8, lanes=4, repeats=2), tmp_path)
    cases = [row.case for row in found]
    assert cases == [bench_stream.MEMMAP, bench_stream.LOCAL, bench_stream.CACHED, bench_stream.HTTP]
    assert all(row.tokens_per_s > 0 for row in found)
    # Each of three passes over http asks for chunks, and only the first of those behind the cache.
    cached = len(list((tmp_path / "cache").glob("[0-9a-f]*")))
    assert len(asked) - cached == pytest.approx(3 * cached, abs=3)
    assert multiprocessing.active_children() == []
    assert bench_stream.main(["--repeats", "0"]) == 2
    assert "--repeats 0 must be at least 1" in capsys.readouterr().err


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback for a mistyped option."""
    assert bench_data.main(["--suites", "prepar"]) == 2
    assert "--suites prepar is unknown; there is prepare, stream" in capsys.readouterr().err
    assert bench_prepare.main(["--repeats", "0"]) == 2
    assert "--repeats 0 must be at least 1" in capsys.readouterr().err
