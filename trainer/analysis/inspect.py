"""``python -m trainer.analysis.inspect RUN``: one HTML page about the concepts of a trained model.

Streams the validation windows once and writes ``RUN/inspect/index.html``: every concept with how often it is
used, where it is strongest in teacher and student, which tokens it promotes and how well both agree; texts
with the concepts predicted at each token; continuations under steering, which are also written beside it as
``steering.txt`` and to TensorBoard; the norms of W_comp. The page needs no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.cli import run_cli
from data.files import replace_text
from data.loader import validation_batches
from data.manifest import DataError
from parallel.world import choose_device
from trainer.analysis.generate import side_by_side
from trainer.analysis.inspect_collect import (
    NO_TOKEN,
    TOKENS_BEFORE,
    ConceptStatistics,
    Promotion,
    collect,
    kept_concepts,
    promoted_tokens,
    spread,
)
from trainer.analysis.inspect_page import (
    SMALL_NORM,
    Pieces,
    contexts_json,
    norm_histogram,
    render,
    small_norm_share,
)
from trainer.analysis.sampling import Sampling, generate
from trainer.analysis.steer import SteerKept, Strengths
from trainer.analysis.trained import TrainedModel, is_run, open_teacher, open_trained
from trainer.analysis.windows import validation_sources, validation_windows
from trainer.checkpoint.store import CheckpointError
from trainer.concepts.extractor import TargetExtractor
from trainer.kernels.reference import MASKED_TARGET
from trainer.metrics.tensorboard import TensorBoard
from trainer.model.cocomix import CoCoMix
from trainer.model.documents import Documents, split_windows

PAGE_NAME = "index.html"
STEERING_NAME = "steering.txt"
STEER_STRENGTHS = (-10.0, -5.0, 0.0, 1.0, 5.0, 10.0)

_VALIDATION_TEXTS = 2
_SHOWN_PER_TOKEN = 8  # concepts predicted at a token of a text
_PROMOTED = 10
_NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Subject:
    """What a page is about."""

    trained: TrainedModel
    model: CoCoMix
    """On ``device``."""
    extractor: TargetExtractor | None
    """Its teacher, unless that is left out."""
    device: torch.device


def open_subject(args: argparse.Namespace) -> Subject:
    """Open the run and its teacher.

    Raises:
        ValueError: a model without concepts, or a teacher that cannot be opened.
        DataError, OSError, CheckpointError: missing or damaged files.
    """
    trained = open_trained(args.run, args.tokenizer)
    if not isinstance(trained.model, CoCoMix):
        raise ValueError(f"{args.run}: its model predicts no concepts, so there is nothing to inspect")
    device = choose_device(args.device)
    model = trained.model.to(device)
    extractor = None
    if not args.no_teacher:
        try:
            teacher, sae, _ = open_teacher(trained)
        except (ValueError, OSError, DataError) as error:
            raise ValueError(f"the teacher cannot be shown, --no_teacher leaves it out: {error}") from error
        assert trained.config is not None
        assert trained.config.concepts is not None
        extractor = TargetExtractor(teacher.to(device), sae.to(device), trained.config.concepts)
    return Subject(trained, model, extractor, device)


def choose_concepts(found: ConceptStatistics, wanted: Sequence[int], limit: int) -> list[int]:
    """Ids to show: those wanted, or the ``limit`` most frequent of the active ones, most frequent first."""
    if wanted:
        return list(dict.fromkeys(wanted))
    active = found.student.active.clone()
    if found.teacher is not None:
        active += found.teacher.active
    order = active.argsort(descending=True, stable=True)[:limit]
    return [concept for concept in order.tolist() if active[concept]]


def _payload(subject: Subject, found: ConceptStatistics, args: argparse.Namespace) -> dict[str, Any]:
    """All that the page shows."""
    tokenizer = subject.trained.tokenizer
    shown = choose_concepts(found, args.concepts, args.max_concepts)
    pieces = Pieces(tokenizer)
    norms = compress_norms(subject.model)
    targeted = int(found.targeted.sum())
    return {
        "source": subject.trained.source,
        "tokens": found.num_tokens,
        "every": subject.model.mixing.every,
        "num_concepts": subject.model.mixer.num_concepts,
        "teacher": found.teacher is not None,
        "agreement": int(found.recalled.sum()) / targeted if targeted else None,
        "num_targets": None if subject.extractor is None else subject.extractor.config.num_targets,
        "small_norm": SMALL_NORM,
        "small_share": small_norm_share(norms),
        "concepts": _concepts(subject, found, shown, norms, pieces),
        "texts": _texts(subject, pieces, args),
        "steering": _steering(subject, found, _to_steer(found, shown, args), args),
        "pieces": pieces.texts,
    }


def compress_norms(model: CoCoMix) -> Tensor:
    """Norm (M) fp32 of each concept's column of W_comp, on the CPU."""
    mixer = model.mixer
    return mixer.compress_weight[: mixer.num_concepts].detach().float().norm(dim=1).cpu()


