"""A corpus on disk: which files, in which order, as batches of raw items.

Reading happens in one process; a batch is parsed where it is tokenized, so that any number of processes can
work on consecutive batches while the order of the documents stays that of the corpus.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.manifest import DataError
from data.readers import CorpusFile, RawItem, count_rows, read_items

BATCH_BYTES = 1 << 20
SUFFIXES = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.xz": "jsonl.xz",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "archive",
    ".xz": "archive",
}
NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.(arrow|parquet)")
TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class RawBatch(NamedTuple):
    """Consecutive items of the corpus, about BATCH_BYTES of them."""

    items: list[RawItem]
    position: int
    """Bytes of the corpus's files that are read after this batch (compressed bytes where compressed)."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files of one format in their order."""

    name: str
    """Last component of the path, or the name of a built-in source."""
    files: Iterable[CorpusFile]
    """Listed anew by each iteration, because millions of names would fill the memory."""
    num_files: int
    total_bytes: int
    """Bytes of all files on disk."""
    text_field: str

    def batches(self) -> Iterator[RawBatch]:
        """Yield every document in order; the cut into batches depends on nothing but the files.

        Raises:
            DataError: a damaged file, or a column that is missing.
        """
        pending: list[RawItem] = []
        pending_bytes = position = before = 0
        for file in self.files:
            for item, position_in_file in read_items(file, self.text_field):
                pending.append(item)
                pending_bytes += item.size
                position = before + position_in_file
                if pending_bytes >= BATCH_BYTES:
                    yield RawBatch(pending, position)
                    pending, pending_bytes = [], 0
            before += file.size
        if pending:
            yield RawBatch(pending, position)

    def count_rows(self) -> int | None:
        """Return the number of documents, blank ones too, if the files tell without being read."""
        total = 0
        for file in self.files:
            rows = count_rows(file)
            if rows is None:
                return None
            total += rows
        return total


def open_corpus(path: str | Path, text_field: str = "text", pattern: str = "*") -> Corpus:
    """Find the files of a corpus.

    Args:
        path: a file of a known format, a folder that is searched for files of one format (sorted by relative
            path, hidden ones skipped), or a Hugging Face ``save_to_disk`` folder.
        text_field: JSON key or column that holds the text.
        pattern: which files below a folder, by their relative paths; ``*`` matches slashes too.

    Raises:
        DataError: nothing there, nothing readable, or files that do not belong together.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if (path / "dataset_dict.json").is_file():
        path = _only_split(path)
    if path.is_file() or (path / "state.json").is_file():
        if pattern != "*":
            raise DataError(f"{path}: --files {pattern} chooses among a folder's files; here they are fixed")
        files = (_only_file(path),) if path.is_file() else _saved_files(path)
        return _corpus(path, files, text_field)
    return _corpus(path, FileTree(path, pattern), text_field)


def stdlib_corpus() -> Corpus:
    """Return the Python sources of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in root.rglob("*.py") if not TEST_FOLDERS & set(path.relative_to(root).parts))
    paths = sorted(found, key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise DataError(f"{root}: this Python has no library sources; use --input")
    files = tuple(CorpusFile(str(path), "text", path.stat().st_size) for path in paths)
    return Corpus("stdlib", files, len(files), sum(file.size for file in files), "text")


class FileTree:
    """The readable files below a folder, sorted by relative path, listed as they are needed."""

    def __init__(self, root: Path, pattern: str):
        self._root, self._pattern = str(root), pattern

    def __iter__(self) -> Iterator[CorpusFile]:
        for file in _walk(self._root):
            if fnmatch.fnmatchcase(os.path.relpath(file.path, self._root), self._pattern):
                yield file


def _walk(folder: str) -> Iterator[CorpusFile]:
    with os.scandir(folder) as entries:
        # The slash gives the order of whole relative paths: "a.txt" and "a-b/c" come before "a/b".
        found = sorted((entry.name + "/" * entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name in found:
        path = os.path.join(folder, name)
        if _is_hidden(name):
            continue
        if name.endswith("/"):
            yield from _walk(path.rstrip("/"))
        elif (kind := _kind(name)) and os.path.isfile(path):
            yield CorpusFile(path, kind, os.stat(path).st_size)


def _is_hidden(name: str) -> bool:
    """Dot files, and in a Hugging Face cache the results of ``map`` and folders that are not finished."""
    return name.startswith(".") or name.endswith(".incomplete/") or fnmatch.fnmatch(name, "cache-*.arrow")


def _kind(name: str) -> str | None:
    matching = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix)]
    return SUFFIXES[max(matching, key=len)] if matching else None


def _only_file(path: Path) -> CorpusFile:
    kind = _kind(path.name)
    if kind is None:
        raise DataError(f"{path}: unknown format; readable are {', '.join(SUFFIXES)}")
    return CorpusFile(str(path), kind, path.stat().st_size)


def _corpus(path: Path, files: Iterable[CorpusFile], text_field: str) -> Corpus:
    """Look at all files once."""
    count = size = 0
    first: CorpusFile | None = None
    numbered: dict[tuple[str, str], list[re.Match[str]]] = {}
    for file in files:
        first = first or file
        _check_format(path, first, file)
        folder, name = os.path.split(file.path)
        if match := NUMBERED.fullmatch(name):
            numbered.setdefault((folder, match["stem"]), []).append(match)
        count, size = count + 1, size + file.size
    if first is None:
        raise DataError(f"{path}: empty corpus: no {', '.join(SUFFIXES)} files below it")
    _check_numbers(path, numbered)
    return Corpus(path.resolve().name, files, count, size, text_field)


def _check_format(path: Path, first: CorpusFile, file: CorpusFile) -> None:
    if first.kind.partition(".")[0] != file.kind.partition(".")[0]:
        raise DataError(
            f"{path}: mixed layouts: {os.path.relpath(first.path, path)} is {first.kind} and "
            f"{os.path.relpath(file.path, path)} is {file.kind}; choose by --files GLOB"
        )


def _check_numbers(path: Path, numbered: dict[tuple[str, str], list[re.Match[str]]]) -> None:
    """Raise DataError for two data sets side by side, or a missing ``-00003-of-00080``."""
    if len(numbered) > 1:
        names = ", ".join(os.path.join(os.path.relpath(folder, path), stem) for folder, stem in numbered)
        raise DataError(f"{path}: holds several data sets ({names}); choose one by --files GLOB")
    for (folder, stem), matches in numbered.items():
        totals = {int(match["total"]) for match in matches}
        missing = set(range(max(totals))) - {int(match["number"]) for match in matches}
        if len(totals) > 1 or missing:
            number = min(missing, default=0)
            raise DataError(
                f"{os.path.join(folder, stem)}-{number:05d}-of-{max(totals):05d}: missing; "
                f"{len(matches)} of {max(totals)} files are there"
            )


def _only_split(folder: Path) -> Path:
    splits = _read_json(folder / "dataset_dict.json").get("splits", [])
    if len(splits) != 1:
        raise DataError(
            f"{folder}: holds several splits ({', '.join(splits)}); give the folder of one of them"
        )
    return folder / str(splits[0])


def _saved_files(folder: Path) -> tuple[CorpusFile, ...]:
    """Return the files of a ``save_to_disk`` folder in the order of its state.json."""
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: has an index mapping; save it again after flatten_indices()")
    files = []
    for entry in state.get("_data_files", []):
        path = folder / entry["filename"]
        if not path.is_file():
            raise DataError(f"{path}: missing, state.json names it")
        files.append(CorpusFile(str(path), "arrow", path.stat().st_size))
    return tuple(files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    return body if isinstance(body, dict) else {}
