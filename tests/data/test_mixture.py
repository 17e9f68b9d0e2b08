"""Mixtures: exact shares, each window once per epoch of its source, one order for any number of ranks."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig
from data.limits import planned_use, trained_ranges
from data.loader import TokenLoader
from data.manifest import DataError, read_manifest
from data.mixture import MixtureOrder, Schedule, apportion, open_order, open_schedule, spread
from data.order import WindowOrder
from data.prepare import PrepareOptions, prepare
from data.source import open_source
from tests.data.conftest import make_texts, write_jsonl
from tests.data.http_server import serving
from tests.data.test_loader import close, corpus_windows, make, rows_of, step, take_many

SEQ_LEN = 32


def write_source(root: Path, name: str, like: Path, documents: int, **changes: object) -> Path:
    """Shards of other texts, by the tokenizer of ``like``; ``chunk_tokens`` differs too."""
    texts = [f"{name} {text}" for text in make_texts(documents, seed=len(name))]
    write_jsonl(root / f"{name}.jsonl", texts)
    options = PrepareOptions(
        input=root / f"{name}.jsonl", out=root / name, tokenizer=like / "tokenizer.json", val_fraction=0.1,
        chunk_tokens=512, chunks_per_shard=3,
    )  # fmt: skip
    prepare(dataclasses.replace(options, **changes))  # type: ignore[arg-type]
    return root / name


@pytest.fixture(scope="module")
def folders(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixture")
    return {
        "small": shard_folder,
        "code": write_source(root, "code", shard_folder, 24),
        "books": write_source(root, "books", shard_folder, 150),
    }


def mixed(folders: dict[str, Path], weights: Sequence[float] = (5, 2, 3), **changes: object) -> DataConfig:
    sources = tuple(
        SourceConfig(name=name, dir=str(folder), weight=weight)
        for (name, folder), weight in zip(folders.items(), weights, strict=True)
    )
    config = DataConfig(sources=sources, seq_len=SEQ_LEN, lanes=8, mixture_period=10)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def limited(config: DataConfig, name: str, **limits: float) -> DataConfig:
    return dataclasses.replace(
        config,
        sources=tuple(
            dataclasses.replace(source, **limits) if source.name == name else source  # type: ignore[arg-type]
            for source in config.sources
        ),
    )


@pytest.mark.parametrize(
    ("weights", "total", "counts"),
    [
        ((3, 1), 1000, [750, 250]),
        ((0.7, 0.2, 0.1), 1000, [700, 200, 100]),
        ((1, 1, 1), 1000, [334, 333, 333]),
        ((1, 1, 1), 2, [1, 1, 0]),
        ((2.5,), 7, [7]),
        ((998.4, 0.8, 0.8), 1000, [998, 1, 1]),
    ],
)
def test_apportionment_by_largest_remainder(weights: list[float], total: int, counts: list[int]) -> None:
    """Catches rows lost to rounding (0.7 * 1000 is 699.99...), and shares that do not add up."""
    assert apportion(weights, total) == counts


@pytest.mark.parametrize(
    "counts", [[1], [7, 2, 1], [500, 499, 1], [3, 3, 3, 1], [64] * 5, [997, 1, 1, 1], [1, 1, 30, 2, 66]]
)
def test_every_prefix_of_a_period_has_its_share(counts: list[int]) -> None:
    """Catches sources in blocks: after r rows each has r * n / P rows, rounded up or down."""
    period, share = sum(counts), np.asarray(counts)
    order = spread(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    found = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    ideal = np.arange(1, period + 1)[:, None] * share
    assert np.all(found * period > ideal - period)
    assert np.all(found * period < ideal + period)


def test_golden_schedule() -> None:
    """Catches any change of the schedule: runs that resume after an upgrade would read other data."""
    assert spread([5, 2, 3]).tolist() == GOLDEN_SPREAD
    schedule = Schedule([5, 2, 3])
    source, row = schedule.locate(np.arange(20, 30))
    assert source.tolist() == GOLDEN_SPREAD
    assert row.tolist() == [10 + GOLDEN_SPREAD[:n].count(0) if s == 0 else
                            (4 if s == 1 else 6) + GOLDEN_SPREAD[:n].count(s)
                            for n, s in enumerate(GOLDEN_SPREAD)]  # fmt: skip


GOLDEN_SPREAD = [0, 2, 0, 1, 0, 2, 0, 1, 0, 2]


def test_counts_of_any_range_are_those_of_the_rows() -> None:
    """Catches counts that are right at the ends of periods only."""
    schedule = Schedule([5, 2, 3])
    source, own = schedule.locate(np.arange(100))
    for row in range(101):
        assert schedule.rows_before(row).tolist() == np.bincount(source[:row], minlength=3).tolist()
    for number in range(3):  # the rows of a source are numbered without a gap
        assert own[source == number].tolist() == list(range(np.sum(source == number)))
    assert schedule.rows_in([(3, 9), (50, 71)]).tolist() == [
        int(np.sum(source[3:9] == number) + np.sum(source[50:71] == number)) for number in range(3)
    ]
    where = np.flatnonzero(source == 1)
    assert schedule.longest_wait(1, 3) == int((where[3:] - where[:-3]).max())


def test_each_window_once_per_epoch_of_its_source_over_changing_ranks() -> None:
    """Catches a source that repeats or skips windows when steps, ranks and epochs do not line up."""
    sizes = ([9, 0, 4], [30], [6, 5, 5, 1])
    orders = [WindowOrder(size, seed=number, lanes=3) for number, size in enumerate(sizes)]
    order = MixtureOrder(orders, Schedule([5, 2, 3]))
    seen: list[list[tuple[int, int]]] = [[], [], []]
    chunk_of = [(number, chunk) for number, size in enumerate(sizes) for chunk in range(len(size))]
    row = 0
    for world_size, rows_per_step, steps in ((4, 12, 7), (2, 8, 9), (3, 3, 31), (1, 7, 29)):
        for _ in range(steps):
            parts = [order.rows_of_rank(row, rows_per_step, rank, world_size) for rank in range(world_size)]
            found = np.concatenate(parts)
            assert sorted(found[:, 0].tolist()) == list(range(row, row + rows_per_step))
            for _, chunk, window in sorted(found.tolist()):
                number, own_chunk = chunk_of[chunk]
                seen[number].append((own_chunk, window))
            row += rows_per_step
    assert row == 452
    assert [len(windows) for windows in seen] == order.schedule.rows_before(row).tolist()
    for windows, size in zip(seen, sizes, strict=True):
        everything = [(chunk, window) for chunk, count in enumerate(size) for window in range(count)]
        epochs = [windows[at : at + len(everything)] for at in range(0, len(windows), len(everything))]
        assert len(epochs) >= 3
        assert all(sorted(epoch) == everything for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1]


def test_a_rank_reads_few_chunks_and_lanes_are_shared() -> None:
    """Catches memory that grows with the number of sources, and ranks that all read all chunks."""
    orders = [WindowOrder([1024] * 40, seed=number, lanes=lanes) for number, lanes in enumerate((32, 16, 16))]
    order = MixtureOrder(orders, Schedule([500, 250, 250]))
    assert order.keep_steps(4, 1) <= 1 + 17
    assert order.keep_steps(512, 1) == 2
    touched = [set(order.rows_of_rank(0, 512, rank, 8)[:, 1].tolist()) for rank in range(8)]
    assert max(map(len, touched)) <= 8 + 2
    assert len(set.union(*touched)) == 64


def test_lanes_are_shared_by_rows(folders: dict[str, Path]) -> None:
    """Catches a source without a lane, and one whose neighbours in a step all come from one place."""
    config = mixed(folders, lanes=10)
    manifests = [open_source(part).manifest for part in config.by_source.values()]
    for lanes, shared in ((10, [5, 2, 3]), (1, [1, 1, 1])):
        order = open_order(dataclasses.replace(config, lanes=lanes), manifests, open_schedule(config))
        assert isinstance(order, MixtureOrder)
        assert [own.lanes for own in order.orders] == shared


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_batches_hold_the_sources_in_proportion(folders: dict[str, Path], prefetch_steps: int) -> None:
    """Catches windows of the wrong source or chunk: 300 rows of three folders, with a change of ranks."""
    config = mixed(folders, prefetch_steps=prefetch_steps)
    wanted = {
        name: corpus_windows(folder, read_manifest(folder), "train") for name, folder in folders.items()
    }
    assert all(len(set(windows)) == len(windows) for windows in wanted.values())
    of = {window: name for name, windows in wanted.items() for window in windows}
    assert len(of) == sum(map(len, wanted.values()))
    seen: dict[str, list[bytes]] = {name: [] for name in folders}
    state = None
    for world_size, rows, steps in ((2, 20, 4), (3, 30, 5), (1, 7, 10)):
        loaders = make(config, rows, world_size)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            found = step(loaders)
            counts = {name: sum(of[window] == name for window in found) for name in folders}
            if rows % 10 == 0:
                assert counts == {"small": rows // 2, "code": rows // 5, "books": 3 * rows // 10}
            for window in found:
                seen[of[window]].append(window)
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
        use = loaders[0].use
        assert [source.tokens for source in use] == [SEQ_LEN * len(seen[name]) for name in folders]
        assert [source.epochs for source in use] == [len(seen[name]) / len(wanted[name]) for name in folders]
        close(loaders)
    assert sum(map(len, seen.values())) == 300
    assert len(seen["code"]) > len(wanted["code"])  # into another epoch
    for name in folders:
        times = Counter(seen[name])
        assert {times[window] for window in wanted[name]} <= {
            n := len(seen[name]) // len(wanted[name]),
            n + 1,
        }
    assert state is not None
    assert len(json.dumps(state)) < 1000


@pytest.mark.parametrize(("rows", "world_size"), [(8, 1), (40, 1), (40, 4), (12, 3)])
def test_a_rank_reads_no_chunk_anew(rows: int, world_size: int) -> None:
    """Catches chunks that are forgotten between two of their rows, also of a source with few rows."""
    orders = [WindowOrder([64] * 30, seed=number, lanes=lanes) for number, lanes in enumerate((12, 3, 1))]
    order = MixtureOrder(orders, Schedule([75, 20, 5]))
    keep = order.keep_steps(rows, world_size)
    anew = 0
    seen: set[int] = set()
    for rank in range(world_size):
        used: dict[int, int] = {}
        for now in range(2400 // rows):
            chunks = set(order.rows_of_rank(now * rows, rows, rank, world_size)[:, 1].tolist())
            anew += sum(chunk in used and now - used[chunk] > keep for chunk in chunks)
            used |= dict.fromkeys(chunks, now)
        seen |= set(used)
    assert len(seen) > 35
    assert anew <= 16  # a chunk on the border of two lanes: at an end and at a start


def test_one_source_is_the_plain_folder(folders: dict[str, Path]) -> None:
    """Catches a mixture of one that is another order, or another state, than ``data.dir``."""
    plain = DataConfig(dir=str(folders["code"]), seq_len=SEQ_LEN, lanes=8, seed=3)
    one = dataclasses.replace(
        plain, dir="", sources=(SourceConfig(name="x", dir=str(folders["code"]), weight=0.3),)
    )
    (ours,), (theirs,) = make(one, 6, 1), make(plain, 6, 1)
    for _ in range(30):
        assert rows_of(next(ours)) == rows_of(next(theirs))
    assert ours.state_dict() == theirs.state_dict()
    old = {key: value for key, value in theirs.state_dict().items() if key != "rows_by_source"}
    ours.load_state_dict(old)
    assert [source.tokens for source in ours.use] == [180 * SEQ_LEN]
    close([ours, theirs])


def test_another_mixture_is_refused(folders: dict[str, Path]) -> None:
    """Catches a resume with other weights, another period or other sources."""
    (loader,) = make(mixed(folders), 10, 1)
    state = loader.state_dict()
    two = dict(list(folders.items())[:2])
    for other, message in (
        (mixed(folders, (4, 3, 3)), "rows_per_period of small was 5, is 4"),
        (mixed(folders, mixture_period=20), "rows_per_period of small was 5, is 10"),
        (mixed(two, (1, 1)), r"sources was \['small', 'code', 'books'\], is \['small', 'code'\]"),
        (mixed({**folders, "code": folders["books"], "books": folders["code"]}), "manifest_sha256 of code"),
    ):
        (changed,) = make(other, 10, 1)
        with pytest.raises(DataError, match=message):
            changed.load_state_dict(state)


def test_sources_that_cannot_be_mixed_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches ids of two tokenizers in one batch."""
    write_jsonl(tmp_path / "other.jsonl", make_texts(80, seed=5))
    prepare(
        PrepareOptions(
            input=tmp_path / "other.jsonl", out=tmp_path / "other", vocab_size=300, val_fraction=0.1,
            chunk_tokens=256,
        )
    )  # fmt: skip
    wide = write_source(tmp_path, "wide", folders["small"], 40, dtype="uint32")
    for folder, message in (
        (tmp_path / "other", "small and odd cannot be mixed: tokenizer [0-9a-f]{12} and [0-9a-f]{12}"),
        (wide, "small and odd cannot be mixed: dtype uint16 and uint32"),
    ):
        with pytest.raises(DataError, match=message):
            make(mixed({"small": folders["small"], "odd": folder}, (1, 1)), 4, 1)
    with pytest.raises(
        ValueError, match=r"weight=0\.001 of code must give it a row of the data\.mixture_period=10"
    ):
        make(mixed(folders, (1, 0.001, 1)), 4, 1)
    with pytest.raises(DataError, match=r"data\.seq_len=512 does not divide chunk_tokens=256 of .*small"):
        make(mixed(folders, seq_len=512), 4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "dir='' must name a shard folder, or data.sources several"),
        ({"dir": "x"}, "dir=x must be empty with data.sources"),
        ({"mixture_period": 0}, r"mixture_period=0 must lie in 1 \.\. 100000"),
    ],
)
def test_config_refusals(folders: dict[str, Path], changes: dict[str, object], message: str) -> None:
    """Catches a section from which nobody can tell what is read."""
    with pytest.raises(ValueError, match=message):
        mixed(folders, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name='a/b' must be letters"),
        ({"dir": ""}, "dir='' must name a shard folder"),
        ({"dir": "s3://key@bucket/x"}, "URL without credentials"),
        ({"weight": 0}, "weight=0 must be above 0"),
        ({"max_epochs": -1}, "max_epochs=-1 must be at least 0"),
        ({"max_tokens": -1}, "max_tokens=-1 must be at least 0"),
    ],
)
def test_source_refusals(changes: dict[str, object], message: str) -> None:
    """Catches a source that cannot be read or reported."""
    with pytest.raises(ValueError, match=message):
        SourceConfig(**{"name": "a", "dir": "d", "weight": 1.0, **changes})  # type: ignore[arg-type]


