"""Save and load a sharded training state with all ranks (torch.distributed.checkpoint over the store).

Every phase of a save is agreed: a rank that fails makes all ranks give the save up together, and the
checkpoints before it stay as they were. The same code writes synchronously and in a background
thread; the thread works on a CPU copy and talks over a gloo group of its own.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from trainer.checkpoint.agreement import RankLostError, Ranks
from trainer.checkpoint.dcp_files import RecordingWriter, SafeLoadPlanner, SafeReader
from trainer.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore, SaveError

LOGGER = logging.getLogger(__name__)
_STATE_FILE = "state.json"
_CONFIG_FILE = "config.yaml"


class WriterLostError(SaveError):
    """The background writer of some rank died; later saves are synchronous."""


@dataclass(frozen=True, slots=True)
class SaveResult:
    """How one save ended."""

    step: int
    checkpoint: Checkpoint | None
    """What was committed; None when the save was abandoned."""
    error: SaveError | None
    """Why it was abandoned. The run can go on: earlier checkpoints are intact."""
    seconds: float
    """From the call of save to the commit."""
    stall_s: float
    """Seconds of it that the caller was blocked."""
    asynchronous: bool
    """Written by the background thread."""


@dataclass(frozen=True, slots=True)
class SavedRun:
    """A verified checkpoint and everything in it but the tensors."""

    checkpoint: Checkpoint
    extra: dict[str, Any]
    """The run state given to save."""
    rank_extra: dict[str, Any] | None
    """This rank's own state; None when the checkpoint was written by fewer ranks."""
    config_text: str
    """The resolved configuration given to save."""


@dataclass(frozen=True, slots=True)
class _Job:
    step: int
    tensors: dict[str, Any]
    files: dict[str, bytes]
    """This rank's small files, by name."""
    info: dict[str, Any]
    loss: float | None
    started: float


