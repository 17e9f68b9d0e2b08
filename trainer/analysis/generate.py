"""``python -m trainer.analysis.generate RUN --prompt TEXT [--steer 123=5]``: let a trained model write.

RUN is a run directory (its published weights, or the newest checkpoint while it trains) or a folder that
``trainer.analysis.export`` wrote. With ``--steer`` one concept is made stronger or weaker
(``trainer.analysis.steer``); a range of strengths gives a table. ``--teacher`` lets the run's teacher
write instead, steered through its autoencoder. ``--json`` writes one object per sample and line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.cli import run_cli
from data.tokenizer import Tokenizer
from parallel.world import choose_device
from trainer.analysis.sampling import Sampling, generate
from trainer.analysis.steer import (
    SteerKept,
    SteerRequest,
    SteerResidual,
    Strengths,
    check_concepts,
    combinations,
    parse_steer,
)
from trainer.analysis.trained import TrainedModel, open_teacher, open_trained
from trainer.checkpoint.store import CheckpointError
from trainer.model.cocomix import CoCoMix
from trainer.model.decoding import EditKept, EditResidual
from trainer.model.gpt2 import GPT2


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation as it is shown and written."""

    prompt: str
    sample: int
    """Number among the samples of the same prompt and strengths, from 0."""
    text: str
    """What follows the prompt."""
    tokens: list[int]
    """The same as ids."""
    ended: bool
    """Whether the model ended the text by itself."""
    steer: dict[int, float]
    """Strength by concept id."""


@dataclass(frozen=True, slots=True)
class Writer:
    """A model ready to write, and what steers it: row r of the edits is ``strengths[r % n]``."""

    model: GPT2
    tokenizer: Tokenizer
    strengths: list[dict[int, float]]
    edit_kept: EditKept | None = None
    edit_residual: EditResidual | None = None

    def write(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        num_samples: int,
        batch_size: int,
    ) -> Iterator[Sample]:
        """Continue each prompt with each combination of strengths, ``num_samples`` times."""
        rows = [(prompt, steer) for prompt in prompts for steer in self.strengths]
        results = generate(
            self.model,
            [self.tokenizer.encode(prompt) for prompt, _ in rows],
            sampling,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            stop_id=self.tokenizer.eot_id,
            edit_kept=self.edit_kept,
            edit_residual=self.edit_residual,
            batch_size=batch_size,
        )
        for index, result in enumerate(results):
            prompt, steer = rows[index // num_samples]
            text = self.tokenizer.decode(result.ids)
            yield Sample(prompt, index % num_samples, text, result.ids, result.ended, steer)


def student_writer(
    trained: TrainedModel, requests: Sequence[SteerRequest], args: argparse.Namespace
) -> Writer:
    """The run's own model, steered in the concepts that it mixes in.

    Raises:
        ValueError: a concept that does not exist, or steering of a model without concepts.
    """
    device = choose_device(args.device)
    model = _placed(trained.model, device, args.precision)
    if not requests:
        return Writer(model, trained.tokenizer, [{}])
    if not isinstance(model, CoCoMix):
        raise ValueError(
            f"--steer needs a model with concepts, {trained.path} holds a {type(model).__name__}"
        )
    if not model.mixer.mixes:
        raise ValueError(f"--steer needs concepts that are mixed in, {trained.path} predicts them only")
    check_concepts(requests, model.mixer.num_concepts)
    strengths = combinations(requests)
    rows = strengths * len(args.prompt)
    edit = SteerKept(Strengths.of(rows, args.steer_mode, device))
    return Writer(model, trained.tokenizer, strengths, edit_kept=edit)


def teacher_writer(
    trained: TrainedModel, requests: Sequence[SteerRequest], args: argparse.Namespace
) -> Writer:
    """The run's teacher, steered through its autoencoder; raises as :func:`student_writer`."""
    device = choose_device(args.device)
    teacher, sae, layer = open_teacher(trained)
    model = _placed(teacher, device, args.precision)
    if not requests:
        return Writer(model, trained.tokenizer, [{}])
    check_concepts(requests, sae.num_latents)
    strengths = combinations(requests)
    rows = Strengths.of(strengths * len(args.prompt), args.steer_mode, device)
    edit = SteerResidual(sae.to(device), layer, rows)
    return Writer(model, trained.tokenizer, strengths, edit_residual=edit)


def _placed(model: GPT2, device: torch.device, precision: str) -> GPT2:
    return model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)


