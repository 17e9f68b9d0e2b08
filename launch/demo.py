"""``python -m launch.demo [--out runs/demo]``: from text to a measured student in minutes, on CPU.

Every stage is a command that a user could type, run as a process of its own and shown before it
starts: tokens, teacher, sparse autoencoder, a CoCoMix student, a next-token student of as many
parameters on the same tokens, their comparison and evaluation, and a page about the concepts with samples
of steering. Arguments of the form ``--section.key=value`` go
to every stage that trains.

A stage that is finished is skipped, one that was interrupted goes on. Ctrl-C or SIGTERM stops the
running stage, which saves first, and leaves no process behind.

Exit codes: 0 finished, 2 a stage failed (one line says which), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.cli import EXIT_INTERRUPTED, run_cli
from data.manifest import MANIFEST_NAME
from data.source import open_tokenizer
from launch.stages import Runner, Spent, Stage, StageError, run_stages, training_stage
from trainer.analysis.curves import read_curve
from trainer.analysis.evaluate import validation_path
from trainer.analysis.inspect import PAGE_NAME, STEERING_NAME
from trainer.analysis.sampling import Sampling, continue_tokens
from trainer.metrics.json_lines import read_json_lines
from trainer.model.formats import load_model

DEFAULT_OUT = Path("runs/demo")
VOCAB_SIZE = 4096
VAL_FRACTION = 0.02
TEXT = "with open(path) as file: return json.load(file)"
"""Whose concepts the page shows token by token."""


# What is run


def plan(out: Path, processes: int, extra: Sequence[str] = ()) -> list[Stage]:
    """All stages in their order, below the folder ``out``.

    Args:
        out: folder with one folder per stage.
        processes: ranks of the two students.
        extra: overrides of every training stage; paths are the demo's own.

    Raises:
        ConfigError: an override does not fit.
    """
    tokens, teacher, sae = base = foundation(out, extra)
    cocomix = training_stage(
        out / "cocomix",
        "demo",
        "the CoCoMix student",
        overrides=(*extra, *placed(out)),
        inputs=base,
        ranks=processes,
    )
    ntp = training_stage(
        out / "ntp",
        "demo_ntp",
        "the next-token student: as many parameters, the same tokens",
        overrides=(*extra, f"--data.dir={out / 'data'}", f"--kd.teacher={out / 'teacher' / 'model'}"),
        inputs=(tokens,),
        ranks=processes,
    )
    evaluations = [_evaluation(student) for student in (cocomix, ntp)]
    page = _page(cocomix, (teacher, sae))
    return [tokens, teacher, sae, cocomix, ntp, _comparison(out, ntp, cocomix), *evaluations, page]


def foundation(out: Path, extra: Sequence[str] = ()) -> tuple[Stage, Stage, Stage]:
    """Tokens, teacher and autoencoder below ``out``; raises as :func:`plan`."""
    tokens = _tokens(out / "data")
    data = f"--data.dir={out / 'data'}"
    teacher = training_stage(
        out / "teacher",
        "demo_teacher",
        "the teacher, a small GPT-2",
        overrides=(*extra, data),
        inputs=(tokens,),
    )
    sae = training_stage(
        out / "sae",
        "demo_sae",
        "a sparse autoencoder of the teacher's residuals, the concepts",
        module="trainer.concepts.train_sae",
        overrides=(*extra, data, f"--sae.teacher={out / 'teacher' / 'model'}"),
        inputs=(tokens, teacher),
    )
    return tokens, teacher, sae


def placed(out: Path) -> tuple[str, ...]:
    """Overrides that lead a student with concepts to what :func:`foundation` made below ``out``."""
    return (
        f"--data.dir={out / 'data'}",
        f"--concepts.teacher={out / 'teacher' / 'model'}",
        f"--concepts.sae={out / 'sae' / 'model' / 'sae.pt'}",
    )


def _tokens(folder: Path) -> Stage:
    arguments = f"--source stdlib --vocab_size {VOCAB_SIZE} --val_fraction {VAL_FRACTION}".split()
    command = ("-m", "data.prepare", *arguments, "--out", str(folder))
    return Stage("data", "the standard library's text as tokens", command, folder / MANIFEST_NAME)


def _comparison(out: Path, baseline: Stage, student: Stage) -> Stage:
    folder = out / "comparison"
    runs = [str(out / stage.name) for stage in (baseline, student)]
    command = ("-m", "trainer.analysis.compare", *runs, "--out", str(folder))
    inputs = (baseline.product, student.product)
    title = "both students side by side"
    return Stage("comparison", title, command, folder / "comparison.md", inputs, quiet=True)


def _evaluation(student: Stage) -> Stage:
    assert student.config is not None
    run = Path(student.config.run.dir)
    name = validation_path(run, student.config.train.steps)
    title = f"{student.name} on its validation windows"
    command = ("-m", "trainer.analysis.evaluate", str(run))
    return Stage(f"evaluation of {student.name}", title, command, name, (student.product,), quiet=True)


def _page(student: Stage, base: Sequence[Stage]) -> Stage:
    assert student.config is not None
    run = Path(student.config.run.dir)
    command = ("-m", "trainer.analysis.inspect", str(run), "--text", TEXT)
    inputs = tuple(stage.product for stage in (student, *base))
    title = "a page about the concepts, with samples of steering"
    return Stage("concepts", title, command, run / "inspect" / PAGE_NAME, inputs, quiet=True)


# What is shown at the end


def summary(out: Path, stages: Sequence[Stage], spent: dict[str, Spent]) -> str:
    """Everything worth knowing about a finished demo, as text."""
    by_name = {stage.name: stage for stage in stages}
    report = json.loads(by_name["sae"].product.read_text())
    teacher = read_curve("teacher", read_json_lines(out / "teacher" / "metrics.jsonl"), "metrics.jsonl").final
    parts = [
        (out / "comparison" / "comparison.md").read_text(encoding="utf-8").rstrip(),
        f"teacher: validation loss {teacher.loss:.4f} after {teacher.tokens / 1e6:.2f}M tokens\n"
        f"autoencoder: normalised MSE {report['normalized_mse']:.4f}, dead latents "
        f"{report['dead_fraction']:.1%}, loss recovered {report['loss_recovered']:.1%}",
        *(_evaluated(by_name[f"evaluation of {name}"], name) for name in ("cocomix", "ntp")),
        *(_samples(by_name[name]) for name in ("cocomix", "ntp")),
        _steered(by_name["concepts"].product.with_name(STEERING_NAME)),
        _times(spent),
        _places(out, by_name),
    ]
    return "\n\n".join(part for part in parts if part)


def _samples(stage: Stage) -> str:
    """Text that a published student writes after its configured prompts."""
    assert stage.config is not None
    assert stage.config.model is not None
    log = stage.config.log
    if not log.sample_prompts:
        return ""
    tokenizer = open_tokenizer(stage.config.data)
    prompts = [tokenizer.encode(prompt) for prompt in log.sample_prompts]
    continued = continue_tokens(
        load_model(stage.product.parent),
        prompts,
        new_tokens=log.sample_tokens,
        max_context=stage.config.model.n_positions,
        device=torch.device("cpu"),
        sampling=Sampling(seed=stage.config.run.seed),
    )
    texts = [
        tokenizer.decode([*prompt, *new]).replace("\n", "\n    ")
        for prompt, new in zip(prompts, continued, strict=True)
    ]
    return f"text sampled from {stage.name}:\n" + "\n".join(f"  > {text}" for text in texts)


def _evaluated(stage: Stage, name: str) -> str:
    """The tables of one student, without the losses by position."""
    tables = stage.product.with_suffix(".md").read_text(encoding="utf-8").split("\n\n")
    return f"{name} on validation windows:\n" + "\n\n".join(tables[:-1])


def _steered(path: Path) -> str:
    """Continuations under steering, as the page shows them."""
    text = path.read_text(encoding="utf-8").rstrip()
    return f"steered in one concept, whose logit is multiplied (1 leaves it as it is):\n{text}"


def _places(out: Path, by_name: dict[str, Stage]) -> str:
    places = {
        "concepts": by_name["concepts"].product,
        "comparison": by_name["comparison"].product,
        "loss curves": out / "comparison" / "curves.png",
        "evaluation": out / "*" / "evaluation",
        "tensorboard": f"tensorboard --logdir {out}",
    }
    return "\n".join(f"{name + ':':<13} {place}" for name, place in places.items())


def _times(spent: dict[str, Spent]) -> str:
    if not spent:
        return ""
    width = max(map(len, spent))
    lines = [f"  {name:<{width}} {took}" for name, took in spent.items()]
    return "\n".join(["time:", *lines, f"  {'total':<{width}} {sum(spent.values(), Spent(0.0, 0.0))}"])


def run_demo(args: argparse.Namespace) -> int:
    """Run all stages and show the summary; returns the exit code."""
    if args.processes < 1:
        raise ValueError(f"--processes {args.processes} must be at least 1")
    stages = plan(args.out, args.processes, args.overrides)
    with Runner() as runner:
        try:
            spent = run_stages(stages, runner, debug=args.debug)
            print(f"\n{summary(args.out, stages, spent)}")
        except KeyboardInterrupt:
            print(
                "\nstopped; what is finished stays, and the same command goes on from here", file=sys.stderr
            )
            return EXIT_INTERRUPTED
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.demo",
        description="Train teacher, autoencoder and two students on library text, and compare them",
        epilog="Arguments --section.key=value go to every stage that trains.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder of all stages ({DEFAULT_OUT})")
    parser.add_argument("--processes", type=int, default=2, help="ranks of the two students (2)")
    return run_cli(run_demo, parser, argv, errors=(StageError,), overrides=True)


if __name__ == "__main__":
    sys.exit(main())