def test_sources_given_twice_are_refused() -> None:
    """Catches two curves under one name, and windows that are read twice an epoch."""
    a, b = (SourceConfig(name=name, dir=name, weight=1) for name in "ab")
    for other, twice in (
        (dataclasses.replace(b, name="a"), "name=a"),
        (dataclasses.replace(b, dir="a"), "dir=a"),
    ):
        with pytest.raises(ValueError, match=f"sources must differ: {twice} is given twice"):
            DataConfig(sources=(a, other), seq_len=SEQ_LEN)


def test_damage_and_a_server_name_the_source(folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches a message that does not say which folder is damaged, and a URL that only works alone."""
    copy = tmp_path / "code"
    shutil.copytree(folders["code"], copy)
    with serving(copy) as (url, _):
        config = mixed(folders, prefetch_steps=0)
        sources = (config.sources[0], dataclasses.replace(config.sources[1], dir=url), config.sources[2])
        far = dataclasses.replace(
            config, sources=sources, cache_dir=str(tmp_path / "cache"), remote_timeout_s=4.0
        )
        (ours,), (theirs,) = make(far, 10, 1), make(config, 10, 1)
        for _ in range(8):
            assert rows_of(next(ours)) == rows_of(next(theirs))
        close([ours, theirs])
    for path in copy.glob("train-*.tar"):
        raw = bytearray(path.read_bytes())
        raw[600] ^= 1
        path.write_bytes(raw)
    (loader,) = make(mixed({**folders, "code": copy}, prefetch_steps=0), 10, 1)
    with pytest.raises(DataError, match=r"code/train-00000\d\.tar at offset 0: .*damaged"):
        take_many(loader)
    loader.close()


def test_damaged_rows_of_one_source_are_skipped(folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches damage that shifts the rows of other sources, and a source that is gone called damaged."""
    copy = tmp_path / "code"
    shutil.copytree(folders["code"], copy)
    path = copy / "train-000000.tar"
    raw = bytearray(path.read_bytes())
    raw[600] ^= 1
    path.write_bytes(raw)
    here = {**folders, "code": copy}
    config = mixed(here, prefetch_steps=0, on_damage="skip")
    (ours,), (theirs,) = make(config, 10, 1), make(mixed(folders, prefetch_steps=0), 10, 1)
    lost = 0
    for _ in range(20):
        found, wanted = next(ours), next(theirs)
        damaged = [row for row, _ in found.damaged]
        assert all("code/train-000000.tar at offset 0" in damage.error for _, damage in found.damaged)
        for row in range(10):
            same = bool((found.tokens[row] == wanted.tokens[row]).all())
            assert same == (row not in damaged)
        lost += len(damaged)
    assert lost > 8
    assert ours.use == theirs.use
    close([ours, theirs])
    (copy / "manifest.json").unlink()
    ours.load_state_dict({**ours.state_dict(), "next_row": 0})
    with pytest.raises(DataError, match=r"code/manifest\.json: file is missing"):
        take_many(ours)
    ours.close()


def test_limits_are_exact(folders: dict[str, Path]) -> None:
    """Catches a limit that is off by a row, and advice that does not fit when it is followed."""
    config = mixed(folders, mixture_period=1000)
    manifests = [open_source(part).manifest for part in config.by_source.values()]
    schedule = open_schedule(config)
    windows = len(corpus_windows(folders["code"], manifests[1], "train"))
    bound = limited(config, "code", max_epochs=1.0)
    fitting = max(n for n in range(1, 400) if schedule.rows_before(6 * n)[1] <= windows)
    use = planned_use(bound, manifests, 6, fitting)[1]
    assert use.tokens == schedule.rows_before(6 * fitting)[1] * SEQ_LEN
    assert use.epochs <= 1 < planned_use(config, manifests, 6, fitting + 3)[1].epochs
    message = (
        rf"data\.sources: code: train\.steps={3 * fitting} would train on .* max_epochs=1 of its "
        rf"{windows * SEQ_LEN:,} allows {windows * SEQ_LEN:,}; at most train\.steps={fitting} fits"
    )
    with pytest.raises(ValueError, match=message) as caught:
        planned_use(bound, manifests, 6, 3 * fitting)
    weight = float(str(caught.value).rpartition("=")[2])
    lighter = limited(bound, "code", weight=weight)
    assert planned_use(lighter, manifests, 6, 3 * fitting)[1].epochs <= 1
    heavier = limited(bound, "code", weight=1.1 * weight)
    with pytest.raises(ValueError, match="code: train"):
        planned_use(heavier, manifests, 6, 3 * fitting)
    with pytest.raises(ValueError, match=r"max_tokens=351 of its [\d,]+ allows 320; at most train\.steps="):
        planned_use(limited(config, "books", max_tokens=351), manifests, 6, 300)


def test_rows_that_are_left_out_do_not_count(folders: dict[str, Path]) -> None:
    """Catches plans and counters that differ where ``data.skip`` begins and ends inside steps."""
    config = mixed(folders, skip=((10, 25), (31, 40), (90, 91)), prefetch_steps=0)
    (loader,) = make(config, 6, 1)
    for _ in range(23):
        next(loader)
    ranges = [pair for pair in trained_ranges(config.skip, 6, 23) if pair[0] < pair[1]]
    assert sum(last - first for first, last in ranges) == 23 * 6
    assert ranges[-1][1] == loader.state_dict()["next_row"]
    manifests = [open_source(part).manifest for part in config.by_source.values()]
    assert planned_use(config, manifests, 6, 23) == loader.use
    assert math.isclose(sum(source.tokens for source in loader.use), 23 * 6 * SEQ_LEN)
    close([loader])


def test_a_loader_counts_no_rows_of_a_rewind(folders: dict[str, Path]) -> None:
    """Catches tokens counted that were undone: the cursor goes on, the counters go back."""
    loader = TokenLoader(mixed(folders), rows_per_step=10, rank=0, world_size=1)
    for _ in range(3):
        next(loader)
    saved = loader.state_dict()
    for _ in range(4):
        next(loader)
    loader.load_state_dict({**saved, "next_row": 70})
    next(loader)
    assert [source.tokens // SEQ_LEN for source in loader.use] == [20, 8, 12]
    loader.close()
