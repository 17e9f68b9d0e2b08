"""Command line: compare every byte of a shard folder, and of labels, with their manifests.

python -m data.verify DIR
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.cli import run_cli
from data.label_cache import (
    DEFAULT_FOLDER,
    LABELS_NAME,
    MASKED_ID,
    LabelCache,
    chunk_name,
    found_chunks,
    read_labels,
)
from data.manifest import (
    BYTES_PER_TOKEN,
    MANIFEST_NAME,
    TAR_BLOCK,
    TOKENIZER_NAME,
    Chunk,
    DataError,
    Manifest,
    Shard,
    Split,
    read_manifest,
)
from data.progress import Progress
from data.shards import hash_file
from data.tokenizer import load_tokenizer


def verify_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Check a folder completely.

    Returns:
        one summary line per split that is in order, and one line per problem.

    Raises:
        DataError: no readable manifest.
    """
    manifest = read_manifest(folder)
    problems = list(_tokenizer_problems(folder, manifest))
    summaries = []
    for name, split in manifest.splits.items():
        found = list(_split_problems(folder, manifest, name, split))
        problems += found
        if not found:
            summaries.append(
                f"{name}: ok, {split.documents:,} documents, {split.tokens:,} tokens, "
                f"{len(split.chunks)} chunks, {len(split.shards)} shards"
            )
    return summaries, problems


def verify_labels(folder: Path) -> tuple[list[str], list[str]]:
    """Check a folder of labels completely; returns and raises as :func:`verify_folder`."""
    cache = read_labels(folder)
    summaries, problems = [], []
    sizes = (cache.chunk_bytes(split, n) for split in cache.splits for n in range(len(cache.splits[split])))
    progress = Progress(f"verifying {folder.name}", sum(sizes))
    done = 0
    for split, chunks in cache.splits.items():
        known = {number: {chunk.digest} for number, chunk in enumerate(chunks) if chunk.windows}
        found = [
            f"{folder / chunk_name(split, number, digest)}: no chunk has this file"
            for number, digests in found_chunks(folder, split).items()
            for digest in digests - known.get(number, set())
        ]
        for number in known:
            found += _label_problems(cache, split, number)
            progress.update(done := done + cache.chunk_bytes(split, number))
        problems += found
        if not found:
            windows = sum(chunk.windows for chunk in chunks)
            summaries.append(f"{folder.name}, {split}: ok, {windows:,} windows, {len(known)} files")
    progress.close()
    return summaries, problems


def _label_problems(cache: LabelCache, split: str, number: int) -> Iterator[str]:
    try:
        ids = cache.read_chunk(split, number)
    except DataError as error:
        yield str(error)
        return
    largest = int(ids[ids != MASKED_ID].max(initial=0))
    if largest >= cache.settings.num_concepts:
        name = chunk_name(split, number, cache.splits[split][number].digest)
        yield f"{cache.place}/{name}: id {largest} is beyond the dictionary of {cache.settings.num_concepts}"


def _fit_problems(folder: Path, labels: Path) -> Iterator[str]:
    """Whether labels inside a shard folder are those of its shards."""
    manifest, settings = read_manifest(folder), read_labels(labels).settings
    if settings.data != manifest.sha256:
        yield f"{labels}: the labels of other shards: {MANIFEST_NAME} has changed since"


def _tokenizer_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    path = folder / TOKENIZER_NAME
    try:
        tokenizer = load_tokenizer(path)
    except DataError as error:
        yield str(error)
        return
    for key in ("sha256", "vocab_size", "eot_id"):
        found, wanted = getattr(tokenizer, key), getattr(manifest.tokenizer, key)
        if found != wanted:
            yield f"{path}: {key} is {found}, the manifest says {wanted}"


