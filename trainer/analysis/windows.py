"""Validation windows for a trained model: whose tokens they are, and how far a command is through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data.batch import Batch
from data.config import DataConfig
from data.loader import validation_batches
from data.progress import Progress
from data.source import open_source
from trainer.analysis.trained import TrainedModel


def validation_sources(trained: TrainedModel, folders: Sequence[str]) -> dict[str, DataConfig]:
    """Shard folders to read, by name: those given, or the run's own.

    Raises:
        ValueError: none is given for a model folder, or two folders have one name.
    """
    seq_len = trained.model.config.n_positions
    if trained.config is not None:
        if not folders:
            return trained.config.data.by_source
        seq_len = trained.config.data.seq_len
    if not folders:
        raise ValueError(f"{trained.path}: is no run directory, so --data must name a shard folder")
    names = [Path(folder).name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--data: two folders are called {name}, their reports would be mixed up")
    return {
        name: DataConfig(dir=folder, seq_len=seq_len) for name, folder in zip(names, folders, strict=True)
    }


def validation_windows(
    trained: TrainedModel, config: DataConfig, label: str, *, share: float, rows: int
) -> Iterator[Batch]:
    """Batches of the first ``share`` of the validation windows; progress goes to stderr as ``label``.

    Raises:
        ValueError: tokens of another tokenizer, or an unreadable share; before the first batch.
        DataError, OSError: missing or damaged files.
    """
    manifest = open_source(config).manifest
    if manifest.tokenizer.sha256 != trained.tokenizer.sha256:
        raise ValueError(
            f"{config.dir}: its tokens were made by tokenizer {manifest.tokenizer.sha256[:12]}..., those of "
            f"{trained.path} by {trained.tokenizer.sha256[:12]}...: losses would mean nothing"
        )
    batches = validation_batches(config, share=share, rows=rows, rank=0, world_size=1)
    tokens = max(1, int(manifest.splits["val"].tokens * share))
    return _counted(batches, config.seq_len, Progress(label, tokens, unit="ktokens", per_unit=1e3), tokens)


def _counted(batches: Iterator[Batch], seq_len: int, progress: Progress, total: int) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done += batch.num_rows * seq_len
        progress.update(min(done, total))
    progress.close()
