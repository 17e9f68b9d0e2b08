"""The order of the training windows: pure functions of the global row number.

A *row* is one sequence that the training sees; rows are numbered 0, 1, 2, ... over the whole run. A *window*
is the place of a row in the data: T inputs and their T labels in one chunk. An epoch shuffles the chunks, and
the windows inside each chunk; its ``lanes`` start at evenly spaced places of the shuffled epoch and are read
side by side, so that few chunks are open while neighbouring rows come from far apart.

Nothing here depends on the number of ranks, on the rows per step, or on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

MAX_CACHED_EPOCHS = 4
GOLDEN = (math.sqrt(5) - 1) / 2


def permutation(size: int, *key: int | str) -> np.ndarray:
    """Return a permutation of ``range(size)`` that is fixed by ``key`` for ever, (size,) int64.

    Stable argsort of the first ``size`` raw 64-bit outputs of Philox4x64 under the first 16 bytes of
    SHA-256("a/b/...") as two little-endian words. Only raw outputs of a bit generator are the same in every
    version of NumPy (NEP 19); ``Generator.permutation`` is not.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    words = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    return np.argsort(np.random.Philox(key=words).random_raw(size), kind="stable")


def after_skips(row: int, skip: Sequence[tuple[int, int]]) -> int:
    """Return ``row``, or the end of the skipped range that begins at it or holds it."""
    for first, last in skip:
        if first <= row < last:
            row = last
    return row


class RowOrder(ABC):
    """Which windows the rows of each step are, and how ranks share them."""

    @abstractmethod
    def rows_of_step(self, first_row: int, num_rows: int) -> np.ndarray:
        """Return the windows of the step of rows ``first_row .. first_row + num_rows - 1``.

        Returns:
            (num_rows, 3) int64: row, chunk, window; rows of a chunk stand together.
        """

    @abstractmethod
    def keep_steps(self, num_rows: int, world_size: int) -> int:
        """Return after how many steps a rank uses a chunk again, if it does.

        Args:
            num_rows: rows of a step, over all ranks.
            world_size: ranks.
        """

    def rows_of_rank(self, first_row: int, num_rows: int, rank: int, world_size: int) -> np.ndarray:
        """Return the piece of :meth:`rows_of_step` that one of ``world_size`` ranks reads.

        Returns:
            (num_rows // world_size, 3) int64: row, chunk, window.
        """
        per_rank = num_rows // world_size
        return self.rows_of_step(first_row, num_rows)[rank * per_rank : (rank + 1) * per_rank]


class WindowOrder(RowOrder):
    """Which window each row is, of a run that has one source, or of the rows of one source of several."""

    def __init__(self, windows_per_chunk: Sequence[int], *, seed: int, lanes: int):
        """Describe the order of one split.

        Args:
            windows_per_chunk: windows of each chunk, in the order of the manifest.
            seed: another seed is another order.
            lanes: places of the epoch that are read side by side.

        Raises:
            ValueError: there is no window at all.
        """
        self.windows_per_chunk = np.asarray(windows_per_chunk, dtype=np.int64)
        self.num_windows = int(self.windows_per_chunk.sum())
        if self.num_windows < 1:
            raise ValueError("the split has 0 windows")
        self.lanes = min(lanes, self.num_windows)
        self._lane_stride = next(
            stride
            for stride in range(round(GOLDEN * self.lanes), 2 * self.lanes)
            if math.gcd(stride, self.lanes) == 1
        )
        self._seed = seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._inside: dict[tuple[int, int], np.ndarray] = {}

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Find the windows of some rows.

        Args:
            rows: (N,) int64 global row numbers.

        Returns:
            epoch, lane, chunk, window, each (N,) int64; ``window`` counts inside the chunk.
        """
        epoch, position = np.divmod(rows, self.num_windows)
        lane, step_in_lane = position % self.lanes, position // self.lanes
        per_lane, longer = divmod(self.num_windows, self.lanes)  # the first `longer` lanes have one more
        place = lane * per_lane + np.minimum(lane, longer) + step_in_lane
        chunk, window = np.empty_like(place), np.empty_like(place)
        for number in np.unique(epoch):
            here = epoch == number
            chunk[here], window[here] = self._locate_in_epoch(int(number), place[here])
        return epoch, lane, chunk, window

    def rows_of_step(self, first_row: int, num_rows: int) -> np.ndarray:
        """See :class:`RowOrder`. Rows of a lane stand together."""
        rows = first_row + np.arange(num_rows, dtype=np.int64)
        epoch, lane, chunk, window = self.locate(rows)
        by_lane = np.lexsort((rows, self.places(lane), epoch))
        return np.stack([rows, chunk, window], axis=1)[by_lane]

    def places(self, lane: np.ndarray) -> np.ndarray:
        """Return where lanes stand in the list that the ranks cut into equal pieces.

        Where the lanes do not divide the rows, some lanes that follow each other have a row more, others in
        each step. So neighbours stand far apart, as multiples of the golden ratio do: the place of every lane
        in the list stays almost the same, and so do the lanes that a rank reads.
        """
        return lane * self._lane_stride % self.lanes

    def keep_steps(self, num_rows: int, world_size: int) -> int:
        """See :class:`RowOrder`.

        Which lanes a rank reads repeats when as many rows have passed as lanes and step divide; but a chunk
        that lasts for fewer steps is finished then.
        """
        every_lane = -(-self.lanes // num_rows)
        if world_size == 1:
            return 1 + every_lane
        repeats = self.lanes // math.gcd(self.lanes, num_rows)
        lasts = -(-int(self.windows_per_chunk.max()) * self.lanes // num_rows)
        return 1 + max(every_lane, min(repeats, lasts))

    def _locate_in_epoch(self, epoch: int, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chunks, ends = self._epoch(epoch)
        slot = np.searchsorted(ends, place, side="right")
        chunk = chunks[slot]
        window = place - (ends[slot] - self.windows_per_chunk[chunk])
        for number in np.unique(chunk):
            here = chunk == number
            window[here] = self._inside_chunk(epoch, int(number))[window[here]]
        return chunk, window

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the chunks in the epoch's order, and the number of windows up to each one's end."""
        if epoch not in self._epochs:
            if len(self._epochs) >= MAX_CACHED_EPOCHS:
                self._epochs.clear()
            chunks = permutation(len(self.windows_per_chunk), self._seed, "chunks", epoch)
            self._epochs[epoch] = chunks, np.cumsum(self.windows_per_chunk[chunks])
        return self._epochs[epoch]

    def _inside_chunk(self, epoch: int, chunk: int) -> np.ndarray:
        """Return the order of the windows inside a chunk."""
        key = epoch, chunk
        if key not in self._inside:
            if len(self._inside) >= 4 * self.lanes:
                self._inside.clear()
            self._inside[key] = permutation(
                int(self.windows_per_chunk[chunk]), self._seed, "windows", epoch, chunk
            )
        return self._inside[key]
