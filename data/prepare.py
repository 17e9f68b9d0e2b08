"""Command line: text to token shards with a manifest.

    python -m data.prepare --input corpus/ --tokenizer gpt2/ --out data/owt
    python -m data.prepare --source stdlib --vocab_size 4096 --val_fraction 0.02 --out data/demo

A run that was killed continues with the same command. The output depends on the corpus and the arguments
only, not on the number of processes and not on interruptions.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import run_cli
from data.corpus import Corpus, RawBatch, open_corpus, parse_batch, stdlib_corpus
from data.files import replace_bytes, temporary_path
from data.manifest import (
    BYTES_PER_TOKEN,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    VERSION,
    DataError,
    Manifest,
    Split,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from data.progress import Progress
from data.shards import ShardLayout, SplitWriter
from data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from data.workers import TokenizedBatch, tokenize_batches

PROGRESS_NAME = "progress.json"
SPLITS = ("train", "val")
CHECKPOINT_S = 10.0
MAX_VOCAB_UINT16 = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What is prepared and how; all of it except ``processes`` and ``checkpoint_s`` decides the output."""

    out: Path
    input: Path | None = None
    """Corpus on disk; ``None`` takes the standard library's sources."""
    tokenizer: Path | None = None
    """Tokenizer to load; ``None`` trains one of ``vocab_size`` on the training documents."""
    vocab_size: int | None = None
    val_fraction: float = 0.0005
    seed: int = 2357
    chunk_tokens: int = 1 << 20
    chunks_per_shard: int = 64
    processes: int = 1
    dtype: str = "uint16"
    text_field: str = "text"
    overwrite: bool = False
    checkpoint_s: float = CHECKPOINT_S
    """Seconds between two points to continue from."""

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"--val_fraction {self.val_fraction} must lie between 0 and 1, both excluded")
        for name in ("chunk_tokens", "chunks_per_shard", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.dtype not in BYTES_PER_TOKEN:
            raise ValueError(f"--dtype {self.dtype} is not one of {', '.join(BYTES_PER_TOKEN)}")
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError("give either --tokenizer or --vocab_size")
        if self.vocab_size is not None:
            check_vocabulary(self.vocab_size, self.dtype)


def check_vocabulary(vocab_size: int, dtype: str) -> None:
    """Raise ValueError when ids of a vocabulary do not fit the shards' integers."""
    if dtype == "uint16" and vocab_size > MAX_VOCAB_UINT16:
        raise ValueError(f"vocabulary of {vocab_size} is over {MAX_VOCAB_UINT16}: give --dtype uint32")


def is_validation(seed: int, document: int, fraction: float) -> bool:
    """Decide the split of a document by its number in the corpus (blank documents are not counted).

    SHA-256 of ``"{seed}/{document}"``, its first 8 bytes as a little-endian number u: validation if
    u / 2**64 < fraction.
    """
    digest = hashlib.sha256(f"{seed}/{document}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2.0**64


def prepare(options: PrepareOptions) -> Manifest:
    """Write the shard folder, or continue or confirm one that the same options began.

    Returns:
        The manifest of the finished folder.

    Raises:
        ValueError: options out of bounds.
        DataError: a corpus that is empty or damaged, or a folder that belongs to something else.
    """
    corpus = open_corpus(options.input, options.text_field) if options.input else stdlib_corpus()
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    if given:
        check_vocabulary(given.vocab_size, options.dtype)
    recipe = _recipe(options, corpus, given)
    with _locked_folder(options.out):
        finished = _look_at_folder(options, recipe)
        if finished:
            print(f"{options.out}: already prepared with these arguments")
            return finished
        tokenizer = given or _resumed_tokenizer(options.out) or _train_tokenizer(options, corpus)
        return _Run(options, corpus, tokenizer, recipe).run()


class _Run:
    """One pass over the corpus that turns documents into the two splits."""

    def __init__(self, options: PrepareOptions, corpus: Corpus, tokenizer: Tokenizer, recipe: dict[str, Any]):
        self._options, self._corpus, self._tokenizer, self._recipe = options, corpus, tokenizer, recipe
        saved = _read_progress(options.out)
        if not saved:  # first of all the file that marks the folder as ours
            saved = {"recipe": recipe, "tokenizer_sha256": tokenizer.sha256}
            replace_bytes(options.out / PROGRESS_NAME, json.dumps(saved).encode())
        replace_bytes(options.out / TOKENIZER_NAME, tokenizer.json_bytes)
        layout = ShardLayout(options.dtype, options.chunk_tokens, options.chunks_per_shard)
        states = saved.get("splits", {})
        self._writers = {name: SplitWriter(options.out, name, layout, states.get(name)) for name in SPLITS}
        self._batches_done = int(saved.get("batches", 0))
        self._documents = int(saved.get("documents", 0))
        self._saved_digest = saved.get("corpus_sha256")
        self._digest = hashlib.sha256()

    def run(self) -> Manifest:
        try:
            self._consume()
            self._check_splits()
            return self._finish()
        except DataError:
            # Without a complete shard there is nothing worth continuing, so leave nothing behind.
            if not any(self._options.out.glob("*.tar")):
                self._abandon()
            raise
        finally:
            self._close()

    def _consume(self) -> None:
        progress = Progress("tokenizing", self._corpus.total_bytes)
        batches = self._remaining(progress)
        results = tokenize_batches(
            self._tokenizer, batches, self._options.text_field, self._options.processes
        )
        last = time.monotonic()
        try:
            for batch, tokenized in results:
                self._append(batch, tokenized)
                progress.update(batch.position, f"{self._tokens / 1e6:.1f}M tokens")
                if time.monotonic() - last >= self._options.checkpoint_s:
                    self._checkpoint()
                    last = time.monotonic()
        except BaseException:
            progress.abort()
            raise
        finally:
            results.close()  # type: ignore[attr-defined]
        progress.close(f"{self._documents:,} documents, {self._tokens:,} tokens")

    def _remaining(self, progress: Progress) -> Iterator[RawBatch]:
        """Skip the batches that an interrupted run has finished, after a proof that they are the same."""
        batches = self._corpus.batches()
        for batch in itertools.islice(batches, self._batches_done):
            _add_to_digest(self._digest, batch)
            progress.skip(batch.position)
        if self._saved_digest not in (None, self._digest.hexdigest()):
            raise DataError(
                f"{self._options.out}: the corpus changed since the interrupted run; --overwrite starts again"
            )
        yield from batches

    def _append(self, batch: RawBatch, tokenized: TokenizedBatch) -> None:
        numbers = range(self._documents, self._documents + len(tokenized.lengths))
        seed, fraction = self._options.seed, self._options.val_fraction
        in_val = np.array([is_validation(seed, number, fraction) for number in numbers], dtype=bool)
        token_in_val = np.repeat(in_val, tokenized.lengths)
        self._writers["val"].append(tokenized.tokens[token_in_val], int(in_val.sum()))
        self._writers["train"].append(tokenized.tokens[~token_in_val], int((~in_val).sum()))
        self._documents = numbers.stop
        self._batches_done += 1
        _add_to_digest(self._digest, batch)

    @property
    def _tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def _checkpoint(self) -> None:
        state = {
            "recipe": self._recipe,
            "tokenizer_sha256": self._tokenizer.sha256,
            "batches": self._batches_done,
            "documents": self._documents,
            "corpus_sha256": self._digest.hexdigest(),
            "splits": {name: writer.checkpoint() for name, writer in self._writers.items()},
        }
        replace_bytes(self._options.out / PROGRESS_NAME, json.dumps(state).encode())

    def _check_splits(self) -> None:
        if not self._documents:
            self._abandon()
            raise DataError(f"{self._corpus.name}: empty corpus: no document that is not blank")
        for name, writer in self._writers.items():
            if not writer.documents:
                self._abandon()
                raise DataError(
                    f"none of {self._documents} documents falls into {name} with "
                    f"--val_fraction {self._options.val_fraction} --seed {self._options.seed}"
                )

    def _finish(self) -> Manifest:
        splits: dict[str, Split] = {name: writer.finish() for name, writer in self._writers.items()}
        info = TokenizerInfo(self._tokenizer.sha256, self._tokenizer.vocab_size, self._tokenizer.eot_id)
        recipe = {**self._recipe, "corpus_sha256": self._digest.hexdigest()}
        options = self._options
        write_manifest(
            options.out, Manifest(VERSION, options.dtype, options.chunk_tokens, info, splits, recipe)
        )
        _sweep(options.out)
        return read_manifest(options.out)

    def _abandon(self) -> None:
        self._close()
        _discard(self._options.out)

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _recipe(options: PrepareOptions, corpus: Corpus, given: Tokenizer | None) -> dict[str, Any]:
    """Return what decides the output; paths stay out, so that a moved corpus is the same corpus."""
    return {
        "corpus": corpus.name,
        "corpus_files": len(corpus.files),
        "corpus_bytes": corpus.total_bytes,
        "text_field": options.text_field,
        "tokenizer": given.sha256 if given else f"bpe:{options.vocab_size}",
        "val_fraction": options.val_fraction,
        "seed": options.seed,
        "chunk_tokens": options.chunk_tokens,
        "chunks_per_shard": options.chunks_per_shard,
        "dtype": options.dtype,
    }


def _look_at_folder(options: PrepareOptions, recipe: dict[str, Any]) -> Manifest | None:
    """Return the manifest if the folder is finished; raise if it is not ours to continue."""
    out = options.out
    names = {path.name for path in out.iterdir()}
    if not names & {MANIFEST_NAME, PROGRESS_NAME} and names - {temporary_path(out / PROGRESS_NAME).name}:
        raise DataError(f"{out}: not empty and not written by data.prepare; choose another --out")
    if options.overwrite:
        _discard(out)
    elif MANIFEST_NAME in names:
        manifest = read_manifest(out)
        _compare(out, "finished", recipe, manifest.recipe)
        _sweep(out)
        return manifest
    elif PROGRESS_NAME in names:
        # A tokenizer that was given does not depend on the corpus, so later files may have been mended
        # meanwhile; those that were read already are compared by their contents.
        may_differ = {"corpus_files", "corpus_bytes"} if options.tokenizer else set()
        wanted = {key: value for key, value in recipe.items() if key not in may_differ}
        _compare(out, "unfinished", wanted, (_read_progress(out) or {}).get("recipe", {}))
    return None


def _compare(out: Path, state: str, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise DataError(
                f"{out}: holds a {state} run with {key}={found.get(key)!r}, asked for {value!r}; "
                "--overwrite replaces it"
            )


def _read_progress(out: Path) -> dict[str, Any] | None:
    path = out / PROGRESS_NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: damaged; --overwrite starts again") from error
    return state


def _resumed_tokenizer(out: Path) -> Tokenizer | None:
    progress = _read_progress(out)
    if not progress or not (out / TOKENIZER_NAME).exists():
        return None
    tokenizer = load_tokenizer(out)
    if tokenizer.sha256 != progress["tokenizer_sha256"]:
        raise DataError(
            f"{out / TOKENIZER_NAME}: changed since the interrupted run; --overwrite starts again"
        )
    return tokenizer


def _train_tokenizer(options: PrepareOptions, corpus: Corpus) -> Tokenizer:
    assert options.vocab_size is not None
    progress = Progress("training the tokenizer", corpus.total_bytes)
    try:
        texts = _training_texts(options, corpus, progress)
        first = next(texts, None)
        if first is None:
            raise DataError(f"{corpus.name}: empty corpus: no document for training")
        tokenizer = train_bpe(itertools.chain([first], texts), options.vocab_size)
    except BaseException:
        progress.abort()
        raise
    progress.close(f"{tokenizer.vocab_size} tokens")
    return tokenizer


def _training_texts(options: PrepareOptions, corpus: Corpus, progress: Progress) -> Iterator[str]:
    number = 0
    for batch in corpus.batches():
        for text in parse_batch(batch, options.text_field):
            if not is_validation(options.seed, number, options.val_fraction):
                yield text
            number += 1
        progress.update(batch.position)


def _add_to_digest(digest: hashlib._Hash, batch: RawBatch) -> None:
    for document in batch.documents:
        digest.update(len(document.data).to_bytes(8, "little"))
        digest.update(document.data)


def _sweep(out: Path) -> None:
    """Remove what only an unfinished folder needs."""
    written = [out / name for name in (MANIFEST_NAME, PROGRESS_NAME, TOKENIZER_NAME)]
    for path in (out / PROGRESS_NAME, *map(temporary_path, written)):
        if path.exists():  # a finished folder may be read-only
            path.unlink()


def _discard(out: Path) -> None:
    """Remove the files that this program writes."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)  # first, so that a crash here leaves no finished folder
    (out / TOKENIZER_NAME).unlink(missing_ok=True)
    for split in SPLITS:
        for path in out.glob(f"{split}-*.tar*"):
            path.unlink()
    _sweep(out)


@contextlib.contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the lock ends with the process, however it ends.

    A folder that did not exist is made, and removed again if it stays empty.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file, --out must be a folder")
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DataError(f"{out}: another data.prepare is writing it") from error
    try:
        yield
    finally:
        os.close(descriptor)
        if not existed and not any(out.iterdir()):
            out.rmdir()


def describe_split(name: str, split: Split) -> str:
    """Return one line about a split."""
    return (
        f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, "
        f"{len(split.chunks)} chunks, {len(split.shards)} shards"
    )


def _available_cores() -> int:
    # The affinity respects a cluster job's share of the node; not every system has it.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Text to token shards.")
    corpus = parser.add_mutually_exclusive_group(required=True)
    corpus.add_argument("--input", type=Path, help=".txt .jsonl .jsonl.gz .jsonl.zst .parquet, or a folder")
    corpus.add_argument("--source", choices=["stdlib"], help="built-in corpus: Python's library sources")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, help="tokenizer.json, or folder with GPT-2's files")
    tokenizer.add_argument("--vocab_size", type=int, help="train a byte-level BPE of this size")
    parser.add_argument("--val_fraction", type=float, default=0.0005, help="share of validation documents")
    parser.add_argument("--seed", type=int, default=2357, help="seed of the split")
    parser.add_argument("--chunk_tokens", type=int, default=1 << 20, help="tokens per tar member")
    parser.add_argument("--chunks_per_shard", type=int, default=64, help="tar members per shard")
    parser.add_argument("--processes", type=int, default=_available_cores(), help="default: all cores")
    parser.add_argument("--dtype", choices=sorted(BYTES_PER_TOKEN), default="uint16")
    parser.add_argument("--text_field", default="text", help="JSON key or column of the text")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote to --out")
    return parser


def _main(args: argparse.Namespace) -> None:
    options = vars(args).copy()
    del options["source"], options["debug"]
    manifest = prepare(PrepareOptions(**options))
    for name, split in manifest.splits.items():
        print(describe_split(name, split))


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return run_cli(_main, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
