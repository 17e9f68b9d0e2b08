"""Every format gives the same documents; every damage is an error that names the place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data import corpus as corpus_module
from data.corpus import open_corpus, parse_batch, stdlib_corpus
from data.manifest import DataError
from tests.data.conftest import make_texts, write_jsonl

TEXTS = make_texts(60)


def read(path: Path, text_field: str = "text") -> list[str]:
    corpus = open_corpus(path, text_field)
    return [text for batch in corpus.batches() for text in parse_batch(batch, text_field)]


def write(path: Path, kind: str, texts: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts).encode()
    table = pa.table({"id": list(range(len(texts))), field: texts})
    path = path / f"corpus.{kind}"
    if kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines[:500]) + gzip.compress(lines[500:]))  # two members
    elif kind == "jsonl.zst":
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines[:500]) + compress(lines[500:]))  # two frames
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
    elif kind == "hf":
        path.mkdir()
        half = len(texts) // 2
        for number, part in enumerate((table.slice(0, half), table.slice(half))):
            with pa.ipc.new_stream(str(path / f"data-{number}.arrow"), table.schema) as stream:
                stream.write_table(part, max_chunksize=8)
        files = [{"filename": f"data-{number}.arrow"} for number in range(2)]
        (path / "state.json").write_text(json.dumps({"_data_files": files}))
    else:
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number:04d}.txt").write_bytes(text.encode())
    return path


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "hf", "txt"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_bytes", [1, 4096, 1 << 20])
def test_every_format_gives_the_documents_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, batch_bytes: int
) -> None:
    """Catches documents lost or swapped at batch, read, frame, row-group or file boundaries."""
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(corpus_module, "READ_BYTES", 97)
    path = write(tmp_path, kind, TEXTS)
    assert read(path) == TEXTS
    batches = list(open_corpus(path).batches())
    positions = [batch.position for batch in batches]
    assert positions == sorted(positions)
    assert positions[-1] <= open_corpus(path).total_bytes
    assert len(batches) == (60 if batch_bytes == 1 else len(batches))


def test_real_hugging_face_folder(tmp_path: Path) -> None:
    """Catches a reader that fits this test's idea of save_to_disk rather than the library's."""
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.shuffle(seed=0).save_to_disk(str(tmp_path / "shuffled"), num_shards=3)
    assert read(tmp_path / "shuffled") == dataset.shuffle(seed=0)["text"][:]
    datasets.DatasetDict(train=dataset).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "splits" / "train") == TEXTS
    with pytest.raises(DataError, match=r"several splits \(train\)"):
        open_corpus(tmp_path / "splits")


def test_folder_is_sorted_and_hidden_files_are_skipped(tmp_path: Path) -> None:
    """Catches an order that depends on the file system."""
    for name in ("b/1.txt", "a/2.txt", "c.txt", ".git/x.txt", "a/.hidden.txt", "a/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / "b" / "0.jsonl", ["zero"])
    assert read(tmp_path) == ["a/2.txt", "zero", "b/1.txt", "c.txt"]


def test_blank_documents_are_dropped_and_line_ends_stay_inside(tmp_path: Path) -> None:
    """Catches empty documents, and lines cut at U+2028 or a carriage return inside JSON strings."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "one\u2028\x0bline"}\r\n\n{"text": " \\n "}\n{"text": "last"}'.encode())
    with pytest.raises(DataError, match="not JSON"):  # a raw control character is not JSON
        read(path)
    path.write_bytes('{"text": "one\u2028\x85line"}\r\n\n{"text": " \\n "}\n{"text": "last"}'.encode())
    assert read(path) == ["one\u2028\x85line", "last"]


def test_other_text_field(tmp_path: Path) -> None:
    """Catches a field name that only some readers honour."""
    for kind in ("jsonl", "parquet"):
        path = write(tmp_path, kind, TEXTS, field="content")
        assert read(path, "content") == TEXTS
        with pytest.raises(DataError, match=r"'text'.*--text_field.*content"):
            read(path)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "hf"])
@pytest.mark.parametrize("keep", [0.4, 0.98])
def test_truncated_files_are_errors(tmp_path: Path, kind: str, keep: float) -> None:
    """Catches decoders that take a truncated file for a shorter one (zstandard's stream reader does)."""
    path = write(tmp_path, kind, TEXTS)
    file = path / "data-1.arrow" if kind == "hf" else path
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(DataError, match="damaged") as caught:
        read(path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", r"a\.txt: not UTF-8: byte 0xff at offset 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl:2: not UTF-8: byte 0xe9 at offset 10"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: not UTF-8: lone surrogate"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": 3, "b": 1}\n', r"a\.jsonl:1: no string in field 'text'.*fields: b, text"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: no string in field 'text'"),
        ("a.csv", b"a,b\n", r"a\.csv: unknown format; readable are \.txt"),
    ],
)
def test_bad_content_names_file_and_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Catches replacement characters, skipped lines and errors that do not say where."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_nulls_wrong_columns_and_missing_paths(tmp_path: Path) -> None:
    """Catches None that turns into the text 'None'."""
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match=r"null\.parquet: row 1 has no text"):
        read(tmp_path / "null.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "int.parquet")
    with pytest.raises(DataError, match="column 'text' holds int64, not text"):
        read(tmp_path / "int.parquet")
    with pytest.raises(DataError, match="no such file"):
        open_corpus(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty corpus"):
        open_corpus(tmp_path / "empty")


def test_standard_library_without_tests() -> None:
    """Catches test folders or installed packages in the demo's corpus."""
    files = stdlib_corpus().files
    parts = {part for file in files for part in file.path.parts[-3:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert len(files) > 300
    assert {"json", "asyncio"} <= parts
