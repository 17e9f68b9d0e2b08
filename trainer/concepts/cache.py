"""Which stored targets fit a run: what they are made from, as digests and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from data.config import DataConfig
from data.label_cache import DEFAULT_FOLDER, LabelCache, LabelSettings
from data.manifest import Manifest
from data.shards import hash_file
from data.source import open_label_cache
from trainer.concepts.extractor import MAX_PACKED_ID
from trainer.concepts.sae_formats import sae_files
from trainer.config import ConceptsConfig
from trainer.model.formats import model_config, open_model

ARITHMETIC = 1
"""Rises with every change of the extraction that can change an id."""


def labels_places(concepts: ConceptsConfig, data: DataConfig) -> dict[str, str]:
    """Where the stored targets of each source are: a folder, or a URL where the shards have one.

    ``concepts.labels`` has a folder for each of ``data.sources``.
    """
    if concepts.labels is None:
        return {name: f"{part.dir.rstrip('/')}/{DEFAULT_FOLDER}" for name, part in data.by_source.items()}
    below = concepts.labels.rstrip("/")
    return {name: f"{below}/{name}" if data.sources else concepts.labels for name in data.by_source}


def open_labels(
    concepts: ConceptsConfig, data: DataConfig, manifests: Sequence[Manifest]
) -> tuple[LabelCache, ...]:
    """The stored targets that a run reads, one for each source.

    Raises:
        ValueError: no targets can be stored for such a dictionary.
        DataError: unfinished, incomplete, or made from another teacher, autoencoder, data or settings.
    """
    wanted = label_settings(concepts, data, manifests[0])
    places = labels_places(concepts, data).values()
    return tuple(
        open_label_cache(data, place, replace(wanted, data=manifest.sha256))
        for place, manifest in zip(places, manifests, strict=True)
    )


def label_settings(
    concepts: ConceptsConfig, data: DataConfig, manifest: Manifest, *, rows_per_pass: int | None = None
) -> LabelSettings:
    """What decides the targets of one source; reads every byte of teacher and autoencoder.

    A teacher or an autoencoder that is not there has the digest ``None``.

    Raises:
        ValueError: ids of the dictionary do not fit into two bytes.
    """
    if concepts.num_concepts - 1 > MAX_PACKED_ID:
        raise ValueError(
            f"concepts.num_concepts={concepts.num_concepts} must be at most {MAX_PACKED_ID + 1} "
            "for stored targets: an id has two bytes"
        )
    return LabelSettings(
        data=manifest.sha256,
        teacher=teacher_digest(concepts.teacher) if Path(concepts.teacher).exists() else None,
        sae=sae_digest(concepts.sae) if Path(concepts.sae).exists() else None,
        seq_len=data.seq_len,
        num_targets=concepts.num_targets,
        num_concepts=concepts.num_concepts,
        sae_layer=concepts.sae_layer,
        targets=concepts.targets,
        attribution=concepts.attribution,
        mask_non_positive=concepts.mask_non_positive,
        mask_documents=data.mask_documents,
        precision=concepts.precision,
        arithmetic=ARITHMETIC,
        rows_per_pass=rows_per_pass,
    )


def teacher_digest(path: str) -> str:
    """SHA-256 over a model's sizes and the bytes of its weights files, wherever they lie.

    Raises:
        ValueError, FileNotFoundError: no model there.
    """
    folder = open_model(path)
    return _digest(asdict(model_config(folder)), folder.weights)


def sae_digest(path: str) -> str:
    """SHA-256 over the bytes of an autoencoder's files; ValueError if there is none."""
    return _digest({}, sae_files(path))


def _digest(sizes: dict[str, object], files: tuple[Path, ...]) -> str:
    body = json.dumps([sizes, *map(hash_file, files)], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()
