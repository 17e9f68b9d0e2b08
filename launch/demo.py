"""``python -m launch.demo [--out runs/demo]``: from text to a measured student in minutes, on CPU.

Every stage is a command that a user could type, run as a process of its own and shown before it
starts: tokens, teacher, sparse autoencoder, a CoCoMix student, a next-token student of as many
parameters on the same tokens, and their comparison. Arguments of the form ``--section.key=value`` go
to every stage that trains.

A stage that is finished is skipped, one that was interrupted goes on. Ctrl-C or SIGTERM stops the
running stage, which saves first, and leaves no process behind.

Exit codes: 0 finished, 2 a stage failed (one line says which), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from data.cli import EXIT_INTERRUPTED, run_cli
from data.manifest import MANIFEST_NAME
from data.progress import format_duration
from data.source import open_tokenizer
from launch.processes import adopt_orphans, kill_descendants, signal_at_parent_death
from trainer.analysis.curves import read_curve
from trainer.analysis.sampling import Sampling, continue_tokens
from trainer.checkpoint.state import compare_configs
from trainer.concepts.train_sae import REPORT_NAME
from trainer.config import RunConfig
from trainer.config_io import load_config, to_dict
from trainer.metrics.json_lines import read_json_lines
from trainer.model.formats import load_model
from trainer.publish import published_path

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULT_OUT = Path("runs/demo")
VOCAB_SIZE = 4096
VAL_FRACTION = 0.02
STOP_TIMEOUT_S = 120
"""What a stage may take to save when it is told to stop; then it is killed."""
TORCHRUN_STOP_TIMEOUT_S = 90
"""The same for the ranks below torchrun, which has to end before it is killed itself."""
LIBRARY_THREADS = "OMP_NUM_THREADS"


class StageError(RuntimeError):
    """A stage that failed, or whose folder holds something else; the text is one line."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of the demo."""

    name: str
    title: str
    command: tuple[str, ...]
    """Arguments after ``python``."""
    product: Path
    """File that the command writes last: where it exists, the stage is finished."""
    inputs: tuple[Path, ...] = ()
    """Products of earlier stages that this one reads."""
    config: RunConfig | None = None
    """What a training stage trains."""
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Spent:
    """What a stage took, seconds."""

    wall: float
    cpu: float
    """Of all its processes."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)

    def __str__(self) -> str:
        return f"{format_duration(self.wall)} (CPU {format_duration(self.cpu)})"

    @classmethod
    def now(cls) -> Spent:
        """Clock and CPU time of the processes that have ended below this one."""
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.monotonic(), usage.ru_utime + usage.ru_stime)


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
    teacher_model, sae_file = out / "teacher" / "model", out / "sae" / "model" / "sae.pt"
    concepts = [f"--concepts.teacher={teacher_model}", f"--concepts.sae={sae_file}"]
    train = partial(_training, out, extra=extra)
    tokens = _tokens(out / "data")
    teacher = train("teacher", "demo_teacher", "the teacher, a small GPT-2", inputs=(tokens,))
    sae = train(
        "sae",
        "demo_sae",
        "a sparse autoencoder of the teacher's residuals, the concepts",
        module="trainer.concepts.train_sae",
        paths=[f"--sae.teacher={teacher_model}"],
        inputs=(tokens, teacher),
    )
    cocomix = train(
        "cocomix",
        "demo",
        "the CoCoMix student",
        paths=concepts,
        inputs=(tokens, teacher, sae),
        ranks=processes,
    )
    ntp = train(
        "ntp",
        "demo_ntp",
        "the next-token student: as many parameters, the same tokens",
        inputs=(tokens,),
        ranks=processes,
    )
    return [tokens, teacher, sae, cocomix, ntp, _comparison(out, ntp, cocomix)]


def _tokens(folder: Path) -> Stage:
    arguments = f"--source stdlib --vocab_size {VOCAB_SIZE} --val_fraction {VAL_FRACTION}".split()
    command = ("-m", "data.prepare", *arguments, "--out", str(folder))
    return Stage("data", "the standard library's text as tokens", command, folder / MANIFEST_NAME)


def _training(
    out: Path,
    name: str,
    config_name: str,
    title: str,
    *,
    extra: Sequence[str],
    inputs: Sequence[Stage],
    module: str = "trainer.main",
    paths: Sequence[str] = (),
    ranks: int = 1,
) -> Stage:
    path = CONFIGS / f"{config_name}.yaml"
    overrides = [*extra, f"--run.dir={out / name}", f"--data.dir={out / 'data'}", *paths]
    config = load_config(RunConfig, path, overrides)
    if load_config(RunConfig, path, extra) == config:  # the file says so already: the command stays short
        overrides = list(extra)
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    command = (*(torchrun if ranks > 1 else ()), "-m", module, "--config", _shown(path), *overrides)
    published = published_path(config)
    product = published.with_name(REPORT_NAME) if config.objective.name == "sae" else published
    return Stage(name, title, command, product, tuple(stage.product for stage in inputs), config, ranks)


def _comparison(out: Path, baseline: Stage, student: Stage) -> Stage:
    folder = out / "comparison"
    runs = [str(out / stage.name) for stage in (baseline, student)]
    command = ("-m", "trainer.analysis.compare", *runs, "--out", str(folder))
    inputs = (baseline.product, student.product)
    return Stage("comparison", "both students side by side", command, folder / "comparison.md", inputs)


def _shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def is_finished(stage: Stage) -> bool:
    """Whether a stage need not run.

    Raises:
        StageError: a finished training run has another configuration, or is older than what it was
            made from; only its owner can say whether it may go.
    """
    if not stage.product.exists():
        return False
    newer = [path for path in stage.inputs if path.stat().st_mtime_ns > stage.product.stat().st_mtime_ns]
    if stage.config is None:
        return not newer
    run_dir = Path(stage.config.run.dir)
    advice = f"remove {run_dir} to train it anew, or choose another --out"
    if newer:
        raise StageError(f"{run_dir}: was made before {newer[0]}; {advice}")
    hard, soft = compare_configs(
        to_dict(load_config(RunConfig, run_dir / "config.yaml")), to_dict(stage.config)
    )
    for difference in (*hard, *(item for item in soft if item.key == "train.steps")):
        raise StageError(
            f"{run_dir}: is finished with {difference.key}={difference.old}, not {difference.new}; {advice}"
        )
    return True


# How it is run


class Runner:
    """Runs one command at a time and passes the first signal to stop on to it; a context manager.

    The command gets a session of its own: a terminal's Ctrl-C reaches this process alone, which tells
    the command once. (A second SIGINT would make torchrun drop its ranks while they save.)
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped_at: float | None = None
        self._old: dict[signal.Signals, object] = {}

    @property
    def stopped(self) -> bool:
        """Whether a signal arrived."""
        return self._stopped_at is not None

    def __enter__(self) -> Runner:
        adopt_orphans()
        for number in self._SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            # Not print: a handler may interrupt a print that holds the buffer.
            os.write(2, b"\nstill saving, please wait\n")
            return
        self._stopped_at = time.monotonic()
        if self._process is None:
            raise KeyboardInterrupt
        self._process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def run(self, command: Sequence[str], environment: dict[str, str], *, quiet: bool) -> int:
        """Run ``python`` with these arguments; returns its exit code with nothing left of it."""
        try:
            # A signal between the start and the assignment must find the process.
            signal.pthread_sigmask(signal.SIG_BLOCK, self._SIGNALS)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, *command],
                    env=environment,
                    stdout=subprocess.DEVNULL if quiet else None,
                    start_new_session=True,
                    preexec_fn=self._prepare_child,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, self._SIGNALS)
            return self._wait(self._process)
        finally:
            self._process = None
            kill_descendants(os.getpid())

    def _prepare_child(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._SIGNALS)
        # Should this process be killed outright, the stage saves and ends too.
        signal_at_parent_death(signal.SIGTERM)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                return process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                if self._stopped_at is not None and time.monotonic() > self._stopped_at + STOP_TIMEOUT_S:
                    process.kill()


