"""Checkpoint directories: written aside, committed by one rename, verified byte by byte (torch-free).

Layout below the root (``RUN/checkpoints``)::

    step_00001000/        a committed checkpoint
        COMMITTED         summary: step, world size, info, hash of every manifest
        manifest_0.json   name, bytes and xxh3-128 of each file that rank 0 wrote
        ...               the files themselves
    quarantine/           checkpoints that failed verification, each beside its reason
    losses.json           validation losses that became known after the commit
    .tmp-step_...         being written; never read
    .replaced-step_...    the former holder of a step, for the instant of its replacement

A name ``step_*`` appears only by the rename of a complete, fsynced directory, so whatever is wrong
inside one was damaged later. The caller holds the run directory's lock: one run writes here at a time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

LOGGER = logging.getLogger(__name__)
SUMMARY = "COMMITTED"
_STEP = re.compile(r"step_(\d{8,})")
_BLOCK_BYTES = 4 << 20


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, trusted or used; the text is one line."""


class SaveError(CheckpointError):
    """One save failed on some rank and was given up on all; earlier checkpoints are intact."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint."""

    step: int
    """Optimizer steps that its state has seen."""
    path: Path
    """Its directory."""
    world_size: int
    """Ranks that wrote it."""
    info: dict[str, Any]
    """What :meth:`CheckpointStore.commit` was given."""
    loss: float | None
    """Validation loss in nats, when it was known at the commit."""


