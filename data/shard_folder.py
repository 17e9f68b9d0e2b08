"""The folder that prepare writes: whose it is, how far it is, and that one run at a time writes it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.files import replace_bytes, temporary_path
from data.manifest import MANIFEST_NAME, TOKENIZER_NAME, DataError, Manifest, read_manifest
from data.spool import SPOOL_NAME
from data.tokenizer import Tokenizer, load_tokenizer

PROGRESS_NAME = "progress.json"
PROGRESS_VERSION = 2
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SPLIT_NAMES = ("train", "val")
# What folders of earlier versions were made with, which did not write it down.
EARLIER_RECIPE = {"split": "hash", "cleaning": "none"}


class ShardFolder:
    """An unfinished or finished shard folder."""

    def __init__(self, path: Path, recipe: Mapping[str, Any]):
        """Describe a folder.

        Args:
            path: the folder, which :meth:`locked` makes.
            recipe: what decides the output; a folder with another recipe is refused.
        """
        self.path, self.recipe = path, dict(recipe)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second run out of the folder; the lock ends with the process, however it ends.

        A folder that did not exist is made, and removed again if it stays empty.

        Raises:
            DataError: a second run, a file of this name, or a disk without room while the lock is held.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path}: is a file, --out must be a folder")
        existed = self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise DataError(f"{self.path}: another data.prepare is writing it") from error
        try:
            yield
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise DataError(
                f"{self.path}: {error.strerror}; when there is room, the same command continues"
            ) from error
        finally:
            os.close(descriptor)
            if not existed and not any(self.path.iterdir()):
                self.path.rmdir()

    def finished(self, *, overwrite: bool, may_differ: frozenset[str] = frozenset()) -> Manifest | None:
        """Return the manifest if the folder is finished.

        Args:
            overwrite: remove what an earlier run wrote instead.
            may_differ: keys of the recipe in which an unfinished run may differ.

        Raises:
            DataError: the folder is somebody else's, or another recipe's.
        """
        names = {path.name for path in self.path.iterdir()}
        ours = {MANIFEST_NAME, PROGRESS_NAME}
        if not names & ours and names - {temporary_path(self.path / PROGRESS_NAME).name}:
            raise DataError(f"{self.path}: not empty and not written by data.prepare; choose another --out")
        if overwrite:
            self.discard()
        elif MANIFEST_NAME in names:
            manifest = read_manifest(self.path)
            self._compare("a finished run", manifest.recipe)
            self.sweep()
            return manifest
        elif PROGRESS_NAME in names:
            self._compare("an unfinished run", self.read_progress().get("recipe", {}), may_differ)
        return None

    def begin(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Mark the folder as ours, store the tokenizer, and return the state to continue from."""
        saved = self.read_progress()
        try:
            if not saved:  # first of all the file that says whose folder it is
                self.write_progress({"tokenizer_sha256": tokenizer.sha256})
            replace_bytes(self.path / TOKENIZER_NAME, tokenizer.json_bytes)
        except OSError:
            if not saved:
                self.discard()
            raise
        return saved

    def read_progress(self) -> dict[str, Any]:
        """Return what an interrupted run wrote last; empty if there was none.

        Raises:
            DataError: damaged, or of another version of this program.
        """
        path = self.path / PROGRESS_NAME
        if not path.exists():
            return {}
        try:
            state: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: damaged; --overwrite starts again") from error
        if state.get("version") != PROGRESS_VERSION:
            raise DataError(f"{path}: begun by another version of data.prepare; --overwrite starts again")
        return state

    def write_progress(self, state: Mapping[str, Any]) -> None:
        """Replace the state to continue from, durably."""
        body = {"version": PROGRESS_VERSION, "recipe": self.recipe, **state}
        replace_bytes(self.path / PROGRESS_NAME, json.dumps(body).encode())

    def read_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that an interrupted run trained; DataError if it was changed."""
        progress = self.read_progress()
        if not progress or not (self.path / TOKENIZER_NAME).exists():
            return None
        tokenizer = load_tokenizer(self.path)
        if tokenizer.sha256 != progress["tokenizer_sha256"]:
            raise DataError(
                f"{self.path / TOKENIZER_NAME}: changed since the interrupted run; --overwrite starts again"
            )
        return tokenizer

    def has_shards(self) -> bool:
        """Whether a shard is complete, which is worth continuing from."""
        return any(self.path.glob("*.tar"))

    def sweep(self) -> None:
        """Remove what only an unfinished folder needs."""
        written = [self.path / name for name in (MANIFEST_NAME, PROGRESS_NAME, TOKENIZER_NAME)]
        for path in (self.path / SPOOL_NAME, self.path / PROGRESS_NAME, *map(temporary_path, written)):
            if path.exists():  # a finished folder may be read-only
                path.unlink()

    def discard(self) -> None:
        """Remove the files that this program writes."""
        # The manifest first, so that a crash here leaves no finished folder.
        (self.path / MANIFEST_NAME).unlink(missing_ok=True)
        (self.path / TOKENIZER_NAME).unlink(missing_ok=True)
        for split in SPLIT_NAMES:
            for path in self.path.glob(f"{split}-*.tar*"):
                path.unlink()
        self.sweep()

    def _compare(self, state: str, found: dict[str, Any], may_differ: frozenset[str] = frozenset()) -> None:
        for key, wanted in self.recipe.items():
            have = found.get(key, EARLIER_RECIPE.get(key))
            if key not in may_differ and have != wanted:
                raise DataError(
                    f"{self.path}: holds {state} with {key}={have!r}, asked for {wanted!r}; "
                    "--overwrite replaces it"
                )
