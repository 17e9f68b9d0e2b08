"""Raw items to texts: what is done to a document before it is tokenized."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from data.manifest import DataError
from data.readers import RawItem, archive_items

CLEANINGS = ("none", "openwebtext")
BLANK_LINES = re.compile("\n\n\n+")


def parse_item(item: RawItem, text_field: str, cleaning: str) -> Iterator[tuple[str, bytes]]:
    """Yield each document's text and its UTF-8 bytes, blank ones too, in order.

    Args:
        text_field: JSON key or column of the text.
        cleaning: ``none``, or ``openwebtext``, see :func:`clean`.

    Raises:
        DataError: not UTF-8, not JSON, no text where ``text_field`` says, or a damaged archive; names the
            file and the place.
    """
    for where, text in _texts(item, text_field):
        if cleaning == "openwebtext":
            text = clean(text)
        try:
            yield text, text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: not UTF-8: lone surrogate at character {error.start}") from error


def clean(text: str) -> str:
    """Return the text as OpenWebText's builder for Hugging Face publishes it.

    At most one empty line in a row, no white space at either end; twice is the same as once.
    """
    return (BLANK_LINES.sub("\n\n", text) if "\n\n\n" in text else text).strip()


def _texts(item: RawItem, text_field: str) -> Iterator[tuple[str, str]]:
    if item.kind == "arrow":
        yield from _parse_rows(item, text_field)
        return
    data = Path(item.where).read_bytes() if item.data is None else item.data
    if item.kind == "archive":
        for member in archive_items(io.BytesIO(data), item.where):
            yield from _texts(member, text_field)
        return
    text = _decode(item.where, data)
    yield item.where, _parse_json(item.where, text, text_field) if item.kind == "json" else text


def _decode(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise DataError(f"{where}: not UTF-8: byte 0x{byte:02x} at offset {error.start}") from error


def _parse_json(where: str, line: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        keys = ", ".join(sorted(row)) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        raise DataError(f"{where}: no string in field {text_field!r} (--text_field); fields: {keys}")
    text: str = row[text_field]
    return text


def _parse_rows(item: RawItem, text_field: str) -> Iterator[tuple[str, str]]:
    import pyarrow

    with pyarrow.ipc.open_stream(item.data) as stream:
        column = stream.read_all().column(text_field)
    for row, data in enumerate(column.to_pylist(), item.first_row):
        where = f"{item.where}: row {row}"
        if data is None:
            raise DataError(f"{where} has no text in {text_field!r}")
        yield where, _decode(where, data)
