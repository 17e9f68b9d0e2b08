"""Command line: text to token shards with a manifest.

    python -m data.prepare --preset openwebtext --input openwebtext/ --tokenizer gpt2/ --out data/owt
    python -m data.prepare --input corpus/ --tokenizer gpt2/ --out data/corpus
    python -m data.prepare --source stdlib --vocab_size 4096 --val_fraction 0.02 --out data/demo

A run that was killed continues with the same command. The output depends on the corpus and the arguments
only, not on the number of processes and not on interruptions.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cli import run_cli
from data.corpus import Corpus, open_corpus, stdlib_corpus
from data.documents import CLEANINGS, parse_item
from data.fast_bpe import FastEncoder
from data.manifest import BYTES_PER_TOKEN, DataError, Manifest, Split
from data.prepare_run import PrepareRun
from data.presets import check_vocabulary_is, find_preset
from data.progress import Progress
from data.shard_folder import ShardFolder
from data.shards import ShardLayout
from data.split import SPLITS, DocumentSplit, HashSplit, HuggingFaceSplit
from data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from data.workers import ENCODERS, Job, process_batches

CHECKPOINT_S = 10.0
MAX_VOCAB_UINT16 = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What is prepared and how; all but ``processes``, ``encoder`` and ``checkpoint_s`` decide the output."""

    out: Path
    input: Path | None = None
    """Corpus on disk; ``None`` takes the standard library's sources."""
    files: str = "*"
    """Which files below the folder ``input``, by relative path."""
    tokenizer: Path | None = None
    """Tokenizer to load; ``None`` trains one of ``vocab_size`` on the training documents."""
    vocab_size: int | None = None
    split: str = "hash"
    val_fraction: float = 0.0005
    seed: int = 2357
    cleaning: str = "none"
    chunk_tokens: int = 1 << 20
    chunks_per_shard: int = 64
    processes: int = 1
    encoder: str = "fast"
    dtype: str = "uint16"
    text_field: str = "text"
    overwrite: bool = False
    expected_rows: int | None = None
    """Documents that the corpus must have, blank ones too."""
    vocabulary_sha256: str | None = None
    """Which vocabulary the loaded tokenizer must have."""
    checkpoint_s: float = CHECKPOINT_S
    """Seconds between two points to continue from."""

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"--val_fraction {self.val_fraction} must lie between 0 and 1, both excluded")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must be at least 0")
        for name in ("chunk_tokens", "chunks_per_shard", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        known = {"dtype": BYTES_PER_TOKEN, "split": SPLITS, "cleaning": CLEANINGS, "encoder": ENCODERS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"--{name} {getattr(self, name)} is not one of {', '.join(values)}")
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError("give either --tokenizer or --vocab_size")
        if self.vocab_size is not None:
            check_vocabulary(self.vocab_size, self.dtype)

    @property
    def counting(self) -> Job:
        """The job that only counts and hashes documents."""
        return Job(text_field=self.text_field, cleaning=self.cleaning)


def check_vocabulary(vocab_size: int, dtype: str) -> None:
    """Raise ValueError when ids of a vocabulary do not fit the shards' integers."""
    if dtype == "uint16" and vocab_size > MAX_VOCAB_UINT16:
        raise ValueError(f"vocabulary of {vocab_size} is over {MAX_VOCAB_UINT16}: give --dtype uint32")


def prepare(options: PrepareOptions) -> Manifest:
    """Write the shard folder, or continue or confirm one that the same options began.

    Returns:
        The manifest of the finished folder.

    Raises:
        ValueError: options out of bounds.
        DataError: a corpus that is empty or damaged, a tokenizer that does not fit, or a folder that belongs
            to something else.
    """
    if options.input:
        corpus = open_corpus(options.input, options.text_field, options.files)
    else:
        corpus = stdlib_corpus()
    given = _given_tokenizer(options)
    folder = ShardFolder(options.out, _recipe(options, corpus, given))
    with folder.locked():
        # A tokenizer that was given does not depend on the corpus, so later files may have been mended
        # meanwhile; those that were read already are compared by their contents.
        mendable = frozenset({"corpus_files", "corpus_bytes"} if options.tokenizer else ())
        finished = folder.finished(overwrite=options.overwrite, may_differ=mendable)
        if finished:
            print(f"{options.out}: already prepared with these arguments")
            return finished
        rows = _known_rows(options, corpus, folder)
        split = _document_split(options, rows)
        tokenizer = given or folder.read_tokenizer() or _train_tokenizer(options, corpus, split)
        job = _job(options, tokenizer)
        layout = ShardLayout(options.dtype, options.chunk_tokens, options.chunks_per_shard)
        return PrepareRun(
            folder,
            corpus,
            tokenizer,
            job,
            layout,
            split,
            rows=rows,
            processes=options.processes,
            checkpoint_s=options.checkpoint_s,
        ).run()


def _given_tokenizer(options: PrepareOptions) -> Tokenizer | None:
    if options.tokenizer is None:
        return None
    tokenizer = load_tokenizer(options.tokenizer)
    check_vocabulary(tokenizer.vocab_size, options.dtype)
    if options.vocabulary_sha256:
        check_vocabulary_is(tokenizer, options.vocabulary_sha256)
    return tokenizer


def _job(options: PrepareOptions, tokenizer: Tokenizer) -> Job:
    if options.encoder == "fast":
        FastEncoder(tokenizer)  # proves for all processes that it gives the same ids
    return Job(
        text_field=options.text_field,
        cleaning=options.cleaning,
        tokenizer_json=tokenizer.json_bytes,
        encoder=options.encoder,
        dtype=options.dtype,
    )


def _recipe(options: PrepareOptions, corpus: Corpus, given: Tokenizer | None) -> dict[str, Any]:
    """Return what decides the output; paths stay out, so that a moved corpus is the same corpus."""
    return {
        "corpus": corpus.name,
        "corpus_files": corpus.num_files,
        "corpus_bytes": corpus.total_bytes,
        "text_field": options.text_field,
        "tokenizer": given.sha256 if given else f"bpe:{options.vocab_size}",
        "split": options.split,
        "val_fraction": options.val_fraction,
        "seed": options.seed,
        "cleaning": options.cleaning,
        "chunk_tokens": options.chunk_tokens,
        "chunks_per_shard": options.chunks_per_shard,
        "dtype": options.dtype,
    }


def _known_rows(options: PrepareOptions, corpus: Corpus, folder: ShardFolder) -> int | None:
    """Return the number of documents if the split or a preset needs it.

    Raises:
        DataError: it is not what the preset says.
    """
    if options.split == "hash" and options.expected_rows is None:
        return None
    rows = folder.read_progress().get("counted_rows")
    if rows is None:
        rows = corpus.count_rows()
    if rows is None:
        rows = _count_rows(options, corpus)
    if options.expected_rows not in (None, rows):
        raise DataError(
            f"{options.input}: has {rows:,} documents, the preset's corpus {options.expected_rows:,}; "
            f"leave --preset out to prepare a part, perhaps with --split {options.split}"
        )
    return int(rows)


def _count_rows(options: PrepareOptions, corpus: Corpus) -> int:
    progress = Progress("counting documents", corpus.total_bytes, counted="documents")
    rows = 0
    try:
        for result in process_batches(options.counting, corpus.batches(), options.processes):
            rows += len(result.lengths)
            progress.update(result.position, rows)
    except BaseException:
        progress.abort()
        raise
    progress.close(f"{rows:,} documents")
    return rows


def _document_split(options: PrepareOptions, rows: int | None) -> DocumentSplit:
    if options.split == "hash":
        return HashSplit(options.seed, options.val_fraction)
    assert rows is not None
    return HuggingFaceSplit(options.seed, options.val_fraction, rows)


def _train_tokenizer(options: PrepareOptions, corpus: Corpus, split: DocumentSplit) -> Tokenizer:
    assert options.vocab_size is not None
    progress = Progress("training the tokenizer", corpus.total_bytes)
    try:
        texts = _training_texts(options, corpus, split, progress)
        first = next(texts, None)
        if first is None:
            raise DataError(f"{corpus.name}: empty corpus: no document for training")
        tokenizer = train_bpe(itertools.chain([first], texts), options.vocab_size)
    except BaseException:
        progress.abort()
        raise
    progress.close(f"{tokenizer.vocab_size} tokens")
    return tokenizer


def _training_texts(
    options: PrepareOptions, corpus: Corpus, split: DocumentSplit, progress: Progress
) -> Iterator[str]:
    row = document = 0
    for batch in corpus.batches():
        for item in batch.items:
            for text, _ in parse_item(item, options.text_field, options.cleaning):
                filled = bool(text) and not text.isspace()
                if filled and split.place(row, document) is None:
                    yield text
                row, document = row + 1, document + filled
        progress.update(batch.position)


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
    corpus.add_argument("--input", type=Path, help="a file of text, or a folder of files of one format")
    corpus.add_argument("--source", choices=["stdlib"], help="built-in corpus: Python's library sources")
    parser.add_argument("--files", metavar="GLOB", help="which files below --input; 'train-*'")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--preset", help="openwebtext: split, cleaning and checks of the paper's corpus")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, help="tokenizer.json, or folder with GPT-2's files")
    tokenizer.add_argument("--vocab_size", type=int, help="train a byte-level BPE of this size")
    parser.add_argument("--split", help=f"who chooses validation documents: {' or '.join(SPLITS)}")
    parser.add_argument("--val_fraction", type=float, help="share of validation documents (0.0005)")
    parser.add_argument("--seed", type=int, help="seed of the split (2357)")
    parser.add_argument("--cleaning", help=f"what is done to each text: {' or '.join(CLEANINGS)}")
    parser.add_argument("--chunk_tokens", type=int, help="tokens per tar member (1048576)")
    parser.add_argument("--chunks_per_shard", type=int, help="tar members per shard (64)")
    parser.add_argument("--processes", type=int, default=_available_cores(), help="default: all cores")
    parser.add_argument("--encoder", help="fast (tiktoken) or reference (tokenizers); the ids are the same")
    parser.add_argument("--dtype", choices=sorted(BYTES_PER_TOKEN), help="integers of the shards (uint16)")
    parser.add_argument("--text_field", help="JSON key or column of the text (text)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote to --out")
    return parser


def _options(args: argparse.Namespace) -> PrepareOptions:
    """Join the preset's settings with those of the command line, which come first."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in ("source", "debug", "preset"):
        given.pop(name, None)
    if args.preset is None:
        return PrepareOptions(**given)
    preset = find_preset(args.preset)
    settings = {
        "split": preset.split,
        "val_fraction": preset.val_fraction,
        "seed": preset.seed,
        "cleaning": preset.cleaning,
        "expected_rows": preset.rows,
        "vocabulary_sha256": preset.vocabulary_sha256,
    }
    return PrepareOptions(**{**settings, **given})


def _main(args: argparse.Namespace) -> None:
    manifest = prepare(_options(args))
    for name, split in manifest.splits.items():
        print(describe_split(name, split))


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return run_cli(_main, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