# What is shown


def to_text(samples: Sequence[Sample], *, table: bool) -> str:
    """Samples for people: prompt and continuation, or with ``table`` one line per strength."""
    if table:
        return _table(samples)
    blocks = []
    for number, sample in enumerate(samples, start=1):
        end = "" if sample.ended else " ..."
        blocks.append(f"--- {number} of {len(samples)}\n{sample.prompt}{sample.text}{end}")
    return "\n".join(blocks)


def _table(samples: Sequence[Sample]) -> str:
    """A table for each prompt."""
    rows: dict[str, list[tuple[dict[int, float], str]]] = {}
    for sample in samples:
        rows.setdefault(sample.prompt, []).append((sample.steer, sample.text))
    return "\n".join(side_by_side(prompt, texts) for prompt, texts in rows.items())


def side_by_side(prompt: str, rows: Sequence[tuple[dict[int, float], str]]) -> str:
    """Continuations of a prompt under their strengths: one per line, its line breaks spelled out."""
    width = max(len(_steer_text(steer)) for steer, _ in rows)
    lines = [f"  {_steer_text(steer):>{width}} | {_on_one_line(text)}" for steer, text in rows]
    return "\n".join([f"prompt: {_on_one_line(prompt)}", *lines])


def _steer_text(steer: dict[int, float]) -> str:
    return " ".join(f"{concept}={strength:g}" for concept, strength in steer.items())


def _on_one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def to_json(sample: Sample, mode: str | None) -> str:
    """One line of JSON; keys of :class:`Sample`, and ``steer_mode`` where there is steering."""
    body: dict[str, Any] = asdict(sample)
    if sample.steer:
        body["steer_mode"] = mode
    return json.dumps(body, ensure_ascii=False)


# Command line


def _main(args: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if not all(args.prompt):
        raise ValueError("--prompt must not be empty")
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    requests = [parse_steer(text) for text in args.steer]
    trained = open_trained(args.run, args.tokenizer)
    writer = (teacher_writer if args.teacher else student_writer)(trained, requests, args)
    samples = list(
        writer.write(
            args.prompt,
            sampling,
            max_new_tokens=args.max_new_tokens,
            num_samples=args.num_samples,
            batch_size=args.batch_size,
        )
    )
    print(f"weights: {'the teacher of ' if args.teacher else ''}{trained.source}", file=sys.stderr)
    if args.json:
        for sample in samples:
            print(to_json(sample, args.steer_mode))
    else:
        print(to_text(samples, table=len(writer.strengths) > 1))


def _parser() -> argparse.ArgumentParser:
    defaults = Sampling()
    parser = argparse.ArgumentParser(
        prog="python -m trainer.analysis.generate",
        description="Continue prompts with a trained model, and steer its concepts",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory or exported folder")
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="what to continue; may be repeated"
    )
    parser.add_argument("--max_new_tokens", type=int, default=50, metavar="N", help="new tokens (50)")
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="samples of each prompt (1)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        help=f"divides the logits ({defaults.temperature})",
    )
    parser.add_argument(
        "--top_k",
        type=int,
        default=defaults.top_k,
        help=f"draw among so many tokens ({defaults.top_k}); 1 takes the best, 0 draws among all",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=defaults.top_p,
        help=f"draw among the fewest tokens of this probability ({defaults.top_p})",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help=f"of the draws ({defaults.seed})")
    parser.add_argument(
        "--steer",
        action="append",
        default=[],
        metavar="ID=A",
        help="strength of a concept, or ID=START:STOP:STEP for a table; may be repeated",
    )
    parser.add_argument(
        "--steer_mode",
        choices=("scale", "set"),
        default="scale",
        help="multiply the concept where it is kept, or set it everywhere (scale)",
    )
    parser.add_argument("--teacher", action="store_true", help="let the run's teacher write")
    parser.add_argument("--json", action="store_true", help="one JSON object per sample and line")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json or its folder")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="rows at a time (32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights (fp32)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_cli(_main, _parser(), argv, errors=(CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
