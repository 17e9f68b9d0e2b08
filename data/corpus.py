"""Readers: files of several formats to batches of raw documents, always in the same order.

Reading is cheap and happens in one process; a batch is parsed where it is tokenized, so that any number of
processes can work on consecutive batches while the order of the documents stays that of the corpus.
"""

from __future__ import annotations

import gzip
import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.manifest import DataError

BATCH_BYTES = 1 << 20
READ_BYTES = 1 << 20
SUFFIXES = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
}
TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class RawDocument(NamedTuple):
    """One document before parsing."""

    where: str
    """File, and line or row, for error messages."""
    data: bytes
    """UTF-8 text, or one line of JSON."""
    is_json: bool


class RawBatch(NamedTuple):
    """Consecutive documents of the corpus, about BATCH_BYTES of them."""

    documents: list[RawDocument]
    position: int
    """Bytes of the corpus's files that are read after this batch (compressed bytes where compressed)."""


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file and how to read it."""

    path: Path
    kind: str
    size: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """An ordered list of files."""

    name: str
    """Last component of the path, or the name of a built-in source."""
    files: tuple[CorpusFile, ...]
    text_field: str

    @property
    def total_bytes(self) -> int:
        """Bytes of all files on disk."""
        return sum(file.size for file in self.files)

    def batches(self) -> Iterator[RawBatch]:
        """Yield every document in order; the cut into batches depends on nothing but the files.

        Raises:
            DataError: a damaged file, or a column that is missing.
        """
        pending: list[RawDocument] = []
        pending_bytes = 0
        position = before = 0
        for file in self.files:
            for document, position_in_file in _read(file, self.text_field):
                pending.append(document)
                pending_bytes += len(document.data)
                position = before + position_in_file
                if pending_bytes >= BATCH_BYTES:
                    yield RawBatch(pending, position)
                    pending, pending_bytes = [], 0
            before += file.size
        if pending:
            yield RawBatch(pending, position)


def open_corpus(path: str | Path, text_field: str = "text") -> Corpus:
    """Find the files of a corpus.

    Args:
        path: a file of a known format, a folder that is searched for them (sorted by relative path, hidden
            ones skipped), or a Hugging Face ``save_to_disk`` folder.
        text_field: JSON key or column that holds the text.

    Raises:
        DataError: nothing there, or nothing readable.
    """
    path = Path(path)
    if path.is_file():
        files = [path]
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder")
    elif (path / "dataset_dict.json").is_file():
        splits = _read_json(path / "dataset_dict.json").get("splits", [])
        raise DataError(f"{path}: holds several splits ({', '.join(splits)}); give the folder of one of them")
    elif (path / "state.json").is_file():
        return Corpus(path.resolve().name, _hugging_face_files(path), text_field)
    else:
        files = _files_below(path)
    return Corpus(path.resolve().name, tuple(_corpus_file(file) for file in files), text_field)


def stdlib_corpus() -> Corpus:
    """Return the Python sources of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in root.rglob("*.py") if not TEST_FOLDERS & set(path.relative_to(root).parts))
    files = sorted(found, key=lambda path: path.relative_to(root).as_posix())
    if not files:
        raise DataError(f"{root}: this Python has no library sources; use --input")
    return Corpus("stdlib", tuple(CorpusFile(file, "text", file.stat().st_size) for file in files), "text")


def parse_batch(batch: RawBatch, text_field: str) -> list[str]:
    """Return the texts of a batch; blank ones are dropped.

    Raises:
        DataError: not UTF-8, not JSON, or no string in ``text_field``; names the file and the place.
    """
    texts = (_parse(document, text_field) for document in batch.documents)
    return [text for text in texts if text and not text.isspace()]


def _parse(document: RawDocument, text_field: str) -> str:
    try:
        text = document.data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = document.data[error.start]
        raise DataError(f"{document.where}: not UTF-8: byte 0x{byte:02x} at offset {error.start}") from error
    return _parse_json(document.where, text, text_field) if document.is_json else text


