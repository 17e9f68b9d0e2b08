"""One pass over a corpus that turns its documents into the shards of both splits."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.corpus import Corpus, RawBatch
from data.manifest import (
    VERSION,
    DataError,
    Manifest,
    Split,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from data.progress import Progress
from data.shard_folder import ShardFolder
from data.shards import ShardLayout, SplitWriter
from data.split import DocumentSplit
from data.spool import DocumentSpool
from data.tokenizer import Tokenizer
from data.workers import BatchResult, Job, process_batches


class PrepareRun:
    """The state of the pass: what is written, and the batch to continue with.

    Training documents are written as they come, those for validation at the end in the order of their places.
    """

    def __init__(
        self,
        folder: ShardFolder,
        corpus: Corpus,
        tokenizer: Tokenizer,
        job: Job,
        layout: ShardLayout,
        split: DocumentSplit,
        *,
        rows: int | None,
        processes: int,
        checkpoint_s: float,
    ):
        """Start, or continue from the folder's last checkpoint.

        Args:
            folder: locked and not finished.
            job: what the processes do; with this tokenizer.
            rows: documents of the corpus, blank ones too, if the split needs to know.
            checkpoint_s: seconds between two points to continue from.

        Raises:
            DataError: the folder's files are not those of its checkpoint.
        """
        self._folder, self._corpus, self._tokenizer = folder, corpus, tokenizer
        self._job, self._layout, self._split = job, layout, split
        self._counted_rows, self._processes, self._checkpoint_s = rows, processes, checkpoint_s
        saved = folder.begin(tokenizer)
        self._batches_done = int(saved.get("batches", 0))
        self._rows, self._documents = int(saved.get("rows", 0)), int(saved.get("documents", 0))
        self._train = SplitWriter(folder.path, "train", layout, saved.get("train"))
        self._val = DocumentSpool(folder.path, layout.stored_dtype, saved.get("val"))
        self._saved_digest = saved.get("corpus_sha256")
        self._digest = hashlib.sha256()

    def run(self) -> Manifest:
        """Finish the folder and return its manifest.

        Raises:
            DataError: a corpus that is empty or damaged.
        """
        try:
            self._consume()
            self._check_splits()
            return self._finish()
        except (DataError, OSError):
            # Without a complete shard there is nothing worth continuing, so leave nothing behind.
            if not self._folder.has_shards():
                self._abandon()
            raise
        finally:
            self._close()

    def _consume(self) -> None:
        progress = Progress("tokenizing", self._corpus.total_bytes, counted="tokens")
        batches = self._corpus.batches()
        try:
            self._prove_same_corpus(batches, progress)
            results = process_batches(self._job, batches, self._processes)
            try:
                self._append_all(results, progress)
            finally:
                results.close()  # type: ignore[attr-defined]
        except BaseException:
            progress.abort()
            raise
        progress.close(f"{self._documents:,} documents, {self._tokens:,} tokens")

    def _prove_same_corpus(self, batches: Iterator[RawBatch], progress: Progress) -> None:
        """Read again what an interrupted run has finished, without tokenizing it."""
        if not self._batches_done:
            return
        done = itertools.islice(batches, self._batches_done)
        job = Job(text_field=self._job.text_field, cleaning=self._job.cleaning)
        for result in process_batches(job, done, self._processes):
            self._digest.update(result.digests)
            progress.skip(result.position, self._tokens)
        if self._saved_digest != self._digest.hexdigest():
            raise DataError(
                f"{self._folder.path}: the corpus changed since the interrupted run; --overwrite starts again"
            )

    def _append_all(self, results: Iterator[BatchResult], progress: Progress) -> None:
        last = time.monotonic()
        for result in results:
            self._append(result)
            progress.update(result.position, self._tokens)
            if time.monotonic() - last >= self._checkpoint_s:
                self._checkpoint()
                last = time.monotonic()

    def _append(self, result: BatchResult) -> None:
        in_val = np.zeros(len(result.lengths), dtype=bool)
        end = documents = 0
        for index, length in enumerate(result.lengths.tolist()):
            if not length:
                continue
            end += length
            place = self._split.place(self._rows + index, self._documents + documents)
            documents += 1
            if place is not None:
                in_val[index] = True
                self._val.append(place, result.tokens[end - length : end])
        train = result.tokens[~np.repeat(in_val, result.lengths)] if in_val.any() else result.tokens
        self._train.append(train, documents - int(in_val.sum()))
        self._documents += documents
        self._rows += len(result.lengths)
        self._batches_done += 1
        self._digest.update(result.digests)

    @property
    def _tokens(self) -> int:
        return self._train.tokens + self._val.tokens

    def _checkpoint(self) -> None:
        self._folder.write_progress(
            {
                "tokenizer_sha256": self._tokenizer.sha256,
                "batches": self._batches_done,
                "rows": self._rows,
                "counted_rows": self._counted_rows,
                "documents": self._documents,
                "corpus_sha256": self._digest.hexdigest(),
                "train": self._train.checkpoint(),
                "val": self._val.checkpoint(),
            }
        )

    def _check_splits(self) -> None:
        if not self._documents:
            self._abandon()
            raise DataError(f"{self._corpus.name}: empty corpus: no document that is not blank")
        if self._counted_rows not in (None, self._rows):
            raise DataError(
                f"{self._corpus.name}: changed while it was read, from {self._counted_rows} documents to "
                f"{self._rows}; --overwrite starts again"
            )
        for name, documents in (("train", self._train.documents), ("val", self._val.documents)):
            if not documents:
                self._abandon()
                recipe = self._folder.recipe
                raise DataError(
                    f"none of {self._documents} documents falls into {name} with "
                    f"--val_fraction {recipe['val_fraction']} --seed {recipe['seed']}"
                )

    def _finish(self) -> Manifest:
        val = SplitWriter(self._folder.path, "val", self._layout)
        try:
            for tokens in self._val.in_order():
                val.append(tokens, 1)
            splits: dict[str, Split] = {"train": self._train.finish(), "val": val.finish()}
        finally:
            val.close()
        info = TokenizerInfo(self._tokenizer.sha256, self._tokenizer.vocab_size, self._tokenizer.eot_id)
        found: dict[str, Any] = {"rows": self._rows, "corpus_sha256": self._digest.hexdigest()}
        recipe = {**self._folder.recipe, **found}
        layout = self._layout
        write_manifest(
            self._folder.path, Manifest(VERSION, layout.dtype, layout.chunk_tokens, info, splits, recipe)
        )
        self._folder.sweep()
        return read_manifest(self._folder.path)

    def _abandon(self) -> None:
        self._close()
        self._folder.discard()

    def _close(self) -> None:
        self._train.close()
        self._val.close()
