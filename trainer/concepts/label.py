"""``python -m trainer.concepts.label --config configs/69m.yaml``: targets of all windows, once and for all.

Computes the concept targets of every training and validation window and stores them beside the token
shards, two bytes per target. A run with ``concepts.source=cache`` reads them and needs neither teacher nor
autoencoder.

Any number of these processes share the work, as ranks of torchrun or as jobs of their own, wherever they see
the same folder. One that is killed loses the chunk that it was at; the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.cli import run_cli
from data.config import DataConfig, is_remote
from data.label_cache import LABELS_NAME, LabelSettings, read_labels
from data.label_writer import LabelWriter
from data.manifest import DataError
from data.progress import Progress
from data.source import open_source, windows_per_chunk
from data.stream import read_chunk
from parallel.world import World, start_world, stop_world
from trainer.build import document_end
from trainer.concepts.cache import label_settings, labels_places
from trainer.concepts.extractor import TargetExtractor, check_vocabulary, pack_ids
from trainer.config import RunConfig
from trainer.config_io import ConfigError, load_config
from trainer.main import config_parser
from trainer.model.documents import split_windows

SPLITS = ("train", "val")


def label(config: RunConfig, world: World, *, overwrite: bool = False) -> bool:
    """Label what nobody else labels, source after source; returns whether all folders are finished.

    Raises:
        ValueError, DataError, OSError: the configuration, what it names and the folder do not fit together.
    """
    assert config.concepts is not None
    places = labels_places(config.concepts, config.data)
    for place in places.values():
        if is_remote(place):
            raise ValueError(f"concepts.labels={place} must be a folder: labels are written to no URL")
    parts = config.data.by_source
    finished = [
        label_source(config, parts[name], Path(places[name]), world, overwrite=overwrite) for name in parts
    ]
    return all(finished)


def label_source(
    config: RunConfig, data: DataConfig, folder: Path, world: World, *, overwrite: bool = False
) -> bool:
    """Label the windows of one source.

    Args:
        config: of the run that will read the targets.
        data: its data section of this source alone.
        folder: of the labels.
        world: this process.
        overwrite: replace labels that were made with other settings.

    Raises:
        ValueError, DataError, OSError: as :func:`label`.
    """
    assert config.concepts is not None
    storage, manifest = open_source(data)
    rows = config.train.microbatch_size
    settings = label_settings(config.concepts, data, manifest, rows_per_pass=rows)
    if not overwrite and is_finished(folder, settings):
        return True
    # Runs that have a concept after every so many tokens read theirs out of the same labels.
    extractor = TargetExtractor.load(replace(config.concepts, every=1), world.device)
    end_id = document_end(config, manifest)
    vocab_size = manifest.tokenizer.vocab_size
    check_vocabulary(extractor.teacher, vocab_size, data.seq_len, config.concepts.teacher)
    windows = {split: windows_per_chunk(manifest, split, data.seq_len) for split in SPLITS}
    writer = LabelWriter(folder, settings, windows, overwrite=overwrite)
    try:
        progress = _LabelProgress(writer, data.seq_len, shown=world.is_main)
        for split, number in writer.claims():
            tokens = read_chunk(storage, manifest.dtype, *manifest.splits[split].chunks[number])
            ids = label_chunk(extractor, tokens, data.seq_len, rows, world.device, progress.advance, end_id)
            writer.write(split, number, ids)
            progress.end_of_chunk()
        progress.close()
        return writer.finish()
    finally:
        writer.close()


def is_finished(folder: Path, settings: LabelSettings) -> bool:
    """Whether a folder holds all of these labels; it may be read-only then."""
    try:
        labels = read_labels(folder)
        labels.check(settings)
        for name, size in labels.files():
            labels.storage.check_size(name, size)
    except DataError:
        return False
    return True


def label_chunk(
    extractor: TargetExtractor,
    tokens: np.ndarray,
    seq_len: int,
    rows: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda windows: None,
    end_id: int | None = None,
) -> np.ndarray:
    """Targets of all windows of one chunk.

    Every pass has ``rows`` windows, the last one too, which repeats the chunk's last window: the shape of a
    training microbatch, and so its kernels. The host waits for the device at the end of the chunk only.

    Args:
        extractor: tokens -> targets.
        tokens: (tokens,) unsigned integers of the chunk.
        seq_len: T.
        rows: windows of a pass.
        device: where the extractor computes.
        advance: told how many windows each pass added.
        end_id: token that ends a document, where the teacher reads each as if it were alone.

    Returns:
        (windows, T, A) uint16.
    """
    windows = torch.from_numpy(tokens.astype(np.int64)).to(device).unfold(0, seq_len + 1, seq_len)
    passes: list[Tensor] = []
    for start in range(0, len(windows), rows):
        index = torch.arange(start, start + rows, device=device).clamp_max(len(windows) - 1)
        passes.append(pack_ids(extractor(*split_windows(windows[index], end_id))))
        advance(min(rows, len(windows) - start))
    packed = torch.cat(passes)[: len(windows)].cpu()
    return packed.view(torch.uint16).numpy()


class _LabelProgress:
    """Progress over all processes: what is in the folder, and what this one has not yet stored."""

    def __init__(self, writer: LabelWriter, seq_len: int, *, shown: bool) -> None:
        self._writer, self._seq_len, self._shown = writer, seq_len, shown
        self._found, self._own = writer.windows_found(), 0
        self._progress = Progress("labelling", writer.num_windows * seq_len, unit="ktokens", per_unit=1e3)
        self._progress.skip(self._found * seq_len)

    def advance(self, windows: int) -> None:
        self._own += windows
        if self._shown:
            self._progress.update((self._found + self._own) * self._seq_len)

    def end_of_chunk(self) -> None:
        if self._shown:
            self._found, self._own = self._writer.windows_found(), 0

    def close(self) -> None:
        if self._shown:
            self._progress.close(f"{self._found:,} windows have labels")


def _main(args: argparse.Namespace) -> None:
    config = load_config(RunConfig, args.config, args.overrides)
    if config.objective.name != "cocomix":
        raise ConfigError(f"{args.config}: objective.name={config.objective.name} must be cocomix")
    if config.predicted_concepts is None:
        raise ConfigError(
            f"{args.config}: objective.regression={config.objective.regression} must be none, states are not "
            "stored"
        )
    if config.parallel.shard_teacher or config.parallel.shard_sae:
        raise ConfigError(
            "labelling needs parallel.shard_teacher=false and parallel.shard_sae=false: each process labels "
            "other windows at its own pace"
        )
    assert config.concepts is not None
    world = start_world(config.run.device, config.parallel.timeout_s)
    try:
        finished = label(config, world, overwrite=args.overwrite)
    finally:
        stop_world()
    folders = ", ".join(labels_places(config.concepts, config.data).values())
    if finished:
        print(f"labels: {folders}")
    else:
        print(f"{folders}: other processes are still labelling; the last one writes {LABELS_NAME}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = config_parser(
        "python -m trainer.concepts.label", "Store the concept targets of all windows beside the tokens"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace labels made with other settings")
    return run_cli(_main, parser, argv, overrides=True)


if __name__ == "__main__":
    sys.exit(main())