class Checkpointer:
    """Saves and loads the state of one run; every method but :meth:`poll` is collective.

    Creating it is collective too (two gloo groups). Without a process group it is one rank, and
    saves synchronously.

    Args:
        store: Where checkpoints live; a file system that all ranks share.
        timeout_s: Seconds that a rank waits for the slowest other one within a phase of a save.
    """

    def __init__(self, store: CheckpointStore, *, timeout_s: float = 1800.0) -> None:
        self._store = store
        self._ranks = Ranks(timeout_s)
        self._writer_ranks: Ranks | None = Ranks(timeout_s)
        if self._writer_ranks.group is None:
            self._writer_ranks = None
        self._stager: DefaultStager | None = None
        self._thread: threading.Thread | None = None
        self._thread_job: _Job | None = None
        self._thread_result: SaveResult | None = None
        self._stall_s = 0.0
        self._finished: list[SaveResult] = []

    # Saving

    def recover(self) -> None:
        """Remove what dead writers left behind. Call it once before training, with the run's lock held.

        Raises:
            CheckpointError: The directory cannot be created or cleaned.
        """
        self._ranks.on_main("recover", self._store.recover)

    def save(
        self,
        step: int,
        tensors: dict[str, Any],
        extra: Mapping[str, Any],
        *,
        config_text: str,
        rank_extra: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        loss: float | None = None,
        wait: bool = True,
    ) -> None:
        """Save a checkpoint. How it ended, a full disk included, is told by :meth:`poll`, not raised.

        An earlier save that is still being written is waited for: at most one is in flight.

        Args:
            step: Optimizer steps done.
            tensors: Nested state dict of DTensors, tensors and plain values, keys alike on all ranks.
                With ``wait=False`` it may be changed as soon as this returns.
            extra: JSON-able state of the run (tokens, data cursor, ...); rank 0's is stored.
            config_text: Resolved configuration (YAML); rank 0's is stored.
            rank_extra: JSON-able state of this rank (random generators).
            info: JSON-able facts for the checkpoint's summary (code version); rank 0's is stored.
            loss: Validation loss in nats, if it is known.
            wait: Write before returning; otherwise copy to the CPU and write in the background.

        Raises:
            CheckpointError: Another rank is gone.
        """
        started = time.perf_counter()
        self._join()
        try:
            asynchronous = not wait and self._all_can_write_in_background()
            files = self._ranks.agree("encode", partial(self._encode, extra, rank_extra, config_text))
            if asynchronous:
                tensors = self._ranks.agree("copy to the CPU", partial(self._stage, tensors))
        except RankLostError:
            raise
        except CheckpointError as error:
            seconds = time.perf_counter() - started
            abandoned = SaveError(f"step {step} not saved: {error}")
            self._finished.append(SaveResult(step, None, abandoned, seconds, seconds, asynchronous=False))
            return
        job = _Job(step, tensors, files, dict(info or {}), loss, started)
        if asynchronous:
            self._start_thread(job)
        else:
            result = _attempt(self._store, self._ranks, job)
            self._finished.append(replace(result, stall_s=result.seconds))

    def poll(self) -> list[SaveResult]:
        """Results of saves that have ended since the last call. Not collective, does not block."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> list[SaveResult]:
        """Wait for a save in flight and return the results not yet polled."""
        self._join()
        if self._stager is not None:
            self._stager.close()
            self._stager = None
        return self.poll()

    # Loading

    def find_newest(self) -> SavedRun | None:
        """Agree on the newest good checkpoint; its bytes are verified, the reading split over the ranks.

        Bad checkpoints are quarantined with their reasons.

        Returns:
            The same checkpoint on all ranks, or None when none was ever committed.

        Raises:
            CheckpointError: There are checkpoints, but none is good.
        """
        ranks = self._ranks
        while (step := ranks.on_main("find", self._store.newest_step)) is not None:
            share = partial(self._store.find_problems, step, part=ranks.rank, parts=ranks.size)
            problems = sorted({line for lines in ranks.collect("verify", share) for line in lines})
            if not problems:
                return ranks.agree("read", partial(_read_saved, self._store, step, ranks.rank))
            ranks.on_main("quarantine", partial(self._store.quarantine, step, problems))
        return None

    def load(self, saved: SavedRun, tensors: dict[str, Any], *, partial_state: bool = False) -> None:
        """Read the tensors of a checkpoint into ``tensors``, in place, whatever ranks wrote it.

        Args:
            saved: What :meth:`find_newest` returned.
            tensors: Nested state dict of the present layout; plain values are replaced in it.
            partial_state: ``tensors`` asks for a part of the checkpoint (a model without optimizer).

        Raises:
            CheckpointError: Names or shapes do not match, or the checkpoint holds forbidden pickles.
        """
        self._ranks.collect(
            "load", partial(_load_tensors, saved.checkpoint.path, tensors, self._ranks, partial_state)
        )

    # Internals

    def _all_can_write_in_background(self) -> bool:
        return all(self._ranks.collect("choose the writer", lambda: self._writer_ranks is not None))

    def _encode(
        self, extra: Mapping[str, Any], rank_extra: Mapping[str, Any] | None, config_text: str
    ) -> dict[str, bytes]:
        files = {_rank_file(self._ranks.rank): _to_json(rank_extra or {})}
        if self._ranks.rank == 0:
            files |= {_STATE_FILE: _to_json(extra), _CONFIG_FILE: config_text.encode()}
        return files

    def _start_thread(self, job: _Job) -> None:
        self._thread_job = job
        self._thread = threading.Thread(
            target=self._write_in_background, args=(job,), name="checkpoint-writer", daemon=True
        )
        self._thread.start()
        self._stall_s = time.perf_counter() - job.started

    def _stage(self, tensors: dict[str, Any]) -> dict[str, Any]:
        if self._stager is None:
            cuda = torch.cuda.is_available()
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=cuda,
                )
            )
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)
        return staged

    def _write_in_background(self, job: _Job) -> None:
        assert self._writer_ranks is not None
        try:
            self._thread_result = _attempt(self._store, self._writer_ranks, job)
        except BaseException as error:  # the missing result tells the main thread, whatever it was
            # As text: a log handler that keeps the exception keeps its frames, and those the connections.
            reason = f"{type(error).__name__}: {error}"
            LOGGER.warning("step %d: the background writer died: %s", job.step, reason)

    def _join(self) -> None:
        if self._thread is None:
            return
        assert self._thread_job is not None
        self._thread.join()
        result, job = self._thread_result, self._thread_job
        self._thread, self._thread_result, self._thread_job = None, None, None
        if result is None:
            self._leave_writer_group()
            lost = WriterLostError(
                f"step {job.step} not saved: the background writer died; saves are synchronous now"
            )
            result = SaveResult(
                job.step, None, lost, time.perf_counter() - job.started, 0.0, asynchronous=True
            )
        self._finished.append(replace(result, stall_s=self._stall_s, asynchronous=True))

    def _leave_writer_group(self) -> None:
        """Close this rank's connections, so that the other writers fail now and not at their timeout."""
        ranks, self._writer_ranks = self._writer_ranks, None
        if ranks is not None:
            ranks.leave()


