"""Reading one file of a corpus: a stream of raw items, each with the bytes of the file read so far.

Little is done here, because one process reads for all: a line stays JSON, rows stay Arrow, a file that is
one document is only named. :mod:`data.documents` turns items into texts where they are tokenized.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from data.manifest import DataError
from data.tar import read_members

ITEM_BYTES = 1 << 20
READ_BYTES = 1 << 20
XZ_MAGIC = b"\xfd7zXZ\0"
SMALL_ARCHIVE_BYTES = 32 << 20
ARROW_FILE_MAGIC = b"ARROW1\0\0"


class RawItem(NamedTuple):
    """Some documents as they stand in a file."""

    where: str
    """File, and line, row or member; for error messages, and to read it if there is no ``data``."""
    kind: Literal["text", "json", "arrow", "archive"]
    """UTF-8 text, a line of JSON, rows as an Arrow stream, or a tar file of texts compressed by xz."""
    data: bytes | None
    """Its bytes; ``None``: the whole file named by ``where``, which is read where it is parsed."""
    size: int
    """Bytes, as they stand there."""
    first_row: int = 0
    """Row of the first document; counts for Arrow only."""


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file and how to read it."""

    path: str
    kind: str
    size: int


def read_items(file: CorpusFile, text_field: str) -> Iterator[tuple[RawItem, int]]:
    """Yield the items of one file in order, each with the bytes of the file read after it.

    Raises:
        DataError: damaged contents, or no column ``text_field``.
    """
    if file.kind == "text":
        yield RawItem(file.path, "text", None, file.size), file.size
    elif file.kind == "archive":
        yield from _read_archive(file)
    elif file.kind.startswith("jsonl"):
        yield from _read_lines(file)
    else:
        yield from _read_rows(file, text_field)


def count_rows(file: CorpusFile) -> int | None:
    """Return the number of documents as the file's own description says it, ``None`` if it has none.

    Raises:
        DataError: damaged contents.
    """
    if file.kind not in ("arrow", "parquet"):
        return None
    pyarrow = import_reader("pyarrow", file.path)
    with _named_errors(pyarrow, file):
        if file.kind == "parquet":
            with _open_parquet(file.path) as parquet:
                return int(parquet.metadata.num_rows)
        return sum(batch.num_rows for batch, _ in _arrow_batches(file.path))


def _read_archive(file: CorpusFile) -> Iterator[tuple[RawItem, int]]:
    if file.size <= SMALL_ARCHIVE_BYTES and not file.path.lower().endswith((".tar", ".tar.xz")):
        yield RawItem(file.path, "archive", None, file.size), file.size
        return
    with open(file.path, "rb") as raw:
        for item in archive_items(raw, file.path):
            yield item, raw.tell()


def archive_items(raw: BinaryIO, where: str) -> Iterator[RawItem]:
    """Yield the ``.txt`` and ``.xz`` members of a tar file, compressed by xz or not.

    Raises:
        DataError: damaged or truncated.
    """
    compressed = raw.read(len(XZ_MAGIC)) == XZ_MAGIC
    raw.seek(0)
    try:
        with _decompressing(raw, ".xz" if compressed else "") as stream:
            for name, data in read_members(stream, where, (".txt", ".xz")):
                kind: Literal["text", "archive"] = "text" if name.lower().endswith(".txt") else "archive"
                yield RawItem(f"{where}/{name}", kind, data, len(data))
            while stream.read(READ_BYTES):  # xz has its checksum at the end
                pass
    except (EOFError, lzma.LZMAError) as error:
        raise DataError(f"{where}: damaged xz: {error}") from error


def _read_lines(file: CorpusFile) -> Iterator[tuple[RawItem, int]]:
    with open(file.path, "rb") as raw:
        number = 0
        for block in _line_blocks(_decompressed(raw, file)):
            for line in block:
                number += 1
                if line.strip():
                    yield RawItem(f"{file.path}:{number}", "json", line, len(line)), raw.tell()


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
    if file.kind == "jsonl.zst":
        yield from _unzstd(raw, file)
        return
    try:
        with _decompressing(raw, file.kind) as stream:
            yield from iter(lambda: stream.read(READ_BYTES), b"")
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{file.path}: damaged {file.kind.removeprefix('jsonl.')}: {error}") from error


def _decompressing(raw: BinaryIO, kind: str) -> Any:
    if kind.endswith(".gz"):
        return gzip.open(raw)
    return lzma.open(raw) if kind.endswith(".xz") else contextlib.nullcontext(raw)