def _concepts(
    subject: Subject, found: ConceptStatistics, shown: Sequence[int], norms: Tensor, pieces: Pieces
) -> list[dict[str, Any]]:
    count = min(_PROMOTED, subject.trained.tokenizer.vocab_size)
    vocab_size = subject.trained.tokenizer.vocab_size
    rows = torch.tensor(shown, dtype=torch.int64, device=subject.device)
    lens = promoted_tokens(subject.model, subject.model.mixer.compress_weight[rows], vocab_size, count)
    teacher_lens = None
    if subject.extractor is not None:
        directions = subject.extractor.sae.decoder[rows]
        teacher_lens = promoted_tokens(subject.extractor.teacher, directions, vocab_size, count)
    bodies = []
    for row, concept in enumerate(shown):
        student = found.student.contexts(concept)
        body: dict[str, Any] = {
            "id": concept,
            "norm": round(float(norms[concept]), 5),
            "student": {
                "density": int(found.student.active[concept]) / found.num_places,
                "contexts": contexts_json(student, pieces, from_zero=False),
                **_promotion(lens, row, pieces),
            },
        }
        if found.teacher is not None and teacher_lens is not None:
            body["teacher"] = {
                "density": int(found.teacher.active[concept]) / found.num_places,
                "contexts": contexts_json(found.teacher.contexts(concept), pieces, from_zero=True),
                **_promotion(teacher_lens, row, pieces),
            }
            body["targeted"] = int(found.targeted[concept])
            body["recalled"] = int(found.recalled[concept])
        bodies.append(body)
    return bodies


def _promotion(lens: Promotion, row: int, pieces: Pieces) -> dict[str, list[int]]:
    return {
        "promotes": [pieces.of_token(token) for token in lens.most[row].tolist()],
        "suppresses": [pieces.of_token(token) for token in lens.least[row].tolist()],
    }


# Texts


