"""Shards depend on the corpus and the arguments only: not on processes, kills or leftovers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data.manifest import DataError, Manifest, read_manifest
from data.prepare import PrepareOptions, main, prepare
from data.shard_folder import ShardFolder
from data.split import HashSplit
from data.tokenizer import load_tokenizer
from tests.data.conftest import NUM_DOCUMENTS, make_texts, read_tokens, write_jsonl

ARGUMENTS = [
    "--vocab_size",
    "320",
    "--val_fraction",
    "0.1",
    "--chunk_tokens",
    "256",
    "--chunks_per_shard",
    "4",
]


def run(corpus: Path, out: Path, *more: str) -> int:
    return main(["--input", str(corpus), "--out", str(out), "--processes", "1", *ARGUMENTS, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tokens_are_the_documents_in_order(shard_folder: Path, manifest: Manifest) -> None:
    """Catches lost, doubled or swapped documents, a missing end-of-text, a wrong split."""
    tokenizer = load_tokenizer(shard_folder)
    texts = make_texts(NUM_DOCUMENTS)
    hash_split = HashSplit(2357, 0.1)
    for split, wanted in (("train", False), ("val", True)):
        chosen = [text for n, text in enumerate(texts) if (hash_split.place(n, n) is not None) is wanted]
        ids = [token for text in chosen for token in (*tokenizer.encode(text), tokenizer.eot_id)]
        assert read_tokens(shard_folder, manifest, split).tolist() == ids
        assert manifest.splits[split].documents == len(chosen)
        assert manifest.splits[split].tokens == len(ids)


def test_chunks_overlap_by_one_token_and_are_full(manifest: Manifest) -> None:
    """Catches a chunk without its last label, and short chunks in the middle."""
    for split in manifest.splits.values():
        sizes = [chunk.tokens for _, chunk in split.chunks]
        assert sizes[:-1] == [257] * (len(sizes) - 1)
        assert 2 <= sizes[-1] <= 257
        assert sum(sizes) - (len(sizes) - 1) == split.tokens


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_last_chunk_at_the_boundary(tmp_path: Path, shard_folder: Path, extra: int) -> None:
    """Catches a last chunk of one token, and a last token that is lost."""
    eot = load_tokenizer(shard_folder).eot_id
    from data.shards import ShardLayout, SplitWriter

    writer = SplitWriter(tmp_path, "train", ShardLayout("uint16", 16, 2))
    tokens = np.arange(32 + extra) % 7 + eot
    writer.append(tokens, 1)
    split = writer.finish()
    assert [chunk.tokens for _, chunk in split.chunks] == {0: [17, 16], 1: [17, 17], 2: [17, 17, 2]}[extra]
    assert not list(tmp_path.glob("*.part"))


def test_shards_are_plain_webdataset_tars(shard_folder: Path, manifest: Manifest) -> None:
    """Catches tar files that only the project's own reader understands."""
    urls = [str(shard_folder / shard.name) for shard in manifest.splits["train"].shards]
    payloads = [sample["tokens"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert [len(payload) // 2 for payload in payloads] == [
        c.tokens for _, c in manifest.splits["train"].chunks
    ]


def test_same_bytes_for_any_number_of_processes(
    corpus_file: Path, shard_folder: Path, tmp_path: Path
) -> None:
    """Catches results consumed in the order in which processes finish."""
    code = (
        "import sys; from data import corpus, prepare; corpus.BATCH_BYTES = 2048;"
        "sys.exit(prepare.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--input", str(corpus_file), *ARGUMENTS]
    subprocess.run([*command, "--processes", "3", "--out", str(tmp_path / "out")], check=True)
    assert contents(tmp_path / "out") == contents(shard_folder)


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from data import corpus, manifest, prepare, shards
corpus.BATCH_BYTES = 700
left = int(sys.argv[3])
def dying(function):
    def wrapper(*args, **kwargs):
        global left
        for moment in (lambda: None, lambda: function(*args, **kwargs)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = moment()
        return result
    return wrapper
for name in ("replace", "fsync"):  # every step that makes something durable or visible
    setattr(os, name, dying(getattr(os, name)))
Path.unlink = dying(Path.unlink)
shards.SplitWriter._write_chunk = dying(shards.SplitWriter._write_chunk)
prepare.prepare(prepare.PrepareOptions(input=Path(sys.argv[1]), out=Path(sys.argv[2]), vocab_size=320,
    val_fraction=0.1, chunk_tokens=256, chunks_per_shard=4, checkpoint_s=0.0))
"""


def test_killed_at_any_moment_then_continued_gives_the_same_bytes(
    corpus_file: Path, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a kill between any two durable steps that loses, doubles or mixes tokens."""
    out = tmp_path / "out"
    generator = random.Random(0)
    # Kill again and again, each time a little further on, so that continued runs are killed too.
    kills = [1, 2, 3, 4, 5, 6, 9, 14, 17, *(generator.randint(20, 120) for _ in range(6))]
    killed = 0
    for count in kills:
        command = [sys.executable, "-c", KILLED_RUN, str(corpus_file), str(out), str(count)]
        code = subprocess.run(command, capture_output=True, text=True).returncode
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
    assert killed >= 12
    monkeypatch.setattr("data.corpus.BATCH_BYTES", 700)
    assert run(corpus_file, out) == 0
    assert contents(out) == contents(shard_folder)


def test_killed_while_several_processes_work(tmp_path: Path) -> None:
    """Catches worker processes that outlive a killed run, and progress that is lost."""
    corpus = tmp_path / "corpus.jsonl"
    write_jsonl(corpus, make_texts(8000))
    arguments = ["--input", str(corpus), *ARGUMENTS, "--processes", "2"]
    command = [sys.executable, "-m", "data.prepare", *arguments, "--out", str(tmp_path / "a")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "a").glob("train-*.tar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert not (tmp_path / "a" / "manifest.json").exists()
    assert len(children) >= 2
    while any(_alive(int(pid)) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(int(pid)) for pid in children)
    for name in ("a", "b"):
        assert main([*arguments[:-1], "1", "--out", str(tmp_path / name)]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_finished_folder(
    corpus_file: Path, shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Catches a second run that writes again, or replaces other data without being told to."""
    out = tmp_path / "out"
    assert run(corpus_file, out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(corpus_file, out) == 0
    assert "already prepared" in capsys.readouterr().out
    assert run(corpus_file, out, "--seed", "1") == 2
    assert "seed=2357, asked for 1; --overwrite replaces it" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert run(corpus_file, out, "--seed", "1", "--overwrite") == 0
    assert read_manifest(out).recipe["seed"] == 1
    assert run(corpus_file, out, "--overwrite") == 0
    assert contents(out) == contents(shard_folder)


def test_foreign_folder_is_left_alone(
    corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Catches --overwrite or a retry that deletes files of somebody else."""
    (tmp_path / "train-000000.tar").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert run(corpus_file, tmp_path, *more) == 2
        assert "not empty and not written by data.prepare" in capsys.readouterr().err
    assert contents(tmp_path) == {"train-000000.tar": b"mine"}


def test_changed_corpus_is_refused(tmp_path: Path, shard_folder: Path) -> None:
    """Catches a continued run that joins two corpora; text that was not read yet may change."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = make_texts(40)
    for number, text in enumerate(texts):
        (corpus / f"{number:03d}.txt").write_text(text * 5)
    (corpus / "030.txt").write_bytes(b"\xff")
    options = PrepareOptions(
        input=corpus, out=tmp_path / "out", tokenizer=shard_folder, val_fraction=0.2,
        chunk_tokens=64, chunks_per_shard=2, checkpoint_s=0.0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.corpus.BATCH_BYTES", 1)
        with pytest.raises(DataError, match=r"030\.txt: not UTF-8"):
            prepare(options)
        (corpus / "030.txt").write_text("mended")
        (corpus / "002.txt").write_text("changed")
        with pytest.raises(DataError, match="the corpus changed since the interrupted run"):
            prepare(options)
        (corpus / "002.txt").write_text(texts[2] * 5)
        assert sum(split.documents for split in prepare(options).splits.values()) == 40


def test_damaged_unfinished_shard_is_refused(corpus_file: Path, tmp_path: Path) -> None:
    """Catches a continued run that builds on a part that was changed or cut meanwhile."""
    out = tmp_path / "out"
    for damage in ("flip", "cut"):
        command = [sys.executable, "-c", KILLED_RUN, str(corpus_file), str(out), "60"]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
        state = json.loads((out / "progress.json").read_bytes())["train"]
        assert state["open_shard"]["bytes"] > 0
        path = next(out.glob("train-*.tar.part"))
        raw = bytearray(path.read_bytes())
        raw[600] ^= 1
        path.write_bytes(raw if damage == "flip" else raw[:300])
        with pytest.raises(DataError, match="changed since the interrupted run; --overwrite starts again"):
            prepare(_options(corpus_file, out))
        prepare(_options(corpus_file, out, overwrite=True))
        ShardFolder(out, {}).discard()


def _options(corpus: Path, out: Path, **more: object) -> PrepareOptions:
    settings = {"vocab_size": 320, "val_fraction": 0.1, "chunk_tokens": 256, "chunks_per_shard": 4, **more}
    return PrepareOptions(input=corpus, out=out, **settings)  # type: ignore[arg-type]


def test_second_run_at_the_same_time_is_refused(corpus_file: Path, tmp_path: Path) -> None:
    """Catches two runs that write the same files."""
    with (
        ShardFolder(tmp_path / "out", {}).locked(),
        pytest.raises(DataError, match=r"another data\.prepare is writing it"),
    ):
        prepare(_options(corpus_file, tmp_path / "out"))


def test_worker_that_dies_is_an_error(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that waits for ever after the system killed one of its processes."""
    monkeypatch.setattr("data.workers._serve", _die)
    with pytest.raises(DataError, match="a tokenizing process was killed"):
        prepare(_options(corpus_file, tmp_path / "out", processes=2))


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


BAD_ARGUMENTS = [
    (["--vocab_size", "65536"], "vocabulary of 65536 is over 65535: give --dtype uint32"),
    (["--val_fraction", "0"], "--val_fraction 0.0 must lie between 0 and 1"),
    (["--val_fraction", "1e-9"], "none of 300 documents falls into val with --val_fraction 1e-09"),
    (["--chunk_tokens", "0"], "--chunk_tokens 0 must be at least 1"),
    (["--vocab_size", "100"], "--vocab_size 100 is below 257"),
    (["--text_field", "body"], "no string in field 'body' (--text_field); fields: text"),
]


@pytest.mark.parametrize(("more", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    """Catches tracebacks and half-written folders."""
    assert run(corpus_file, tmp_path / "out", *more) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize(("content", "message"), [(b"\xff", "not UTF-8"), (b" \n", "empty corpus")])
def test_bad_corpus_leaves_nothing(
    tmp_path: Path, shard_folder: Path, with_tokenizer: bool, content: bytes, message: str
) -> None:
    """Catches an unfinished folder after bad input."""
    (tmp_path / "a.txt").write_bytes(content)
    more = {"tokenizer": shard_folder, "vocab_size": None} if with_tokenizer else {}
    with pytest.raises(DataError, match=message):
        prepare(_options(tmp_path / "a.txt", tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_uint32_shards(corpus_file: Path, shard_folder: Path, tmp_path: Path) -> None:
    """Catches offsets or payloads that assume two bytes per token."""
    prepare(_options(corpus_file, tmp_path / "out", dtype="uint32"))
    from data.verify import verify_folder

    summaries, problems = verify_folder(tmp_path / "out")
    assert (len(summaries), problems) == (2, [])
    wide, narrow = read_manifest(tmp_path / "out"), read_manifest(shard_folder)
    assert wide.splits["train"].tokens == narrow.splits["train"].tokens
