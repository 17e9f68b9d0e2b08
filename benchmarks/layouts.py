"""Writes documents in every layout that data.prepare reads."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

LAYOUTS = (
    "arrow",
    "hf_cache",
    "parquet",
    "archive",
    "subsets",
    "jsonl",
    "jsonl.gz",
    "jsonl.xz",
    "jsonl.zst",
    "txt",
)
DOCUMENTS_PER_SUBSET = 400
ROWS_PER_BATCH = 1000


def write_corpus(folder: Path, layout: str, texts: Sequence[str], *, num_files: int = 2) -> Path:
    """Write a corpus into ``folder/layout`` and return what ``--input`` takes.

    Args:
        folder: exists; the layout's name is made below it.
        layout: one of LAYOUTS. ``arrow`` is a ``save_to_disk`` folder, ``hf_cache`` a folder of numbered
            Arrow files, ``subsets`` OpenWebText's folder of ``.xz`` files, ``archive`` the tar file of them.
        texts: the documents.
        num_files: into how many files they go, where there are several; one line feed or row never spans two.

    Raises:
        ValueError: another layout.
    """
    target = folder / layout
    target.mkdir()
    size = max(1, -(-len(texts) // num_files))
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    if layout in ("arrow", "hf_cache"):
        _write_arrow(target, parts, saved=layout == "arrow")
    elif layout == "parquet":
        _write_parquet(target, parts)
    elif layout == "subsets":
        for name, content in _subsets(texts):
            (target / name).write_bytes(content)
    elif layout == "archive":
        members = [(f"openwebtext/{name}", content) for name, content in _subsets(texts)]
        (target / "openwebtext.tar.xz").write_bytes(lzma.compress(tar_bytes(members), preset=0))
    elif layout == "txt":
        for number, text in enumerate(texts):
            (target / f"{number:07d}.txt").write_bytes(text.encode())
    elif layout.startswith("jsonl"):
        for number, part in enumerate(parts):
            (target / f"part-{number:03d}.{layout}").write_bytes(compressed(layout, json_lines(part)))
    else:
        raise ValueError(f"layout={layout} is not one of {', '.join(LAYOUTS)}")
    return target


def json_lines(texts: Sequence[str], field: str = "text") -> bytes:
    """Return one line of JSON per text."""
    return "".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def compressed(layout: str, content: bytes) -> bytes:
    """Compress as the layout's name says; in two frames, which every format allows."""
    import zstandard

    methods: dict[str, Callable[[bytes], bytes]] = {
        "jsonl": bytes,
        "jsonl.gz": gzip.compress,
        "jsonl.xz": lzma.compress,
        "jsonl.zst": zstandard.ZstdCompressor().compress,
    }
    method = methods[layout]
    half = len(content) // 2
    return method(content[:half]) + method(content[half:])


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    """Return a tar file of the members, long names included, and a folder before them."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        folder = tarfile.TarInfo("folder.txt/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return stream.getvalue()


def _subsets(texts: Sequence[str]) -> list[tuple[str, bytes]]:
    """Return OpenWebText's inner files: tar files of texts, compressed by xz."""
    found = []
    for start in range(0, len(texts), DOCUMENTS_PER_SUBSET):
        part = texts[start : start + DOCUMENTS_PER_SUBSET]
        members = [(f"{start + number:07d}-made.txt", text.encode()) for number, text in enumerate(part)]
        name = f"urlsf_subset00-{start // DOCUMENTS_PER_SUBSET + 1:05d}_data.xz"
        found.append((name, lzma.compress(tar_bytes(members))))
    return found


def _write_arrow(target: Path, parts: Sequence[Sequence[str]], *, saved: bool) -> None:
    import pyarrow

    names = [
        f"data-{number:05d}-of-{len(parts):05d}.arrow" if saved else
        f"openwebtext-train-{number:05d}-of-{len(parts):05d}.arrow"
        for number in range(len(parts))
    ]  # fmt: skip
    for name, part in zip(names, parts, strict=True):
        table = pyarrow.table({"text": part})
        with pyarrow.ipc.new_stream(str(target / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=ROWS_PER_BATCH)
    if saved:
        state = {"_data_files": [{"filename": name} for name in names]}
        (target / "state.json").write_text(json.dumps(state))
    else:  # what a cache holds beside the data
        (target / "dataset_info.json").write_text("{}")
        (target / "cache-0123456789abcdef.arrow").write_bytes(b"result of a map")


def _write_parquet(target: Path, parts: Sequence[Sequence[str]]) -> None:
    import pyarrow
    import pyarrow.parquet

    for number, part in enumerate(parts):
        name = f"train-{number:05d}-of-{len(parts):05d}.parquet"
        table = pyarrow.table({"text": part, "id": list(range(len(part)))})
        pyarrow.parquet.write_table(table, target / name, row_group_size=ROWS_PER_BATCH)