def _unzstd(raw: BinaryIO, file: CorpusFile) -> Iterator[bytes]:
    zstandard = import_reader("zstandard", file.path)
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
        raise DataError(f"{file.path}: damaged zstd: {error}") from error
    # zstandard's own stream reader takes a truncated frame for the end of the file.
    if started and not frame.eof:
        raise DataError(f"{file.path}: damaged zstd: truncated after {file.size} bytes")


def _read_rows(file: CorpusFile, text_field: str) -> Iterator[tuple[RawItem, int]]:
    pyarrow = import_reader("pyarrow", file.path)
    row = 0
    with _named_errors(pyarrow, file):
        batches = _parquet_batches(file, text_field) if file.kind == "parquet" else _arrow_batches(file.path)
        for batch, position in batches:
            check_column(batch.schema, text_field, file.path)
            column = _sound_column(pyarrow, batch.column(text_field))
            rows = max(1, len(column) * ITEM_BYTES // max(column.nbytes, 1))
            for start in range(0, len(column), rows):
                data = _to_stream(pyarrow, column.slice(start, rows), text_field)
                yield RawItem(file.path, "arrow", data, len(data), row + start), position
            row += len(column)


@contextlib.contextmanager
def _named_errors(pyarrow: Any, file: CorpusFile) -> Iterator[None]:
    try:
        yield
    except pyarrow.ArrowException as error:
        raise DataError(f"{file.path}: damaged {file.kind} file: {error}") from error
    except OSError as error:
        if error.filename is None:  # pyarrow reports damaged contents as an OSError without a file
            raise DataError(f"{file.path}: damaged {file.kind} file: {error}") from error
        raise


def _open_parquet(path: str) -> Any:
    import pyarrow.parquet

    # With pre-buffering a whole row group, which may be the whole file, would stay in memory.
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)


def _parquet_batches(file: CorpusFile, text_field: str) -> Iterator[tuple[Any, int]]:
    with _open_parquet(file.path) as parquet:
        check_column(parquet.schema_arrow, text_field, file.path)
        total, done = max(parquet.metadata.num_rows, 1), 0
        rows = max(1, min(1024, total * ITEM_BYTES // max(file.size, 1)))
        for batch in parquet.iter_batches(batch_size=rows, columns=[text_field], use_threads=False):
            done += batch.num_rows
            yield batch, file.size * done // total


def _arrow_batches(path: str) -> Iterator[tuple[Any, int]]:
    """Yield the record batches of an Arrow stream or file without copying them."""
    import pyarrow

    with open(path, "rb") as raw:
        if not raw.read(1):
            raise OSError("the file is empty")
        view = mmap.mmap(raw.fileno(), 0, prot=mmap.PROT_READ)
    source = pyarrow.BufferReader(pyarrow.py_buffer(view))
    if view[: len(ARROW_FILE_MAGIC)] == ARROW_FILE_MAGIC:
        reader = pyarrow.ipc.open_file(source)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        batches = iter(pyarrow.ipc.open_stream(source))
    position = 0
    for batch in batches:
        position = max(position, source.tell())  # a file is read by its footer, in any order
        yield batch, position
        # Pages that were read stay resident as long as the file is mapped; it may be the whole corpus.
        view.madvise(mmap.MADV_DONTNEED)


def _sound_column(pyarrow: Any, column: Any) -> Any:
    """Return a column of binary values whose offsets lie inside its data; others would be read anywhere."""
    column.validate()
    if pyarrow.types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.cast(column.type.value_type)
    is_large = pyarrow.types.is_large_string(column.type)
    column = column.view(pyarrow.large_binary() if is_large else pyarrow.binary())
    column.validate(full=True)
    return column


def _to_stream(pyarrow: Any, column: Any, name: str) -> bytes:
    batch = pyarrow.record_batch([column], names=[name])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def check_column(schema: Any, text_field: str, path: str | Path) -> None:
    """Raise DataError if the column is missing or does not hold text."""
    import pyarrow

    if text_field not in schema.names:
        raise DataError(
            f"{path}: no column {text_field!r} (--text_field); columns: {', '.join(schema.names)}"
        )
    kind = schema.field(text_field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column {text_field!r} holds {kind}, not text")


def import_reader(name: str, path: str) -> Any:
    """Import a library that only some formats need."""
    try:
        return __import__(name)
    except ImportError as error:
        raise DataError(f"{path}: reading it needs {name}: pip install {name}") from error
