"""Every layout gives the same documents; every damage is an error that names the place."""

from __future__ import annotations

import io
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import layouts
from benchmarks.layouts import LAYOUTS, json_lines, tar_bytes, write_corpus
from data import corpus as corpus_module
from data import readers
from data.corpus import FileTree, open_corpus, stdlib_corpus
from data.documents import clean, parse_item
from data.manifest import DataError
from tests.data.conftest import make_texts, write_jsonl

TEXTS = make_texts(60)


def read(path: Path, text_field: str = "text", pattern: str = "*", cleaning: str = "none") -> list[str]:
    batches = open_corpus(path, text_field, pattern).batches()
    items = (item for batch in batches for item in batch.items)
    return [text for item in items for text, _ in parse_item(item, text_field, cleaning)]


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "DOCUMENTS_PER_SUBSET", 7)
    monkeypatch.setattr(layouts, "ROWS_PER_BATCH", 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_bytes", [1, 4096, 1 << 20])
def test_every_layout_gives_the_documents_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, batch_bytes: int
) -> None:
    """Catches documents lost or swapped at batch, read, frame, row-group, member or file boundaries."""
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", batch_bytes)
    for name in ("READ_BYTES", "ITEM_BYTES"):
        monkeypatch.setattr(readers, name, 97)
    path = write_corpus(tmp_path, layout, TEXTS, num_files=3)
    assert read(path) == TEXTS
    corpus = open_corpus(path)
    positions = [batch.position for batch in corpus.batches()]
    assert positions == sorted(positions)
    assert positions[-1] <= corpus.total_bytes
    assert corpus.count_rows() == (60 if layout in ("arrow", "hf_cache", "parquet") else None)


def test_archives_of_every_nesting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a layout of OpenWebText's archives that only some path reads."""
    folder = write_corpus(tmp_path, "subsets", TEXTS)
    subsets = sorted(folder.iterdir())
    monkeypatch.setattr(readers, "SMALL_ARCHIVE_BYTES", 0)  # each .xz is streamed by the reading process
    assert read(folder) == TEXTS
    members = [(f"openwebtext/{path.name}", path.read_bytes()) for path in subsets]
    for name, content in (
        ("hub/urlsf_subset00.tar", tar_bytes(members[:4])),
        ("hub/urlsf_subset01.tar", tar_bytes(members[4:])),
        ("two/o.tar.xz", lzma.compress(tar_bytes(members[:1])[:-1]) + lzma.compress(b"\0")),  # two streams
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read(tmp_path / "hub") == TEXTS
    assert read(tmp_path / "two") == TEXTS[:7]


def test_real_hugging_face_folders(tmp_path: Path) -> None:
    """Catches a reader that fits this test's idea of the library's files rather than the library's."""
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.shuffle(seed=0).save_to_disk(str(tmp_path / "shuffled"), num_shards=3)
    assert read(tmp_path / "shuffled") == dataset.shuffle(seed=0)["text"][:]
    datasets.DatasetDict(train=dataset).save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == TEXTS
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "two" / "train") == TEXTS
    with pytest.raises(DataError, match=r"several splits \(train, test\)"):
        open_corpus(tmp_path / "two")
    cached = datasets.Dataset.from_generator(
        lambda: ({"text": text} for text in TEXTS), cache_dir=str(tmp_path / "cache")
    )
    cached.map(lambda row: {"length": len(row["text"])})
    assert len(list((tmp_path / "cache").rglob("cache-*.arrow"))) == 1
    assert read(tmp_path / "cache") == TEXTS