class CheckpointStore:
    """The checkpoints of one run on a file system that all its ranks share.

    One save is :meth:`begin` (rank 0), files written into the returned directory, :meth:`seal` (each
    rank), :meth:`commit` (rank 0); or :meth:`abandon` (rank 0) instead of the last.

    Args:
        root: Directory of the checkpoints.
        keep_last: Newest checkpoints that retention keeps, at least 1.
        keep_every_steps: Checkpoints at multiples of this step are kept for ever; 0 keeps none.
    """

    def __init__(self, root: Path, *, keep_last: int = 2, keep_every_steps: int = 0) -> None:
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={keep_last} must be at least 1")
        if keep_every_steps < 0:
            raise ValueError(f"checkpoint.keep_every_steps={keep_every_steps} must be at least 0")
        self.root = Path(root)
        self.quarantine_root = self.root / "quarantine"
        self._keep_last = keep_last
        self._keep_every_steps = keep_every_steps
        self._losses_path = self.root / "losses.json"

    # Writing

    def recover(self) -> None:
        """Clean up after a writer that died: remove what it left unfinished, undo half a replacement."""
        self.root.mkdir(parents=True, exist_ok=True)
        for former in self.root.glob(".replaced-step_*"):
            final = self.root / former.name.removeprefix(".replaced-")
            if final.exists():
                shutil.rmtree(former, ignore_errors=True)
            else:
                former.rename(final)
        for leftover in self.root.glob(".tmp-*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        _fsync(self.root)

    def begin(self, step: int) -> Path:
        """Create a fresh hidden directory for the checkpoint of ``step`` and return it.

        At most one save is in flight, so every other hidden directory belongs to a dead writer.
        """
        if step < 0:
            raise ValueError(f"step={step} must be at least 0")
        self.recover()
        directory = self.root / f".tmp-{_step_name(step)}-{uuid.uuid4().hex[:12]}"
        directory.mkdir()
        return directory

    def seal(self, directory: Path, *, rank: int, names: Iterable[str]) -> None:
        """Make ``names``, the files that ``rank`` wrote, durable and list them in its manifest."""
        paths = [directory / name for name in sorted(set(names))]
        with ThreadPoolExecutor(max_workers=_num_threads()) as pool:
            digests = list(pool.map(_fsync_and_digest, paths))
        files = {path.name: digest for path, digest in zip(paths, digests, strict=True)}
        _write_durably(directory / _manifest_name(rank), _to_json({"rank": rank, "files": files}))

    def commit(
        self,
        directory: Path,
        *,
        step: int,
        world_size: int,
        info: Mapping[str, Any] | None = None,
        loss: float | None = None,
    ) -> Checkpoint:
        """Turn a sealed directory into the checkpoint of ``step``, then apply retention.

        A former checkpoint of the same step (from before a rewind) is replaced.

        Args:
            directory: What :meth:`begin` returned.
            step: The step it was begun for.
            world_size: Number of ranks, each of which has sealed its files.
            info: JSON-able facts for the summary (code version, tokens, ...).
            loss: Validation loss in nats, if it is known.

        Raises:
            CheckpointError: A manifest is missing, or the files are not exactly those listed.
            OSError: The summary or the rename failed.
        """
        stored_info = dict(info or {})
        summary = {
            "step": step,
            "world_size": world_size,
            "info": stored_info,
            "loss": loss,
            "manifests": self._check_manifests(directory, world_size),
        }
        _write_durably(directory / SUMMARY, _sign(summary))
        _fsync(directory)
        final = self.root / _step_name(step)
        former = self.root / f".replaced-{final.name}"
        if final.exists():
            final.rename(former)
        directory.rename(final)
        _fsync(self.root)
        self._retain(just_committed=step, removable=former)
        return Checkpoint(step, final, world_size, stored_info, loss)

    def abandon(self, directory: Path) -> None:
        """Remove an unfinished save; what cannot be removed now is removed by the next :meth:`begin`."""
        shutil.rmtree(directory, ignore_errors=True)

    def mark_best(self, step: int, loss: float) -> None:
        """Record the validation loss (nats) of the checkpoint of ``step``; retention keeps the lowest.

        The step may still be in flight. A record of a step that was never committed has no effect.
        """
        newest = max(self.steps(), default=-1)
        known = {s: v for s, v in self._recorded_losses().items() if s > newest or self._path(s).exists()}
        text = json.dumps({str(s): v for s, v in sorted({**known, step: loss}.items())}) + "\n"
        temporary = self.root / f".tmp-losses-{uuid.uuid4().hex[:12]}"
        _write_durably(temporary, text.encode())
        temporary.rename(self._losses_path)
        _fsync(self.root)

    # Reading

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending. Their bytes are not looked at."""
        if not self.root.exists():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def newest_good(self) -> Checkpoint | None:
        """Verify from the newest checkpoint down, quarantine bad ones, return the first good one.

        Returns:
            The checkpoint, or None when none was ever committed here.

        Raises:
            CheckpointError: There are checkpoints, but none of them is good.
        """
        while (step := self.newest_step()) is not None:
            problems = self.find_problems(step)
            if not problems:
                return self.read(step)
            self.quarantine(step, problems)
        return None

    def newest_step(self) -> int | None:
        """Step of the newest committed checkpoint, unverified; None when none was ever committed here.

        Raises:
            CheckpointError: Every checkpoint that was committed is in quarantine.
        """
        steps = self.steps()
        if not steps and self.quarantine_root.exists() and any(self.quarantine_root.iterdir()):
            raise CheckpointError(
                f"{self.root}: no checkpoint is good, all are in {self.quarantine_root} with their reasons; "
                "repair one, or set another run.dir to start afresh"
            )
        return steps[-1] if steps else None

    def read(self, step: int) -> Checkpoint:
        """Read the summary of the checkpoint of ``step``.

        Raises:
            CheckpointError: The summary is missing or damaged.
        """
        path = self._path(step)
        try:
            body = _read_signed(path / SUMMARY)
            if body["step"] != step:
                raise ValueError(f"it is of step {body['step']}")
            return Checkpoint(step, path, body["world_size"], body["info"], body["loss"])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path / SUMMARY}: {_one_line(error)}") from error

    def find_problems(self, step: int, *, part: int = 0, parts: int = 1) -> list[str]:
        """Compare every byte of the checkpoint of ``step`` with what was committed.

        Args:
            step: A committed step.
            part: Which share of the files to hash, 0 to ``parts - 1``; every part checks all names.
            parts: Number of shares, so that ranks can split the reading.

        Returns:
            One line per problem; empty when the checkpoint (this part of it) is good.
        """
        path = self._path(step)
        try:
            self.read(step)
            listed, expected_names = self._read_listed(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            return [_one_line(error)]
        present = {entry.name for entry in path.iterdir()}
        problems = [f"{name}: missing" for name in sorted(expected_names - present)]
        problems += [f"{name}: not listed in any manifest" for name in sorted(present - expected_names)]
        by_size = sorted(listed, key=lambda name: (-listed[name]["bytes"], name))
        mine = [name for name in by_size[part::parts] if name in present]
        with ThreadPoolExecutor(max_workers=_num_threads()) as pool:
            found = pool.map(lambda name: _find_damage(path / name, listed[name]), mine)
            problems += [problem for problem in found if problem]
        return problems

    def quarantine(self, step: int, problems: Iterable[str]) -> Path:
        """Move the checkpoint of ``step`` to ``quarantine/`` and write the reason beside it.

        Raises:
            CheckpointError: It cannot be moved.
        """
        path = self._path(step)
        target = self.quarantine_root / path.name
        try:
            self.quarantine_root.mkdir(exist_ok=True)
            if target.exists():
                target = target.with_name(f"{path.name}-{uuid.uuid4().hex[:12]}")
            path.rename(target)
            _fsync(self.root)
        except OSError as error:
            raise CheckpointError(
                f"{path}: bad, and cannot be moved to {target}: {error.strerror}"
            ) from error
        try:
            _write_durably(target.with_name(f"{target.name}.reason"), ("\n".join(problems) + "\n").encode())
            _fsync(self.quarantine_root)
        except OSError as error:
            LOGGER.warning("%s: the reason for the quarantine could not be written: %s", target, error)
        return target

    # Internals

    def _path(self, step: int) -> Path:
        return self.root / _step_name(step)

    def _check_manifests(self, directory: Path, world_size: int) -> dict[str, str]:
        """Hash of each rank's manifest, after a check that they list exactly the files present."""
        digests, listed = {}, set()
        for rank in range(world_size):
            manifest = directory / _manifest_name(rank)
            if not manifest.exists():
                raise CheckpointError(
                    f"{manifest}: missing, rank {rank} of {world_size} has not sealed its files"
                )
            content = manifest.read_bytes()
            digests[manifest.name] = _digest(content)
            for name, entry in json.loads(content)["files"].items():
                listed.add(name)
                if (size := (directory / name).stat().st_size) != entry["bytes"]:
                    raise CheckpointError(
                        f"{directory / name}: {size} bytes, {entry['bytes']} when it was sealed"
                    )
        present = {entry.name for entry in directory.iterdir()} - digests.keys()
        if present != listed:
            raise CheckpointError(
                f"{directory}: {sorted(present ^ listed)} written but not sealed, or the reverse"
            )
        return digests

    def _read_listed(self, path: Path) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """Manifest entries by file name, and all names that must be present. Raises on any damage."""
        listed: dict[str, dict[str, Any]] = {}
        manifests: dict[str, str] = _read_signed(path / SUMMARY)["manifests"]
        for name, digest in manifests.items():
            content = (path / name).read_bytes()
            if _digest(content) != digest:
                raise CheckpointError(f"{name}: hash differs from the one in {SUMMARY}")
            listed |= json.loads(content)["files"]
        return listed, listed.keys() | manifests.keys() | {SUMMARY}

    def _recorded_losses(self) -> dict[int, float]:
        try:
            return {
                int(step): float(loss) for step, loss in json.loads(self._losses_path.read_bytes()).items()
            }
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _losses(self, steps: Iterable[int]) -> dict[int, float]:
        losses = {}
        for step in steps:
            try:
                losses[step] = self.read(step).loss
            except CheckpointError:
                continue
        known = {**losses, **{s: v for s, v in self._recorded_losses().items() if s in losses}}
        return {step: loss for step, loss in known.items() if loss is not None and math.isfinite(loss)}

    def _retain(self, *, just_committed: int, removable: Path) -> None:
        """Remove what retention does not keep. Its failure does not undo a commit."""
        try:
            shutil.rmtree(removable, ignore_errors=True)
            steps = self.steps()
            kept = steps_to_keep(
                steps,
                keep_last=self._keep_last,
                keep_every_steps=self._keep_every_steps,
                losses=self._losses(steps),
            )
            for step in set(steps) - kept - {just_committed}:
                # Renamed first: a crash halfway through the removal must not leave a torn ``step_*``.
                doomed = self.root / f".tmp-removed-{_step_name(step)}-{uuid.uuid4().hex[:12]}"
                self._path(step).rename(doomed)
                _fsync(self.root)
                shutil.rmtree(doomed, ignore_errors=True)
        except OSError as error:
            LOGGER.warning("%s: old checkpoints could not be removed: %s", self.root, error)


def steps_to_keep(
    steps: Iterable[int],
    *,
    keep_last: int,
    keep_every_steps: int = 0,
    losses: Mapping[int, float] | None = None,
) -> set[int]:
    """Steps that retention keeps: the newest ``keep_last``, multiples of ``keep_every_steps``, the best.

    Args:
        steps: Committed steps.
        keep_last: Number of newest ones.
        keep_every_steps: 0 keeps no multiples.
        losses: Validation loss by committed step; the lowest wins, the later one at a tie.
    """
    ordered = sorted(steps)
    kept = set(ordered[-keep_last:])
    if keep_every_steps:
        kept |= {step for step in ordered if step % keep_every_steps == 0}
    if losses:
        kept.add(min(losses, key=lambda step: (losses[step], -step)))
    return kept


def _step_name(step: int) -> str:
    return f"step_{step:08d}"


def _manifest_name(rank: int) -> str:
    return f"manifest_{rank}.json"


def _num_threads() -> int:
    return min(8, os.cpu_count() or 1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _digest(content: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(content))


def _sign(body: Mapping[str, Any]) -> bytes:
    return _to_json({**body, "xxh3_128": _digest(_to_json(body))})


def _read_signed(path: Path) -> dict[str, Any]:
    """Read what :func:`_sign` wrote; ValueError when one byte of it differs."""
    content = path.read_bytes()
    body = json.loads(content)
    if not isinstance(body, dict):
        raise ValueError("not a JSON object")
    body.pop("xxh3_128", None)
    if _sign(body) != content:
        raise ValueError("damaged: its own hash does not match")
    return body


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_file(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
    return str(hasher.hexdigest())


def _fsync_and_digest(path: Path) -> dict[str, Any]:
    _fsync(path)
    return {"bytes": path.stat().st_size, "xxh3_128": _hash_file(path)}


def _find_damage(path: Path, entry: Mapping[str, Any]) -> str | None:
    """One line about how the file differs from its manifest entry, or None."""
    try:
        if path.is_symlink() or not path.is_file():
            return f"{path.name}: not a regular file"
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"{path.name}: {size} bytes, {entry['bytes']} were written"
        if _hash_file(path) != entry["xxh3_128"]:
            return f"{path.name}: hash differs from the manifest's"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None
