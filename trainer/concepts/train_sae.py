"""``python -m trainer.concepts.train_sae --config configs/demo_sae.yaml``: a TopK SAE for a teacher.

Trains with the one training loop, publishes ``RUN/model/sae.pt`` and measures it on the validation
windows: ``RUN/model/report.json``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from data.files import replace_text
from data.loader import validation_batches
from data.source import open_manifest
from trainer.build import document_end
from trainer.concepts.extractor import load_teacher
from trainer.concepts.sae_formats import load_sae
from trainer.concepts.sae_metrics import (
    ReconstructionSums,
    loss_recovered,
    reconstruction_metrics,
    reconstruction_sums,
    splice_losses,
)
from trainer.config import RunConfig
from trainer.config_io import ConfigError
from trainer.kernels.reference import IGNORED_LABEL
from trainer.main import run, run_config_cli
from trainer.model.documents import split_windows
from trainer.publish import published_path

REPORT_NAME = "report.json"


@torch.no_grad()
def measure(config: RunConfig, path: Path, device: torch.device) -> dict[str, float]:
    """Quality of a published SAE over the validation windows of all sources.

    Returns:
        ``normalized_mse`` (against always predicting the mean), ``dead_fraction`` (latents that no
        validation token used), ``mean_active``, the teacher's loss in nats per token clean, with the
        reconstruction spliced in and with zeros in its place, and ``loss_recovered``.
    """
    assert config.sae is not None
    layer = config.sae.layer
    teacher = load_teacher(config.sae.teacher, layer, key="sae.layer").to(device, torch.float32)
    sae = load_sae(path).to(device)
    totals: ReconstructionSums | None = None
    parts = config.data.by_source.values()
    end_id = document_end(config, open_manifest(next(iter(parts))))  # one tokenizer made all tokens
    losses = torch.zeros(3, dtype=torch.float64, device=device)
    num_labels = torch.zeros((), dtype=torch.int64, device=device)
    batches = (
        validation_batches(
            part, share=config.validation.share, rows=config.train.microbatch_size, rank=0, world_size=1
        )
        for part in parts
    )
    for batch in chain.from_iterable(batches):
        rows = batch.counted(batch.tokens).to(device).long()
        input_ids, labels, documents = split_windows(rows, end_id)
        sums = reconstruction_sums(sae, teacher.residual_after(input_ids, layer, documents))
        totals = sums if totals is None else totals.plus(sums)
        losses += torch.stack(splice_losses(teacher, sae, input_ids, labels, layer, documents)).double()
        num_labels += (labels != IGNORED_LABEL).sum()
    assert totals is not None, "there is at least one validation window"
    clean, spliced, ablated = (losses / num_labels).tolist()
    return {
        **reconstruction_metrics(totals),
        "loss_clean": clean,
        "loss_spliced": spliced,
        "loss_ablated": ablated,
        "loss_recovered": loss_recovered(clean, spliced, ablated),
    }


def train_and_measure(config: RunConfig, source: Path) -> int:
    """Train, publish and measure; returns the exit code."""
    if config.objective.name != "sae":
        raise ConfigError(f"{source}: objective.name={config.objective.name} must be sae")
    code = run(config)
    if code != 0 or os.environ.get("RANK", "0") != "0":
        return code
    path = published_path(config)
    cuda = config.run.device != "cpu" and torch.cuda.is_available()
    report = measure(config, path, torch.device("cuda" if cuda else "cpu"))
    replace_text(path.with_name(REPORT_NAME), json.dumps(report, indent=2) + "\n")
    for name, value in report.items():
        print(f"{name:<16} {value:.4f}")
    print(f"sparse autoencoder: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_config_cli(
        train_and_measure,
        prog="python -m trainer.concepts.train_sae",
        description="Train a TopK sparse autoencoder on a teacher's residuals",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