def _parse_json(where: str, line: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        keys = ", ".join(sorted(row)) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        raise DataError(f"{where}: no string in field {text_field!r} (--text_field); fields: {keys}")
    text: str = row[text_field]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: not UTF-8: lone surrogate at character {error.start}") from error
    return text


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def _corpus_file(path: Path) -> CorpusFile:
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown format; readable are {', '.join(SUFFIXES)}")
    return CorpusFile(path, kind, path.stat().st_size)


def _files_below(folder: Path) -> list[Path]:
    files = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and _kind(path):
            files.append(path)
    if not files:
        raise DataError(f"{folder}: empty corpus: no {', '.join(SUFFIXES)} files below it")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _hugging_face_files(folder: Path) -> tuple[CorpusFile, ...]:
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: has an index mapping; save it again after flatten_indices()")
    names = [entry["filename"] for entry in state.get("_data_files", [])]
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: missing, state.json names it")
    return tuple(CorpusFile(folder / name, "arrow", (folder / name).stat().st_size) for name in names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    return body if isinstance(body, dict) else {}


def _read(file: CorpusFile, text_field: str) -> Iterator[tuple[RawDocument, int]]:
    """Yield the documents of one file, each with the bytes of the file read so far."""
    if file.kind == "text":
        yield RawDocument(str(file.path), file.path.read_bytes(), False), file.size
    elif file.kind.startswith("jsonl"):
        yield from _read_lines(file)
    else:
        yield from _read_column(file, text_field)


def _read_lines(file: CorpusFile) -> Iterator[tuple[RawDocument, int]]:
    with open(file.path, "rb") as raw:
        number = 0
        for block in _line_blocks(_decompressed(raw, file)):
            for line in block:
                number += 1
                if line.strip():
                    yield RawDocument(f"{file.path}:{number}", line, True), raw.tell()


def _line_blocks(blocks: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Cut a stream of bytes at newlines only (not at other characters that str.splitlines takes)."""
    rest: list[bytes] = []
    for block in blocks:
        head, newline, tail = block.rpartition(b"\n")
        if not newline:
            rest.append(block)
            continue
        yield (b"".join(rest) + head).split(b"\n")
        rest = [tail]
    if any(rest):
        yield [b"".join(rest)]


def _decompressed(raw: BinaryIO, file: CorpusFile) -> Iterator[bytes]:
    if file.kind == "jsonl":
        yield from iter(lambda: raw.read(READ_BYTES), b"")
    elif file.kind == "jsonl.gz":
        yield from _gunzip(raw, file.path)
    else:
        yield from _unzstd(raw, file.path)


def _gunzip(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(raw) as stream:
            yield from iter(lambda: stream.read(READ_BYTES), b"")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip: {error}") from error


def _unzstd(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    zstandard = _import("zstandard", path)
    frame = zstandard.ZstdDecompressor().decompressobj()
    started = False
    try:
        for block in iter(lambda: raw.read(READ_BYTES), b""):
            while block:
                if frame.eof:
                    frame, started = zstandard.ZstdDecompressor().decompressobj(), False
                started = True
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged zstd: {error}") from error
    # zstandard's own stream reader takes a truncated frame for the end of the file.
    if started and not frame.eof:
        raise DataError(f"{path}: damaged zstd: truncated after {path.stat().st_size} bytes")


def _read_column(file: CorpusFile, text_field: str) -> Iterator[tuple[RawDocument, int]]:
    pyarrow = _import("pyarrow", file.path)
    row = 0
    try:
        for table, share in _tables(file, text_field):
            for data in _column_bytes(pyarrow, table, text_field, file.path):
                if data is None:
                    raise DataError(f"{file.path}: row {row} has no text in {text_field!r}")
                yield RawDocument(f"{file.path}: row {row}", data, False), int(share * file.size)
                row += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{file.path}: damaged {file.kind} file: {error}") from error
    except OSError as error:
        if error.filename is None:  # pyarrow reports damaged contents as an OSError without a file
            raise DataError(f"{file.path}: damaged {file.kind} file: {error}") from error
        raise


def _tables(file: CorpusFile, text_field: str) -> Iterator[tuple[Any, float]]:
    """Yield pieces of a columnar file, each with the share of the file read after it."""
    import pyarrow
    import pyarrow.parquet

    if file.kind == "parquet":
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            rows, done = max(parquet.metadata.num_rows, 1), 0
            _check_column(parquet.schema_arrow, text_field, file.path)
            for table in parquet.iter_batches(batch_size=1024, columns=[text_field]):
                done += table.num_rows
                yield table, done / rows
        return
    with pyarrow.memory_map(str(file.path)) as source, pyarrow.ipc.open_stream(source) as reader:
        _check_column(reader.schema, text_field, file.path)
        for table in reader:
            yield table, source.tell() / max(file.size, 1)


def _check_column(schema: Any, text_field: str, path: Path) -> None:
    if text_field not in schema.names:
        raise DataError(
            f"{path}: no column {text_field!r} (--text_field); columns: {', '.join(schema.names)}"
        )


def _column_bytes(pyarrow: Any, table: Any, text_field: str, path: Path) -> list[bytes | None]:
    column = table.column(text_field)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    if not is_text:
        raise DataError(f"{path}: column {text_field!r} holds {column.type}, not text")
    data: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return data


def _import(name: str, path: Path) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise DataError(f"{path}: reading it needs {name}: pip install {name}") from error
