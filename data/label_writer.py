"""Filling a label folder, by any number of processes on any machines that share its file system."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.files import replace_bytes, replace_text
from data.label_cache import (
    LABELS_NAME,
    ChunkLabels,
    LabelSettings,
    chunk_name,
    differences,
    digest_of,
    found_chunks,
    read_labels,
    settings_from_json,
    write_labels,
)
from data.manifest import DataError

PROGRESS_NAME = "progress.json"
LOCK_NAME = ".lock"
FOLDER_BYTE = 0
"""Place in the lock file that stands for the folder; chunk number n of all splits has n + 1."""
ALL_THAT_FOLLOW = 0
"""What lockf(3) takes for: to the end of the file, however far it may grow."""


class LabelWriter:
    """One of the processes that fill a folder.

    Whoever works on a chunk holds a lock on the byte of ``.lock`` that stands for it (fcntl(2)). The lock
    ends with the process, however that ends, so nothing has to be cleaned up and no chunk is done twice.
    """

    def __init__(
        self,
        folder: Path,
        settings: LabelSettings,
        windows: Mapping[str, Sequence[int]],
        *,
        overwrite: bool = False,
    ) -> None:
        """Begin a folder or go on with one.

        Args:
            folder: created where it is missing.
            settings: what the labels are made with.
            windows: by split, the windows of each chunk.
            overwrite: remove labels that were made with other settings.

        Raises:
            DataError: the folder holds something else, or somebody is writing the labels to be removed.
        """
        self._folder, self._settings, self._windows = folder, settings, windows
        self._chunks = [(split, number) for split, counts in windows.items() for number in range(len(counts))]
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        if names and not names & {LABELS_NAME, PROGRESS_NAME, LOCK_NAME}:
            raise DataError(f"{folder}: not empty and no labels in it; choose another concepts.labels")
        self._lock_file = open(folder / LOCK_NAME, "ab")  # noqa: SIM115
        with self._locked(FOLDER_BYTE):
            self._settle(overwrite)
        self._found = {split: found_chunks(folder, split) for split in windows}

    @property
    def num_windows(self) -> int:
        """Windows of all chunks."""
        return sum(map(sum, self._windows.values()))

    def windows_found(self) -> int:
        """Windows that have labels now, whoever wrote them."""
        self._found = {split: found_chunks(self._folder, split) for split in self._windows}
        return sum(self._windows[split][number] for split, found in self._found.items() for number in found)

    def claims(self) -> Iterator[tuple[str, int]]:
        """Yield chunks that have no labels and no other process; each stays this one's until the next."""
        claimed = True
        while claimed:  # again, for a process may have ended without finishing its chunk
            claimed = False
            for position, (split, number) in enumerate(self._chunks):
                if number in self._found[split] or not self._windows[split][number]:
                    continue
                with self._claimed(position) as mine:
                    if mine and not self._look_again(split, number):
                        claimed = True
                        yield split, number

    def write(self, split: str, number: int, ids: np.ndarray) -> None:
        """Store the ids of a claimed chunk, (windows, T, A) uint16; they appear whole or not at all."""
        wanted = (self._windows[split][number], *self._settings.window_shape)
        assert ids.shape == wanted, f"{ids.shape} instead of {wanted}"
        assert ids.dtype == np.uint16, ids.dtype
        content = ids.astype("<u2", copy=False).tobytes()
        digest = digest_of(content)
        path = self._folder / chunk_name(split, number, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, content)
        self._found[split][number] = {digest}

    def finish(self) -> bool:
        """Write ``labels.json`` if every chunk has its labels; returns whether that is so."""
        with self._locked(FOLDER_BYTE):
            if self.windows_found() < self.num_windows:
                return False
            splits = {split: self._collect(split) for split in self._windows}
            for path in self._folder.glob("*/*/.*.tmp"):  # of processes that were killed
                path.unlink()
            (self._folder / PROGRESS_NAME).unlink(missing_ok=True)
            write_labels(self._folder, self._settings, splits)
        return True

    def close(self) -> None:
        """Let go of every lock."""
        self._lock_file.close()

    def _settle(self, overwrite: bool) -> None:
        """Make sure that the folder is for these settings."""
        marker = self._folder / PROGRESS_NAME
        problem = self._problem(marker)
        if problem and not overwrite:
            raise DataError(f"{problem}; --overwrite replaces them")
        if problem:
            self._discard()
        if not (self._folder / LABELS_NAME).exists() and not marker.exists():
            replace_text(marker, json.dumps(asdict(self._settings)) + "\n")

    def _problem(self, marker: Path) -> str:
        """Why the labels in the folder are not those that are wanted; empty where they are."""
        try:
            if (self._folder / LABELS_NAME).exists():
                found = read_labels(self._folder).settings
            elif marker.exists():
                found = _read_marker(marker)
            else:
                return ""
        except DataError as error:
            return str(error)
        different = differences(found, self._settings)
        return different and f"{self._folder}: holds labels for something else, {different}"

    def _discard(self) -> None:
        """Remove all labels; nobody can begin a chunk meanwhile."""
        if not self._lock(FOLDER_BYTE + 1, ALL_THAT_FOLLOW, wait=False):
            raise DataError(f"{self._folder}: another process is writing these labels")
        for name in (LABELS_NAME, PROGRESS_NAME):  # the manifest first: no finished folder without files
            (self._folder / name).unlink(missing_ok=True)
        for path in [*self._folder.glob("*/*/*.u16"), *self._folder.glob("*/*/.*.tmp")]:
            path.unlink()
        self._unlock(FOLDER_BYTE + 1, ALL_THAT_FOLLOW)

    def _look_again(self, split: str, number: int) -> bool:
        """Whether a chunk has labels by now."""
        beside = found_chunks(self._folder, split, number)
        self._found[split].update(beside)
        return number in beside

    def _collect(self, split: str) -> list[ChunkLabels]:
        chunks = []
        for number, windows in enumerate(self._windows[split]):
            # Two only where somebody labelled a chunk again on a machine that rounds otherwise.
            first, *others = sorted(self._found[split].get(number, {""}))
            for digest in others:
                (self._folder / chunk_name(split, number, digest)).unlink()
            chunks.append(ChunkLabels(windows, first))
        return chunks

    @contextlib.contextmanager
    def _locked(self, byte: int) -> Iterator[None]:
        self._lock(byte, 1, wait=True)
        try:
            yield
        finally:
            self._unlock(byte, 1)

    @contextlib.contextmanager
    def _claimed(self, position: int) -> Iterator[bool]:
        """Lock a chunk unless another process has it; gives whether it is this process's."""
        byte = FOLDER_BYTE + 1 + position
        mine = self._lock(byte, 1, wait=False)
        try:
            yield mine
        finally:
            if mine:
                self._unlock(byte, 1)

    def _lock(self, byte: int, count: int, *, wait: bool) -> bool:
        """Lock bytes of the lock file; returns whether they are this process's."""
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), count, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise DataError(f"{self._folder}: no file locks on this file system: {error.strerror}") from error
        return True

    def _unlock(self, byte: int, count: int) -> None:
        fcntl.lockf(self._lock_file, fcntl.LOCK_UN, count, byte)


def _read_marker(path: Path) -> LabelSettings:
    try:
        return settings_from_json(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not readable") from error
