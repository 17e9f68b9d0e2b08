"""Batches of token windows for training and validation."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from data.batch import Batch
from data.config import DataConfig
from data.joint import join_sources
from data.label_cache import Labels
from data.limits import SourceUse, source_use
from data.manifest import DataError
from data.mixture import open_order, open_schedule
from data.order import after_skips
from data.source import open_source, windows_per_chunk
from data.stream import Windows, read_windows

STATE_VERSION = 1
VALIDATION_KEEP_STEPS = 2


class TokenLoader:
    """Endless batches of one data-parallel rank, in an order that any number of ranks can continue."""

    def __init__(
        self,
        config: DataConfig,
        *,
        rows_per_step: int,
        rank: int,
        world_size: int,
        pin_memory: bool = False,
        labels: Labels | None = None,
    ):
        """Open the ``train`` split.

        Args:
            config: the data section.
            rows_per_step: sequences per optimizer step, over all ranks.
            rank, world_size: the data-parallel ones.
            pin_memory: return page-locked memory, for asynchronous copies to a CUDA device.
            labels: stored targets of these shards, which then are part of the batches; of several sources
                see :func:`data.joint.join_labels`.

        Raises:
            ValueError: the ranks do not divide the rows, or a source has no rows.
            DataError: see :func:`data.source.open_source` and :func:`data.joint.join_sources`.
        """
        _check_ranks(rank, world_size)
        if rows_per_step < 1 or rows_per_step % world_size:
            raise ValueError(
                f"train.batch_size={rows_per_step} is not divisible by the {world_size} data-parallel ranks"
            )
        sources = {name: open_source(part) for name, part in config.by_source.items()}
        self._config, self._source = config, join_sources(config.place, sources)
        self._rows_per_step, self._rank, self._world_size = rows_per_step, rank, world_size
        self._labels = labels
        self._manifests = {name: source.manifest for name, source in sources.items()}
        self._schedule = open_schedule(config)
        self._order = open_order(config, list(self._manifests.values()), self._schedule)
        # The current device belongs to a thread: pinning elsewhere would open a context on device 0.
        self._pin_device = torch.cuda.current_device() if pin_memory else None
        self._next_row = 0
        self._rows_by_source = np.zeros(len(sources), dtype=np.int64)
        self._batches: _Prefetcher | None = None

    def __iter__(self) -> TokenLoader:
        return self

    def __next__(self) -> Batch:
        """Return this rank's rows of the next optimizer step.

        Returns:
            tokens (rows_per_step // world_size, seq_len + 1) uint16, or int32 for uint32 shards, and with
            labels their targets; all rows count, unless they are damaged and ``data.on_damage=skip``.

        Raises:
            DataError: a damaged shard, or one that cannot be had.
        """
        batch = next(self._read_ahead())
        first = after_skips(self._next_row, self._config.skip)
        self._next_row = first + self._rows_per_step
        self._rows_by_source += self._schedule.rows_in([(first, self._next_row)])
        return batch

    def peek(self) -> Batch | None:
        """Return what ``next`` will return, without counting it; None where it has not been read yet.

        A damaged shard is the matter of ``next``. With ``prefetch_steps=0`` it is read here.
        """
        return self._read_ahead().peek()

    def state_dict(self) -> dict[str, Any]:
        """Return the next row and what fixes the order; JSON-able, of a size that is constant per source.

        It counts the batches that were returned, not those read ahead.
        """
        return {
            **self._identity(),
            "next_row": self._next_row,
            "rows_by_source": self._rows_by_source.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, with any number of ranks and rows per step.

        Raises:
            DataError: the data or their order are not those of ``state``.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise DataError(
                    f"the data order changed since the checkpoint: {key} was {state.get(key)!r}, is {value!r}"
                )
        self.close()
        self._next_row = int(state["next_row"])
        # Checkpoints of a single source did not count its rows at first.
        counts = state.get("rows_by_source", [self._next_row])
        self._rows_by_source = np.asarray(counts, dtype=np.int64)

    @property
    def use(self) -> list[SourceUse]:
        """What of each source was trained on: the batches that were returned, without rows left out."""
        return source_use(self._config, list(self._manifests.values()), self._rows_by_source.tolist())

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source in the training rows, by name."""
        shares = self._schedule.rows_per_period / self._schedule.period
        return dict(zip(self._manifests, shares.tolist(), strict=True))

    def close(self) -> None:
        """Stop reading ahead. The next batch starts it again."""
        if self._batches is not None:
            self._finalizer()
            self._batches = None

    def _read_ahead(self) -> _Prefetcher:
        if self._batches is None:
            self._batches = _Prefetcher(
                self._read(self._next_row), self._config.prefetch_steps, self._pin_device
            )
            self._finalizer = weakref.finalize(self, self._batches.close)
        return self._batches

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "seed": self._config.seed,
            "lanes": self._config.lanes,
            "seq_len": self._config.seq_len,
            **self._sources_identity(),
        }

    def _sources_identity(self) -> dict[str, Any]:
        if len(self._manifests) == 1:
            return {"manifest_sha256": self._source.manifest.sha256}
        rows = self._schedule.rows_per_period.tolist()
        return {
            "sources": list(self._manifests),
            **{f"manifest_sha256 of {name}": manifest.sha256 for name, manifest in self._manifests.items()},
            **{
                f"rows_per_period of {name}": count for name, count in zip(self._manifests, rows, strict=True)
            },
        }

    def _read(self, first_row: int) -> Iterator[Batch]:
        # The arguments are bound here: the reading thread must not keep the loader alive.
        order, rows, rank, world_size = self._order, self._rows_per_step, self._rank, self._world_size
        skip = self._config.skip

        def steps() -> Iterator[np.ndarray]:
            row = first_row
            while True:
                row = after_skips(row, skip)
                yield order.rows_of_rank(row, rows, rank, world_size)
                row += rows

        keep_steps = order.keep_steps(rows, world_size)
        windows = read_windows(
            *self._source,
            "train",
            self._config.seq_len,
            steps(),
            keep_steps,
            self._labels,
            self._config.on_damage,
        )
        return map(_to_batch, windows, itertools.repeat(rows // world_size))


def validation_batches(
    config: DataConfig,
    *,
    share: float,
    rows: int,
    rank: int,
    world_size: int,
    labels: Labels | None = None,
) -> Iterator[Batch]:
    """Return the first ``share`` of the validation windows of one source, in the order of the corpus.

    Every rank gets the same number of batches, and all ranks together get each window once.

    Args:
        config: the data section of this source alone, see ``DataConfig.by_source``.
        share: part of the windows, in (0, 1]; at least one window.
        rows: sequences per batch of one rank.
        rank, world_size: the data-parallel ones.
        labels: as for :class:`TokenLoader`.

    Yields:
        tokens (rows, seq_len + 1) as in training; rows that do not count repeat a window.

    Raises:
        ValueError: ``share`` or ``rows`` out of bounds.
        DataError: see :func:`data.source.open_source`, raised before the first batch.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share={share} of the validation windows must lie in (0, 1]")
    if rows < 1:
        raise ValueError(f"rows={rows} per validation batch must be at least 1")
    _check_ranks(rank, world_size)
    source = open_source(config)
    counts = windows_per_chunk(source.manifest, "val", config.seq_len)
    windows = _first_windows(counts, max(1, round(share * sum(counts))))
    starts = range(rank * rows, len(windows) + rank * rows, rows * world_size)
    steps = (windows[np.minimum(start + np.arange(rows), len(windows) - 1)] for start in starts)
    found = read_windows(
        *source, "val", config.seq_len, steps, VALIDATION_KEEP_STEPS, labels, config.on_damage
    )
    real = (min(max(len(windows) - start, 0), rows) for start in starts)
    return map(_to_batch, found, real)


class _Prefetcher:
    """Takes items from an iterator in a thread, a bounded number ahead; errors come out of ``next``."""

    def __init__(self, items: Iterator[Batch], ahead: int, pin_device: int | None):
        self._items = items
        self._pin_device = pin_device
        self._stop = threading.Event()
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(max(ahead, 1))
        self._peeked: Batch | BaseException | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="token-prefetch", daemon=True)
        self._threaded = ahead > 0
        if self._threaded:
            self._thread.start()

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        item, self._peeked = self._peeked, None
        if item is None:
            item = self._queue.get() if self._threaded else self._take()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        return item

    def peek(self) -> Batch | None:
        if self._peeked is None and self._error is None and not (self._threaded and self._queue.empty()):
            self._peeked = self._queue.get() if self._threaded else self._take()
        return self._peeked if isinstance(self._peeked, Batch) else None

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        if self._pin_device is not None:
            torch.cuda.set_device(self._pin_device)
        item: Batch | BaseException | None = None
        while not self._stop.is_set() and not isinstance(item, BaseException):
            item = self._take()
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue

    def _take(self) -> Batch | BaseException:
        try:
            item = next(self._items)
            return item.pin_memory() if self._pin_device is not None else item
        except BaseException as error:  # handed to the consumer, whatever it is
            return error


def _to_batch(windows: Windows, num_rows: int) -> Batch:
    targets = None if windows.targets is None else _to_tensor(windows.targets)
    damaged = tuple(row for row in windows.damaged if row.row < num_rows)
    return Batch(_to_tensor(windows.tokens), num_rows, targets, damaged)


def _to_tensor(ids: np.ndarray) -> torch.Tensor:
    native = np.uint16 if ids.dtype.itemsize == 2 else np.int32
    return torch.from_numpy(ids.astype(native, copy=False))


def _first_windows(counts: list[int], limit: int) -> np.ndarray:
    """Return the first windows of a split as steps know them, (limit, 3) int64: row, chunk, window."""
    chunk = np.repeat(np.arange(len(counts)), counts)[:limit]
    first = np.concatenate([[0], np.cumsum(counts)])[chunk]
    rows = np.arange(len(chunk))
    return np.stack([rows, chunk, rows - first], axis=1)


def _check_ranks(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must lie in 0 .. world_size - 1 = {world_size - 1}")
