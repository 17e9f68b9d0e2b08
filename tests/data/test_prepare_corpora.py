"""Preparing corpora as people have them: layouts, the published split, presets, kills, a full disk."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import layouts
from benchmarks.layouts import LAYOUTS, write_corpus
from data import fast_bpe
from data.manifest import DataError, Manifest, read_manifest
from data.prepare import PrepareOptions, main, prepare
from data.presets import PRESETS, vocabulary_sha256
from data.split import HuggingFaceSplit
from data.tokenizer import load_tokenizer
from tests.data.conftest import make_texts, read_tokens, write_jsonl

TEXTS = [*make_texts(120), "", " \n\n", *make_texts(180, seed=1)]


def options(corpus: Path, out: Path, tokenizer: Path, **more: object) -> PrepareOptions:
    settings: dict[str, object] = {"val_fraction": 0.05, "chunk_tokens": 256, "chunks_per_shard": 4, **more}
    return PrepareOptions(input=corpus, out=out, tokenizer=tokenizer, **settings)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> tuple[Path, Manifest]:
    """Return the shards of TEXTS with the published split, made by the reference encoder."""
    folder = tmp_path_factory.mktemp("reference")
    corpus = write_corpus(folder, "jsonl", TEXTS)
    made = prepare(options(corpus, folder / "out", shard_folder, split="huggingface", encoder="reference"))
    return folder / "out", made


def test_splits_are_the_published_documents(reference: tuple[Path, Manifest], shard_folder: Path) -> None:
    """Catches blank rows that are not counted, validation in another order, documents in both splits."""
    folder, manifest = reference
    tokenizer = load_tokenizer(shard_folder)
    split = HuggingFaceSplit(2357, 0.05, len(TEXTS))
    places = {row: split.place(row, 0) for row in range(len(TEXTS)) if TEXTS[row].strip()}
    val = sorted((place, row) for row, place in places.items() if place is not None)
    wanted = {"val": [row for _, row in val], "train": [row for row in places if places[row] is None]}
    assert wanted["val"] != sorted(wanted["val"])
    for name, rows in wanted.items():
        ids = [token for row in rows for token in (*tokenizer.encode(TEXTS[row]), tokenizer.eot_id)]
        assert read_tokens(folder, manifest, name).tolist() == ids
        assert manifest.splits[name].documents == len(rows)
    assert manifest.recipe["rows"] == len(TEXTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_shards(
    tmp_path: Path, reference: tuple[Path, Manifest], shard_folder: Path, layout: str
) -> None:
    """Catches a layout that loses a document or moves the split, and a fast encoder with other ids."""
    folder, wanted = reference
    corpus = write_corpus(tmp_path, layout, TEXTS, num_files=3)
    manifest = prepare(options(corpus, tmp_path / "out", shard_folder, split="huggingface"))
    assert shards(tmp_path / "out") == shards(folder)
    assert manifest.recipe["corpus_sha256"] == wanted.recipe["corpus_sha256"]
    assert not (tmp_path / "out" / "val.spool").exists()


def arguments(corpus: Path, out: Path, tokenizer: Path) -> list[str]:
    return ["--input", str(corpus), "--out", str(out), "--tokenizer", str(tokenizer), "--processes", "1"]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_preset(
    tmp_path: Path,
    shard_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a preset that forgets a setting, takes a part of the corpus, or another tokenizer."""
    texts = ["kept\n\n\n\napart ", *make_texts(299)]
    corpus, out = write_corpus(tmp_path, "subsets", texts), tmp_path / "out"
    command = [*arguments(corpus, out, shard_folder), "--preset", "openwebtext"]
    assert main(command) == 2
    assert "tokenizer.json: not the preset's tokenizer: its vocabulary hashes to" in one_error(capsys)
    sha256 = vocabulary_sha256(load_tokenizer(shard_folder))
    preset = replace(PRESETS["openwebtext"], vocabulary_sha256=sha256)
    monkeypatch.setitem(PRESETS, "openwebtext", preset)
    assert main(command) == 2
    assert "has 300 documents, the preset's corpus 8,013,769; leave --preset out" in one_error(capsys)
    assert not out.exists()
    monkeypatch.setitem(PRESETS, "openwebtext", replace(preset, rows=300))
    assert main(command) == 0
    manifest = read_manifest(out)
    assert (manifest.recipe["seed"], manifest.recipe["val_fraction"]) == (2357, 0.0005)
    assert manifest.splits["val"].documents == 1
    tokenizer = load_tokenizer(out)
    tokens = read_tokens(out, manifest, "train")
    assert tokenizer.decode(tokens[: tokens.tolist().index(tokenizer.eot_id)]) == "kept\n\napart"
    assert main([*command, "--seed", "1"]) == 2
    assert "seed=2357, asked for 1" in one_error(capsys)
    assert main([*command[:-1], "openwebtxt"]) == 2
    assert one_error(capsys) == "error: --preset openwebtxt is unknown; there is openwebtext"