def _environment(ranks: int) -> dict[str, str]:
    """Environment of a stage whose ranks share the cores; a number of threads that is set stays."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    defaults = {
        LIBRARY_THREADS: str(threads),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(TORCHRUN_STOP_TIMEOUT_S),
        "PYTHONUNBUFFERED": "1",
    }
    return defaults | dict(os.environ)


def run_stages(stages: Sequence[Stage], runner: Runner, *, debug: bool = False) -> dict[str, Spent]:
    """Run what is not finished; returns what each stage that ran took.

    Raises:
        StageError: a stage failed.
        KeyboardInterrupt: told to stop, and everything has stopped.
    """
    spent: dict[str, Spent] = {}
    for number, stage in enumerate(stages, start=1):
        label = f"[{number}/{len(stages)}] {stage.name}:"
        if is_finished(stage):
            print(f"{label} finished before, {stage.product}", flush=True)
            continue
        command = (*stage.command, *(["--debug"] if debug else []))
        print(f"\n{label} {stage.title}\n$ python {shlex.join(command)}", flush=True)
        start = Spent.now()
        # The table of the comparison stands in the summary.
        code = runner.run(command, _environment(stage.ranks), quiet=stage.name == "comparison")
        spent[stage.name] = Spent.now() - start
        if runner.stopped:
            raise KeyboardInterrupt
        if code != 0 or not stage.product.exists():
            raise StageError(f"stage {stage.name} failed with exit code {code}, see its output above")
        print(f"{label} done in {spent[stage.name]}", flush=True)
    return spent


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
        *(_samples(by_name[name]) for name in ("cocomix", "ntp")),
        _times(spent),
        f"loss curves:  {out / 'comparison' / 'curves.png'}\ntensorboard:  tensorboard --logdir {out}",
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


def _times(spent: dict[str, Spent]) -> str:
    if not spent:
        return ""
    lines = [f"  {name:<11} {took}" for name, took in spent.items()]
    return "\n".join(["time:", *lines, f"  {'total':<11} {sum(spent.values(), Spent(0.0, 0.0))}"])


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