def _split_problems(folder: Path, manifest: Manifest, name: str, split: Split) -> Iterator[str]:
    progress = Progress(f"verifying {name}", sum(shard.bytes for shard in split.shards))
    documents = tokens = done = 0
    previous: np.ndarray | None = None
    damaged = False
    for shard in split.shards:
        for result in _check_shard(folder, manifest, shard):
            if isinstance(result, str):
                damaged, previous = True, None
                yield result
                continue
            if previous is not None and previous[-1] != result[0]:
                yield f"{folder / shard.name}: chunks do not join: {previous[-1]} is followed by {result[0]}"
            documents += int((result[:-1] == manifest.tokenizer.eot_id).sum())
            tokens += len(result) - 1
            previous = result
        done += shard.bytes
        progress.update(done)
    progress.close()
    if damaged:
        return
    if previous is not None:  # only the last chunk's last token is no overlap
        documents += int(previous[-1] == manifest.tokenizer.eot_id)
        tokens += 1
    for key, found, wanted in (("documents", documents, split.documents), ("tokens", tokens, split.tokens)):
        if found != wanted:
            yield f"{folder}: {name} has {found} {key}, the manifest says {wanted}"


def _check_shard(folder: Path, manifest: Manifest, shard: Shard) -> Iterator[str | np.ndarray]:
    """Yield the tokens of each sound chunk, and a line for each problem."""
    path = folder / shard.name
    if not path.is_file():
        yield f"{path}: shard is missing"
        return
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"{path}: shard has {size} bytes, the manifest says {shard.bytes}"
    elif hash_file(path) != shard.sha256:
        yield f"{path}: SHA-256 is not the manifest's"
    with open(path, "rb") as file:
        for chunk in shard.chunks:
            file.seek(chunk.offset)
            member = file.read(chunk.member_bytes(manifest.dtype))
            problem = _chunk_problem(member, chunk, manifest)
            if problem:
                yield f"{path} at offset {chunk.offset}: {problem}"
            else:
                yield _tokens(member, chunk, manifest.dtype)


def _chunk_problem(member: bytes, chunk: Chunk, manifest: Manifest) -> str | None:
    if len(member) != chunk.member_bytes(manifest.dtype):
        return f"chunk is cut short: {len(member)} of {chunk.member_bytes(manifest.dtype)} bytes"
    try:
        header = tarfile.TarInfo.frombuf(member[:TAR_BLOCK], "utf-8", "strict")
    except tarfile.TarError as error:
        return f"damaged tar header: {error}"
    tokens = _tokens(member, chunk, manifest.dtype)
    if header.size != tokens.nbytes:
        return f"tar member has {header.size} bytes, the manifest says {tokens.nbytes}"
    if zlib.crc32(tokens.tobytes()) != chunk.crc32:
        return "chunk is damaged: its CRC-32 is not the manifest's"
    if tokens.max() >= manifest.tokenizer.vocab_size:
        return f"token id {tokens.max()} is beyond the vocabulary of {manifest.tokenizer.vocab_size}"
    return None


def _tokens(member: bytes, chunk: Chunk, dtype: str) -> np.ndarray:
    return np.frombuffer(member, f"<u{BYTES_PER_TOKEN[dtype]}", count=chunk.tokens, offset=TAR_BLOCK)


def _verify(folder: Path) -> tuple[list[str], list[str]]:
    """Shards, labels, or shards with the labels inside their folder."""
    if (folder / LABELS_NAME).is_file():
        return verify_labels(folder)
    summaries, problems = verify_folder(folder)
    labels = folder / DEFAULT_FOLDER
    if (labels / LABELS_NAME).is_file():
        more, worse = verify_labels(labels)
        summaries, problems = summaries + more, [*problems, *worse, *_fit_problems(folder, labels)]
    return summaries, problems


def _main(args: argparse.Namespace) -> int:
    summaries, problems = _verify(args.folder)
    for line in summaries:
        print(line)
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.verify", description="Check shards and labels.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of token shards or of labels")
    return run_cli(_main, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