def load_newest_model(root: Path, weights: dict[str, torch.Tensor], *, after: int = -1) -> Checkpoint | None:
    """Read a model's weights from the newest good checkpoint of a run, in place; nothing there is changed.

    Unlike :meth:`Checkpointer.find_newest` this may be called beside the run's own process: a damaged
    checkpoint is passed over, not put into quarantine.

    Args:
        root: The run's directory of checkpoints.
        weights: Whole tensors by parameter name, whatever layout and engine wrote the checkpoint.
        after: Look at checkpoints of later steps alone.

    Returns:
        The checkpoint, or None when there is no good one.

    Raises:
        CheckpointError: Names or shapes do not match, or the run removed it while it was read.
    """
    store, alone = CheckpointStore(root), Ranks(0.0)
    for step in reversed(store.steps()):
        if step <= after:
            break
        if store.find_problems(step):
            continue
        found = store.read(step)
        alone.agree("load", partial(_load_tensors, found.path, {"model": weights}, alone, partial_state=True))
        return found
    return None


def _attempt(store: CheckpointStore, ranks: Ranks, job: _Job) -> SaveResult:
    """Write one checkpoint, or give it up on all ranks; RankLostError when they cannot agree any more."""
    checkpoint, abandoned = None, None
    try:
        checkpoint = _write(store, ranks, job)
    except RankLostError:
        raise
    except CheckpointError as error:
        abandoned = SaveError(f"step {job.step} not saved: {error}")
    seconds = time.perf_counter() - job.started
    return SaveResult(job.step, checkpoint, abandoned, seconds, stall_s=0.0, asynchronous=False)


def _write(store: CheckpointStore, ranks: Ranks, job: _Job) -> Checkpoint:
    directory = ranks.on_main("begin", partial(store.begin, job.step))
    try:
        writer = RecordingWriter(directory)
        ranks.agree("write", partial(_save_tensors, job.tensors, writer, ranks))
        ranks.agree("seal", partial(_seal, store, directory, ranks.rank, job.files, writer.written))
        commit = partial(store.commit, step=job.step, world_size=ranks.size, info=job.info, loss=job.loss)
        return ranks.on_main("commit", partial(commit, directory))
    except CheckpointError:
        if ranks.rank == 0:
            store.abandon(directory)
        raise


def _save_tensors(tensors: dict[str, Any], writer: RecordingWriter, ranks: Ranks) -> None:
    with _quiet_single_process(ranks):
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.group is None)


def _seal(
    store: CheckpointStore, directory: Path, rank: int, files: dict[str, bytes], written: set[str]
) -> None:
    for name, content in files.items():
        (directory / name).write_bytes(content)
    store.seal(directory, rank=rank, names=written | files.keys())


def _read_saved(store: CheckpointStore, step: int, rank: int) -> SavedRun:
    checkpoint = store.read(step)
    path = checkpoint.path
    has_own = rank < checkpoint.world_size
    return SavedRun(
        checkpoint=checkpoint,
        extra=json.loads((path / _STATE_FILE).read_bytes()),
        rank_extra=json.loads((path / _rank_file(rank)).read_bytes()) if has_own else None,
        config_text=(path / _CONFIG_FILE).read_text(),
    )


def _load_tensors(path: Path, tensors: dict[str, Any], ranks: Ranks, partial_state: bool) -> None:
    reader = SafeReader(path)
    reader.read_metadata()  # refused here, because within load the library logs a traceback and tries again
    with _quiet_single_process(ranks):
        dcp.load(
            tensors,
            storage_reader=reader,
            planner=SafeLoadPlanner(partial_state=partial_state),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )


def _rank_file(rank: int) -> str:
    return f"rank_{rank}.json"


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


@contextmanager
def _quiet_single_process(ranks: Ranks) -> Generator[None, None, None]:
    if ranks.group is not None:
        # catch_warnings changes the whole process, which the background thread must not do.
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