@pytest.mark.parametrize("layout", ["parquet", "archive", "jsonl.zst"])
def test_truncated_corpus_leaves_nothing(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """Catches an unfinished folder, or a traceback, after a corpus that ends too early."""
    corpus = write_corpus(tmp_path, layout, TEXTS)
    file = sorted(corpus.iterdir())[-1]
    file.write_bytes(file.read_bytes()[:-30])
    for more in ([], ["--split", "huggingface"]):
        assert main([*arguments(corpus, tmp_path / "out", shard_folder), *more]) == 2
        assert f"{file}: damaged" in one_error(capsys)
        assert not (tmp_path / "out").exists()


def test_encoders_that_disagree_on_the_corpus(
    tmp_path: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a self-check that looks at built-in texts only, and a fallback that nobody asked for."""
    monkeypatch.setattr(fast_bpe, "SAMPLES", ())
    monkeypatch.setattr(fast_bpe, "PATTERN", r"\s+|\S+")
    corpus = write_corpus(tmp_path, "jsonl", TEXTS)
    with pytest.raises(DataError, match=r"part-000\.jsonl:1: the fast encoder gives other ids than the ref"):
        prepare(options(corpus, tmp_path / "out", shard_folder))
    assert not (tmp_path / "out").exists()
    prepare(options(corpus, tmp_path / "out", shard_folder, encoder="reference"))


def test_folders_of_earlier_versions(tmp_path: Path, shard_folder: Path) -> None:
    """Catches a finished folder that is refused because its recipe knows no split, and mixed progress."""
    corpus = tmp_path / "a.jsonl"
    write_jsonl(corpus, TEXTS)
    run = options(corpus, tmp_path / "out", shard_folder)
    prepare(run)
    path = tmp_path / "out" / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["checksum"], body["recipe"]["split"], body["recipe"]["cleaning"]
    path.write_text(json.dumps(body))
    assert prepare(run).recipe == body["recipe"]
    path.rename(tmp_path / "out" / "progress.json")
    with pytest.raises(DataError, match=r"begun by another version of data\.prepare; --overwrite"):
        prepare(run)


SCRIPT = """
import sys
from pathlib import Path
from data import cli, corpus, readers
from data.prepare import PrepareOptions, prepare
corpus.BATCH_BYTES = readers.ITEM_BYTES = 10_000
if __name__ == "__main__":
    import argparse
    options = PrepareOptions(input=Path(sys.argv[1]), out=Path(sys.argv[2]), tokenizer=Path(sys.argv[3]),
        split="huggingface", val_fraction=0.2, chunk_tokens=1024, chunks_per_shard=8,
        processes=int(sys.argv[4]), checkpoint_s=0.01)
    sys.exit(cli.run_cli(lambda _: prepare(options) and None, argparse.ArgumentParser(), []))
"""
ENVIRONMENT = {"PYTHONPATH": ":".join(sys.path)}


def script(tmp_path: Path, corpus: Path, out: str, tokenizer: Path, processes: int) -> list[str]:
    (tmp_path / "run.py").write_text(SCRIPT)
    return [
        sys.executable,
        str(tmp_path / "run.py"),
        str(corpus),
        str(tmp_path / out),
        str(tokenizer),
        str(processes),
    ]


def wait_for_progress(process: subprocess.Popen[bytes], path: Path, times: int) -> None:
    """Wait until a file that is replaced now and then has appeared and was replaced so often."""
    seen: set[int] = set()
    deadline = time.monotonic() + 60
    while len(seen) <= times and process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.002)


@pytest.mark.parametrize("layout", ["hf_cache", "archive"])
def test_killed_at_random_moments(
    tmp_path: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Catches a moment at which a kill loses, doubles or mixes documents, while two processes work."""
    monkeypatch.setattr(layouts, "DOCUMENTS_PER_SUBSET", 10)
    texts = [" ".join(make_texts(5, seed)) for seed in range(2000)]
    corpus = write_corpus(tmp_path, layout, texts, num_files=3)
    generator, killed = random.Random(0), 0
    command = script(tmp_path, corpus, "killed", shard_folder, 2)
    for _ in range(12):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        wait_for_progress(process, tmp_path / "killed" / "progress.json", generator.randint(0, 8))
        time.sleep(generator.uniform(0.0, 0.05))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            killed += 1
        else:  # it was done before: begin anew
            shutil.rmtree(tmp_path / "killed")
        if killed == 3:
            break
    assert killed == 3
    for name in ("killed", "whole"):
        subprocess.run(
            script(tmp_path, corpus, name, shard_folder, 1), check=True, capture_output=True, env=ENVIRONMENT
        )
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(shards(tmp_path / "whole")) > 10


@pytest.mark.parametrize(("limit", "leaves"), [(3_000, False), (40_000, True)])
def test_full_disk(tmp_path: Path, shard_folder: Path, limit: int, leaves: bool) -> None:
    """Catches a traceback or a torn folder when nothing more can be written, and work that is lost."""
    corpus = tmp_path / "a.jsonl"
    write_jsonl(corpus, make_texts(4000))
    command = script(tmp_path, corpus, "full", shard_folder, 1)
    process = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert process.returncode == 2, process.stderr
    error = f"error: {tmp_path / 'full'}: File too large; when there is room, the same command continues"
    assert process.stderr.splitlines()[-1] == error
    assert (tmp_path / "full").exists() is leaves
    assert not (tmp_path / "full" / "manifest.json").exists()
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    whole = script(tmp_path, corpus, "whole", shard_folder, 1)
    subprocess.run(whole, check=True, capture_output=True, env=ENVIRONMENT)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")
