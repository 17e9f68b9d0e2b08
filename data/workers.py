"""Parsing and tokenizing batches in several processes, results in the order of the corpus."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import queue
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import numpy as np

from data.corpus import RawBatch
from data.documents import parse_item
from data.fast_bpe import FastEncoder
from data.manifest import BYTES_PER_TOKEN, DataError
from data.tokenizer import Tokenizer, use_one_thread

STOP_TIMEOUT_S = 5.0
BATCHES_AHEAD_PER_PROCESS = 2
DIGEST_BYTES = 32
ENCODERS = ("fast", "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is done with each batch."""

    text_field: str
    cleaning: str
    tokenizer_json: bytes | None = None
    """Contents of a tokenizer.json; ``None``: documents are counted and hashed only."""
    encoder: str = "fast"
    dtype: str = "uint16"


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The documents of one batch."""

    position: int
    """That of the batch in the corpus."""
    lengths: np.ndarray
    """(rows,) int64, tokens of each document with its end-of-text token; 0 for a blank one."""
    tokens: np.ndarray
    """(N,) uint16 or uint32, the documents one after the other; empty if they were counted only."""
    digests: bytes
    """SHA-256 of each document's text, 32 bytes a row."""


class Worker:
    """Does a job with one batch after the other."""

    def __init__(self, job: Job):
        self._job = job
        self._dtype = np.dtype(f"<u{BYTES_PER_TOKEN[job.dtype]}")
        if job.tokenizer_json is not None:
            self._tokenizer = Tokenizer(job.tokenizer_json, "tokenizer.json")
            self._fast = FastEncoder(self._tokenizer, check=False) if job.encoder == "fast" else None

    def __call__(self, batch: RawBatch) -> BatchResult:
        """Parse and tokenize one batch.

        Raises:
            DataError: a document that cannot be parsed, or whose ids the two encoders disagree on.
        """
        texts, digests = [], bytearray()
        for item in batch.items:
            for text, data in parse_item(item, self._job.text_field, self._job.cleaning):
                digests += hashlib.sha256(data).digest()
                texts.append("" if text.isspace() else text)
        if self._job.tokenizer_json is None:
            lengths = np.array([bool(text) for text in texts], dtype=np.int64)
            return BatchResult(batch.position, lengths, np.empty(0, self._dtype), bytes(digests))
        tokens, lengths = self._tokenize(texts, batch)
        return BatchResult(batch.position, lengths, tokens, bytes(digests))

    def _tokenize(self, texts: list[str], batch: RawBatch) -> tuple[np.ndarray, np.ndarray]:
        filled = [text for text in texts if text]
        if self._fast and filled:
            self._fast.compare(filled[0], batch.items[0].where)
        ids = (self._fast or self._tokenizer).encode_batch(filled)
        eot = np.array([self._tokenizer.eot_id], dtype=np.uint32)
        pieces = [piece for document in ids for piece in (document, eot)]
        tokens = np.concatenate(pieces).astype(self._dtype) if pieces else np.empty(0, self._dtype)
        lengths = np.zeros(len(texts), dtype=np.int64)
        lengths[[bool(text) for text in texts]] = [len(document) + 1 for document in ids]
        return tokens, lengths


def process_batches(job: Job, batches: Iterable[RawBatch], processes: int) -> Iterator[BatchResult]:
    """Yield the result of every batch, in order; ``processes`` changes the speed, never the result.

    Raises:
        DataError: a document that cannot be parsed, or a process that was killed.
    """
    if processes == 1:
        use_one_thread()
        worker = Worker(job)
        for batch in batches:
            yield worker(batch)
        return
    with _pool(job, processes) as pool:
        waiting: deque[Future[BatchResult]] = deque()
        for batch in batches:
            waiting.append(pool.submit(batch))
            if len(waiting) >= processes * BATCHES_AHEAD_PER_PROCESS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Pool:
    """Processes behind pipes, one thread here for each, so that a free process takes the next batch.

    A pipe tells either side when the other has died: a killed run leaves no process behind, and a killed
    process is an error instead of a hang.
    """

    def __init__(self, connections: list[Connection], threads: ThreadPoolExecutor):
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        for connection in connections:
            self._idle.put(connection)
        self._threads = threads

    def submit(self, batch: RawBatch) -> Future[BatchResult]:
        return self._threads.submit(self._run, batch)

    def _run(self, batch: RawBatch) -> BatchResult:
        connection = self._idle.get()
        try:
            connection.send(batch)
            result = connection.recv()
        except (EOFError, OSError) as error:
            raise DataError(
                "a tokenizing process was killed (out of memory?); try fewer --processes"
            ) from error
        finally:
            self._idle.put(connection)
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, BatchResult)
        return result


@contextlib.contextmanager
def _pool(job: Job, processes: int) -> Iterator[_Pool]:
    # Forking a process whose tokenizer library has run threads can deadlock, so start from scratch.
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    children: list[SpawnProcess] = []
    threads = ThreadPoolExecutor(processes)
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(theirs, job), daemon=True)
            child.start()
            theirs.close()
            connections.append(ours)
            children.append(child)
        yield _Pool(connections, threads)
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        for connection in connections:
            connection.close()
        for child in children:
            child.join(STOP_TIMEOUT_S)
            if child.is_alive():
                child.terminate()
                child.join()


def _serve(connection: Connection, job: Job) -> None:
    """Answer each batch with its result or with the error, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    use_one_thread()
    worker = Worker(job)
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_answer(worker, connection.recv()))


def _answer(worker: Worker, batch: RawBatch) -> BatchResult | Exception:
    try:
        return worker(batch)
    except DataError as error:
        return error
    except OSError as error:  # its file name is lost when it is pickled
        return DataError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ValueError, TypeError, RuntimeError) as error:
        error.add_note(traceback.format_exc())
        return error
