"""``python -m trainer.analysis.evaluate RUN [--data DIR ...]``: perplexity, calibration and concept quality.

RUN is a run directory or an exported folder, as for ``trainer.analysis.generate``. Without ``--data`` the
run's own validation windows are read, source by source; each ``--data`` is a shard folder of the same
tokenizer, reported by its own. A run gets ``evaluation/validation_<step>.json`` and ``.md``, and curves in
TensorBoard.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.cli import run_cli
from data.files import replace_text
from parallel.world import choose_device
from trainer.analysis.tables import markdown_table
from trainer.analysis.trained import TrainedModel, is_run, open_teacher, open_trained
from trainer.analysis.validation import ValidationReport, measure
from trainer.analysis.windows import validation_sources, validation_windows
from trainer.checkpoint.store import CheckpointError
from trainer.concepts.extractor import TargetExtractor
from trainer.metrics.tensorboard import TensorBoard


def evaluate(trained: TrainedModel, args: argparse.Namespace) -> dict[str, ValidationReport]:
    """Reports by source: the names of the run's sources, or those of the shard folders.

    Raises:
        ValueError: another tokenizer, no data, or an unreadable share.
        DataError, OSError: missing or damaged files.
    """
    device = choose_device(args.device)
    model = trained.model.to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    extractor = _extractor(trained, device) if not args.no_concepts else None
    reports = {}
    for name, config in validation_sources(trained, args.data).items():
        batches = validation_windows(
            trained, config, f"evaluating on {config.dir}", share=args.share, rows=args.batch_size
        )
        reports[name] = measure(model, batches, device, extractor, end_id=trained.document_end)
    return reports


def _extractor(trained: TrainedModel, device: torch.device) -> TargetExtractor | None:
    """Names of concepts, where the student predicts any and its teacher is still there."""
    config = trained.config
    if config is None or config.predicted_concepts is None or config.objective.concept_weight == 0:
        return None
    teacher, sae, _ = open_teacher(trained)
    return TargetExtractor(teacher.to(device), sae.to(device), config.predicted_concepts)


# What is shown


def to_markdown(reports: dict[str, ValidationReport]) -> str:
    """One row per source, then the losses by position."""
    rows = [["source", "tokens", "loss", "perplexity", "accuracy", "calibration error"]]
    concepts = [["source", "targets", "recall@A", "mean rank", "mean reciprocal rank", "calibration error"]]
    for name, report in reports.items():
        body = report.to_json()
        rows.append(
            [
                name,
                f"{body['tokens']:,}",
                f"{body['loss']:.4f}",
                f"{body['perplexity']:.2f}",
                f"{body['accuracy']:.4f}",
                f"{report.reliability.error:.4f}",
            ]
        )
        if report.concepts is not None:
            found = body["concepts"]
            concepts.append(
                [
                    name,
                    f"{found['targets']:,}",
                    f"{found['recall_at_A']:.4f}",
                    f"{found['mean_rank']:.1f}",
                    f"{found['mean_reciprocal_rank']:.4f}",
                    f"{report.concepts.reliability.error:.4f}",
                ]
            )
    parts = [markdown_table(rows)]
    if len(concepts) > 1:
        parts.append(markdown_table(concepts))
    return "\n\n".join([*parts, _positions(reports)]) + "\n"


def _positions(reports: dict[str, ValidationReport]) -> str:
    rows = [["positions", *(f"loss on {name}" for name in reports)]]
    bodies = [report.to_json()["by_position"] for report in reports.values()]
    for groups in zip(*bodies, strict=True):
        span = f"{groups[0]['first']}-{groups[0]['last']}"
        rows.append([span, *("" if item["loss"] is None else f"{item['loss']:.4f}" for item in groups)])
    return markdown_table(rows)


def scalars(reports: dict[str, ValidationReport]) -> dict[str, float]:
    """Values by TensorBoard tag."""
    points = {}
    for name, report in reports.items():
        points[f"evaluation/{name}/loss"] = report.loss
        points[f"evaluation/{name}/calibration_error"] = report.reliability.error
        if report.concepts is not None:
            found = report.concepts.to_json()
            points |= {f"evaluation/{name}/concept_{key}": found[key] for key in ("recall_at_A", "mean_rank")}
    return points


def validation_path(run: Path, step: int) -> Path:
    """Where the report on the weights after ``step`` is written last."""
    return run / "evaluation" / f"validation_{step:08d}.json"


def store(run: Path, step: int, reports: dict[str, ValidationReport]) -> Path:
    """Write JSON, table and curves of the weights after ``step``; returns the JSON's path."""
    path = validation_path(run, step)
    path.parent.mkdir(exist_ok=True)
    body = {"step": step, "sources": {name: report.to_json() for name, report in reports.items()}}
    replace_text(path.with_suffix(".md"), to_markdown(reports))
    replace_text(path, json.dumps(body, indent=2, sort_keys=True) + "\n")
    # A TensorBoard run of its own: the training's own file may be open.
    board = TensorBoard(run / "tb" / "evaluation", None)
    board.tagged(step, scalars(reports))
    board.markdown("validation", to_markdown(reports), step)
    board.close()
    return path


def _main(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size} must be at least 1")
    trained = open_trained(args.run, args.tokenizer)
    reports = evaluate(trained, args)
    print(f"weights: {trained.source}", file=sys.stderr)
    print(to_markdown(reports), end="")
    if is_run(args.run):
        assert trained.step is not None
        print(f"written: {store(args.run, trained.step, reports)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.analysis.evaluate",
        description="Perplexity by source and position, calibration and concept quality of a trained model",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory or exported folder")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DIR",
        help="shard folder (the run's); may be repeated",
    )
    parser.add_argument("--share", type=float, default=1.0, help="part of the validation windows (1.0)")
    parser.add_argument("--batch_size", type=int, default=2, metavar="N", help="windows at a time (2)")
    parser.add_argument("--no_concepts", action="store_true", help="leave the teacher's concepts out")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json or its folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights (fp32)")
    return run_cli(_main, parser, argv, errors=(CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