def _texts(subject: Subject, pieces: Pieces, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The given texts, then the first validation windows."""
    items = [(text[:60], subject.trained.tokenizer.encode(text)) for text in args.text]
    (config, *_) = validation_sources(subject.trained, args.data).values()
    windows = validation_batches(config, share=1.0, rows=1, rank=0, world_size=1)
    for number, batch in zip(range(_VALIDATION_TEXTS), windows, strict=False):
        items.append((f"validation window {number + 1}", batch.tokens[0, :-1].tolist()))
    return [_text(subject, label, tokens, pieces) for label, tokens in items]


def _text(subject: Subject, label: str, tokens: Sequence[int], pieces: Pieces) -> dict[str, Any]:
    """Concepts at each token: those predicted, and the teacher's targets where there is a next token.

    Tokens between those that have a concept get empty lists.
    """
    input_ids = torch.tensor([tokens], device=subject.device)
    end_id = subject.trained.document_end
    documents = None if end_id is None else Documents.ended_by(input_ids, end_id)
    kept = kept_concepts(subject.model, input_ids, documents)
    values, ids = (part[0, :, :_SHOWN_PER_TOKEN].cpu() for part in kept)
    there = values[:, 0].isfinite().tolist()
    body: dict[str, Any] = {
        "label": label,
        "pieces": pieces.of_tokens(tokens),
        "ids": [row if has else [] for row, has in zip(ids.tolist(), there, strict=True)],
        "logits": [
            [round(value, 2) for value in row] if has else []
            for row, has in zip(values.tolist(), there, strict=True)
        ],
    }
    if subject.extractor is not None and len(tokens) > 1:
        targets = subject.extractor(*split_windows(input_ids, end_id))
        rows = spread(targets, len(tokens) - 1, subject.model.mixing.every, MASKED_TARGET)[0].tolist()
        body["targets"] = [[target for target in row if target != MASKED_TARGET] for row in rows]
    return body


# Steering


def _to_steer(found: ConceptStatistics, shown: Sequence[int], args: argparse.Namespace) -> list[int]:
    """Concepts that the student keeps and agrees on with its teacher most often, first."""
    useful = [concept for concept in shown if found.student.active[concept]]
    useful.sort(key=lambda concept: (-int(found.recalled[concept]), -int(found.student.active[concept])))
    return useful[: args.steer_concepts]


def _steering(
    subject: Subject, found: ConceptStatistics, concepts: Sequence[int], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Continuations of each concept's strongest context up to the token where it is active."""
    positions = subject.model.config.n_positions
    room = min(TOKENS_BEFORE + 1, max(1, positions // 2))
    tokenizer = subject.trained.tokenizer
    rows = []
    for concept in concepts:
        context = found.student.contexts(concept).tokens[0, : TOKENS_BEFORE + 1].tolist()
        prompt = [token for token in context if token != NO_TOKEN][-room:]
        strengths = Strengths.of([{concept: value} for value in STEER_STRENGTHS], "scale", subject.device)
        results = generate(
            subject.model,
            [prompt] * len(STEER_STRENGTHS),
            Sampling(seed=args.seed),
            max_new_tokens=min(_NEW_TOKENS, positions - len(prompt) + 1),
            stop_id=tokenizer.eot_id,
            edit_kept=SteerKept(strengths),
        )
        texts = [tokenizer.decode(result.ids) for result in results]
        samples = list(zip(STEER_STRENGTHS, texts, strict=True))
        rows.append({"id": concept, "prompt": tokenizer.decode(prompt), "samples": samples})
    return rows


def store_steering(run: Path, step: int, steering: Sequence[Mapping[str, Any]]) -> None:
    """Write continuations of the weights after ``step`` as a text and to TensorBoard."""
    blocks = {
        item["id"]: side_by_side(
            item["prompt"], [({item["id"]: strength}, text) for strength, text in item["samples"]]
        )
        for item in steering
    }
    replace_text(run / "inspect" / STEERING_NAME, "\n\n".join(blocks.values()) + "\n")
    # A TensorBoard run of its own: the training's own file may be open.
    board = TensorBoard(run / "tb" / "evaluation", None)
    for concept, text in blocks.items():
        board.text(f"steering/{concept}", text, step)
    board.close()


# Command line


def _check(args: argparse.Namespace) -> None:
    for name, least in (("max_concepts", 1), ("contexts", 1), ("batch_size", 1), ("steer_concepts", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {least}")


def _check_fits(args: argparse.Namespace, subject: Subject) -> None:
    """Refuse before the windows are read what does not fit the model."""
    if args.out is None and not is_run(args.run):
        raise ValueError(f"{args.run}: is no run directory, so --out must name the page's file")
    num_concepts = subject.model.mixer.num_concepts
    for concept in args.concepts:
        if not 0 <= concept < num_concepts:
            raise ValueError(f"--concepts {concept} must be from 0 to {num_concepts - 1}")
    positions = [subject.model.config.n_positions]
    if subject.extractor is not None:
        positions.append(subject.extractor.teacher.config.n_positions)
    for text in args.text:
        length = len(subject.trained.tokenizer.encode(text))
        if not 1 <= length <= min(positions):
            raise ValueError(
                f"--text {text[:20]!r}: {length} tokens must be from 1 to {min(positions)}, the positions of "
                "the model"
            )


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be ids separated by commas, as 3,14,15") from None


def _main(args: argparse.Namespace) -> None:
    _check(args)
    subject = open_subject(args)
    _check_fits(args, subject)
    windows = chain.from_iterable(
        validation_windows(
            subject.trained, source, f"reading {source.dir}", share=args.share, rows=args.batch_size
        )
        for source in validation_sources(subject.trained, args.data).values()
    )
    found = collect(
        subject.model,
        windows,
        subject.device,
        subject.extractor,
        num_contexts=args.contexts,
        end_id=subject.trained.document_end,
    )
    chart = norm_histogram(compress_norms(subject.model))
    payload = _payload(subject, found, args)
    target = args.out or args.run / "inspect" / PAGE_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    if args.out is None:
        assert subject.trained.step is not None
        store_steering(args.run, subject.trained.step, payload["steering"])
    replace_text(target, render(f"Concepts of {args.run.resolve().name}", payload, chart))
    print(f"weights: {subject.trained.source}", file=sys.stderr)
    print(target)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.analysis.inspect",
        description="Write an HTML page about the concepts of a trained model",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory or exported folder")
    parser.add_argument(
        "--max_concepts", type=int, default=2000, metavar="N", help="most frequent concepts to show (2000)"
    )
    parser.add_argument("--concepts", type=_ids, default=[], metavar="IDS", help="show these: 3,14,15")
    parser.add_argument("--contexts", type=int, default=6, metavar="N", help="contexts of each concept (6)")
    parser.add_argument(
        "--text", action="append", default=[], help="show the concepts at its tokens; may be repeated"
    )
    parser.add_argument(
        "--steer_concepts", type=int, default=4, metavar="N", help="concepts to steer samples with (4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of these samples (0)")
    parser.add_argument("--no_teacher", action="store_true", help="leave the teacher out")
    parser.add_argument(
        "--data", type=lambda folder: [folder], default=[], metavar="DIR", help="shard folder (the run's)"
    )
    parser.add_argument("--share", type=float, default=1.0, help="part of the validation windows (1.0)")
    parser.add_argument("--batch_size", type=int, default=2, metavar="N", help="windows at a time (2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (RUN/inspect/index.html)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json or its folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_cli(_main, _parser(), argv, errors=(CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
