"""Tokenizing batches of documents in several processes, results in the order of the corpus."""

from __future__ import annotations

import contextlib
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

from data.corpus import RawBatch, parse_batch
from data.manifest import DataError
from data.tokenizer import Tokenizer, use_one_thread

STOP_TIMEOUT_S = 5.0
BATCHES_AHEAD_PER_PROCESS = 2


@dataclass(frozen=True, slots=True)
class TokenizedBatch:
    """The documents of one batch as tokens."""

    tokens: np.ndarray
    """(N,) uint32, the documents one after the other, each ended by the end-of-text token."""
    lengths: np.ndarray
    """(documents,) int64, tokens of each document with its end-of-text token."""


def tokenize_batch(tokenizer: Tokenizer, batch: RawBatch, text_field: str) -> TokenizedBatch:
    """Parse and tokenize one batch.

    Raises:
        DataError: a document that cannot be parsed.
    """
    ids = tokenizer.encode_batch(parse_batch(batch, text_field))
    eot = np.array([tokenizer.eot_id], dtype=np.uint32)
    pieces = [piece for document in ids for piece in (document, eot)]
    tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint32)
    return TokenizedBatch(tokens, np.array([len(document) + 1 for document in ids], dtype=np.int64))


def tokenize_batches(
    tokenizer: Tokenizer, batches: Iterable[RawBatch], text_field: str, processes: int
) -> Iterator[tuple[RawBatch, TokenizedBatch]]:
    """Yield every batch with its tokens, in order; ``processes`` changes the speed, never the result.

    Raises:
        DataError: a document that cannot be parsed, or a process that was killed.
    """
    if processes == 1:
        use_one_thread()
        for batch in batches:
            yield batch, tokenize_batch(tokenizer, batch, text_field)
        return
    with _pool(tokenizer, text_field, processes) as pool:
        waiting: deque[tuple[RawBatch, Future[TokenizedBatch]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(batch)))
            if len(waiting) >= processes * BATCHES_AHEAD_PER_PROCESS:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


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

    def submit(self, batch: RawBatch) -> Future[TokenizedBatch]:
        return self._threads.submit(self._run, batch)

    def _run(self, batch: RawBatch) -> TokenizedBatch:
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
        assert isinstance(result, TokenizedBatch)
        return result


@contextlib.contextmanager
def _pool(tokenizer: Tokenizer, text_field: str, processes: int) -> Iterator[_Pool]:
    # Forking a process whose tokenizer library has run threads can deadlock, so start from scratch.
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    children: list[SpawnProcess] = []
    threads = ThreadPoolExecutor(processes)
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            child = context.Process(
                target=_serve, args=(theirs, tokenizer.json_bytes, text_field), daemon=True
            )
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


def _serve(connection: Connection, tokenizer_json: bytes, text_field: str) -> None:
    """Answer each batch with its tokens or with the error, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    use_one_thread()
    tokenizer = Tokenizer(tokenizer_json, "tokenizer.json")
    with contextlib.suppress(EOFError, OSError):
        while True:
            batch = connection.recv()
            try:
                connection.send(tokenize_batch(tokenizer, batch, text_field))
            except DataError as error:
                connection.send(error)
            except (ValueError, TypeError, RuntimeError) as error:
                error.add_note(traceback.format_exc())
                connection.send(error)