def test_folder_is_sorted_and_hidden_files_are_skipped(tmp_path: Path) -> None:
    """Catches an order that depends on the file system, or that is not the one of whole paths."""
    names = ["b/1.txt", "a/2.txt", "a.txt", "a-b/3.txt", "c.txt", "a/deep/er.txt"]
    for name in [*names, ".git/x.txt", "a/.hidden.txt", "a/readme.md", "x.incomplete/a.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == sorted(names)
    assert read(tmp_path, pattern="a/*") == ["a/2.txt", "a/deep/er.txt"]


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    """Catches a corpus that is read twice in two formats, or test data that are trained on."""
    write_corpus(tmp_path, "parquet", TEXTS)
    write_jsonl(tmp_path / "parquet" / "again.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"mixed layouts: again\.jsonl is jsonl and train-.* is parquet"):
        open_corpus(tmp_path / "parquet")
    assert read(tmp_path / "parquet", pattern="*.parquet") == TEXTS
    with pytest.raises(DataError, match=r"again\.jsonl: --files \*\.parquet chooses among"):
        open_corpus(tmp_path / "parquet" / "again.jsonl", pattern="*.parquet")
    (tmp_path / "parquet" / "again.jsonl").unlink()
    train = tmp_path / "parquet" / "train-00000-of-00002.parquet"
    (tmp_path / "parquet" / "test-00000-of-00001.parquet").write_bytes(train.read_bytes())
    with pytest.raises(DataError, match=r"several data sets \(\./test, \./train\); choose one by --files"):
        open_corpus(tmp_path / "parquet")
    assert read(tmp_path / "parquet", pattern="train-*") == TEXTS
    train.unlink()
    with pytest.raises(DataError, match="train-00000-of-00002: missing; 1 of 2 files are there"):
        open_corpus(tmp_path / "parquet", pattern="train-*")


def test_blank_documents_are_kept_as_rows_and_line_ends_stay_inside(tmp_path: Path) -> None:
    """Catches rows that are not counted, and lines cut at U+2028 or a carriage return inside JSON strings."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "one\u2028\x0bline"}\r\n\n{"text": " \\n "}\n{"text": "last"}'.encode())
    with pytest.raises(DataError, match="not JSON"):  # a raw control character is not JSON
        read(path)
    path.write_bytes('{"text": "one\u2028\x85line"}\r\n\n{"text": " \\n "}\n{"text": "last"}'.encode())
    assert read(path) == ["one\u2028\x85line", " \n ", "last"]


def test_cleaning_is_that_of_the_published_rows() -> None:
    """Catches documents that differ from Hugging Face's OpenWebText, a cleaning that is not idempotent."""
    for text in ["\n\n\n\n", " a\n\n\nb\n\n\n\n\nc\n\nd \r\n\n\n", "\u3000x\n \n\n\ny\t", "", "plain"]:
        assert clean(text) == re.sub("\n\n\n+", "\n\n", text).strip()
        assert clean(clean(text)) == clean(text)


def test_other_text_field(tmp_path: Path) -> None:
    """Catches a field name that only some readers honour."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS, "content"))
    pq.write_table(pa.table({"content": TEXTS}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name, "content") == TEXTS
        with pytest.raises(DataError, match=r"'text'.*--text_field.*content"):
            read(tmp_path / name)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("txt", "jsonl")])
@pytest.mark.parametrize("keep", [0.0, 0.4, 0.98])
def test_truncated_files_are_errors(tmp_path: Path, layout: str, keep: float) -> None:
    """Catches decoders that take a truncated file for a shorter one (zstandard and tarfile do)."""
    path = write_corpus(tmp_path, layout, TEXTS)
    files = [file for file in sorted(path.iterdir()) if "cache-" not in file.name and file.suffix != ".json"]
    file = files[-1]
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    if keep == 0.0 and layout in ("jsonl.gz", "jsonl.zst"):
        return  # nothing at all is no frame, so no truncated one
    with pytest.raises(DataError, match=r"damaged|not a tar file") as caught:
        read(path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("layout", ["arrow", "parquet", "subsets", "jsonl.zst", "jsonl.gz"])
def test_damaged_bytes(tmp_path: Path, layout: str) -> None:
    """Catches library exceptions that escape without the file's name, and checksums that are not used."""
    path = write_corpus(tmp_path, layout, TEXTS)
    file = max(path.iterdir(), key=lambda file: file.stat().st_size)
    sound = file.read_bytes()
    for position in range(0, len(sound), max(1, len(sound) // 60)):
        file.write_bytes(sound[:position] + bytes([sound[position] ^ 0x55]) + sound[position + 1 :])
        try:
            found = read(path)
        except DataError as error:
            found = [str(error)]
        sound_or_seen = found == TEXTS or str(file) in found[0]
        assert sound_or_seen or layout in ("arrow", "parquet", "jsonl.zst")  # these have no checksum


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
        ("a.xz", lzma.compress(b"just a text, no archive"), r"a\.xz: damaged tar file: truncated"),
        ("a.xz", lzma.compress(b"x" * 1024), r"a\.xz: not a tar file, or a damaged one"),
        ("a.xz", lzma.compress(tar_bytes([("b.txt", b"\xff")])), r"a\.xz/b\.txt: not UTF-8"),
        ("a.xz", b"", r"a\.xz: damaged tar file: truncated"),
    ],
)
def test_bad_content_names_file_and_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Catches replacement characters, skipped lines and errors that do not say where."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_bad_rows_and_missing_paths(tmp_path: Path) -> None:
    """Catches None that turns into the text 'None', and bytes of a column that are not UTF-8."""
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match=r"null\.parquet: row 1 has no text"):
        read(tmp_path / "null.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "int.parquet")
    with pytest.raises(DataError, match="column 'text' holds int64, not text"):
        read(tmp_path / "int.parquet")
    table = pa.table({"text": pa.array([b"ok", b"\xff"]).view(pa.string())})
    with pa.ipc.new_file(str(tmp_path / "bad.arrow"), table.schema) as file:  # Arrow's file format
        file.write_table(table)
    with pytest.raises(DataError, match=r"bad\.arrow: row 1: not UTF-8: byte 0xff"):
        read(tmp_path / "bad.arrow")
    with pytest.raises(DataError, match="no such file"):
        open_corpus(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty corpus"):
        open_corpus(tmp_path / "empty")


def test_columns_of_other_encodings(tmp_path: Path) -> None:
    """Catches dictionary or large string columns that are refused or read as indices."""
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"text": pa.array(TEXTS).cast(kind)})
        with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
        assert read(tmp_path / "a.arrow") == TEXTS


MEASURE = """
import resource, sys
from data.corpus import open_corpus
from data.documents import parse_item
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
import pyarrow.parquet, zstandard, lzma
before, size = peak(), 0
for batch in open_corpus(sys.argv[1]).batches():
    for item in batch.items:
        size += sum(len(data) for _, data in parse_item(item, "text", "none"))
print(size >> 20, peak() - before)
"""


@pytest.mark.parametrize("layout", ["parquet", "arrow", "archive", "jsonl.zst"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, layout: str) -> None:
    """Catches a row group, a record batch or an archive that is held whole: files of 160 MB in one piece."""
    texts = [os.urandom(1024).hex() * 4 for _ in range(20_000)]
    path = tmp_path / "corpus"
    path.mkdir()
    if layout == "parquet":
        pq.write_table(pa.table({"text": texts}), path / "a.parquet", row_group_size=len(texts))
    elif layout == "arrow":
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(str(path / "a.arrow"), table.schema) as stream:
            stream.write_table(table, max_chunksize=len(texts) // 4)
    elif layout == "archive":
        members = [(f"{number}.txt", text.encode()) for number, text in enumerate(texts)]
        (path / "a.tar").write_bytes(tar_bytes(members))
    else:
        (path / f"a.{layout}").write_bytes(layouts.compressed(layout, json_lines(texts)))
    code = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    megabytes, grown = map(int, code.stdout.split())
    assert megabytes == 156
    assert grown < (80 if layout == "arrow" else 60)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_offsets_outside_the_data(tmp_path: Path, kind: pa.DataType) -> None:
    """Catches rows that are read from anywhere in memory, or a crash, because their offsets are damaged."""
    table = pa.table({"text": pa.array(TEXTS, kind)})
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)
    offsets = bytes(table.column("text").chunk(0).buffers()[1])[: 4 * len(TEXTS)]
    raw = path.read_bytes()
    assert raw.count(offsets) == 1
    place = raw.index(offsets) + len(offsets) // 2
    path.write_bytes(raw[:place] + b"\xff\xff\xff\x7f" + raw[place + 4 :])
    with pytest.raises(DataError, match=r"a\.arrow: damaged arrow file"):
        read(path)


def test_listing_a_folder_holds_no_names(tmp_path: Path) -> None:
    """Catches a tuple of all files, which millions of documents would turn into gigabytes."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("a")
    corpus = open_corpus(tmp_path)
    assert isinstance(corpus.files, FileTree)
    assert (corpus.num_files, corpus.total_bytes) == (3, 3)
    assert [file.path for file in corpus.files] == [file.path for file in corpus.files]


def test_state_json_that_names_a_missing_file(tmp_path: Path) -> None:
    """Catches a save_to_disk folder that is read without one of its files."""
    path = write_corpus(tmp_path, "arrow", TEXTS)
    next(path.glob("*.arrow")).unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00002\.arrow: missing, state\.json names it"):
        open_corpus(path)
    (path / "state.json").write_text(json.dumps({"_indices_data_files": [{"filename": "x"}]}))
    with pytest.raises(DataError, match="has an index mapping"):
        open_corpus(path)


def test_archive_of_no_texts_is_read_to_its_end() -> None:
    """Catches members that are taken for texts because of a folder's name."""
    stream = io.BytesIO(tar_bytes([("a.md", b"no text"), ("b.TXT", b"a text")]))
    assert [item.data for item in readers.archive_items(stream, "x")] == [b"a text"]


def test_standard_library_without_tests() -> None:
    """Catches test folders or installed packages in the demo's corpus."""
    files = list(stdlib_corpus().files)
    parts = {part for file in files for part in Path(file.path).parts[-3:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert len(files) > 300
    assert {"json", "asyncio"} <= parts
