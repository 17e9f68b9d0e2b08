"""Commands run one after the other: what is finished is skipped, what was interrupted goes on.

Every stage is a command that a user could type, run as a process of its own and shown before it starts.
Ctrl-C or SIGTERM stops the running stage, which saves first, and leaves no process behind.
"""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from data.progress import format_duration
from launch.processes import adopt_orphans, kill_descendants, signal_at_parent_death
from trainer.checkpoint.state import compare_configs
from trainer.concepts.train_sae import REPORT_NAME
from trainer.config import RunConfig
from trainer.config_io import load_config, to_dict
from trainer.publish import published_path

CONFIGS = Path(__file__).parents[1] / "configs"
STOP_TIMEOUT_S = 120
"""What a stage may take to save when it is told to stop; then it is killed."""
TORCHRUN_STOP_TIMEOUT_S = 90
"""The same for the ranks below torchrun, which has to end before it is killed itself."""
LIBRARY_THREADS = "OMP_NUM_THREADS"


class StageError(RuntimeError):
    """A stage that failed, or whose folder holds something else; the text is one line."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One command."""

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
    quiet: bool = False
    """What it prints is not shown."""
    kind: str = ""
    """Stages of one kind take about as long as each other; where it is empty nothing is estimated."""


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


def training_stage(
    run_dir: Path,
    config_name: str,
    title: str,
    *,
    overrides: Sequence[str],
    inputs: Sequence[Stage],
    module: str = "trainer.main",
    ranks: int = 1,
    kind: str = "",
) -> Stage:
    """A run of ``configs/<config_name>.yaml`` in ``run_dir``, named after it.

    Args:
        run_dir: of the run.
        config_name: file below configs/ without its ending.
        title: what it is, for people.
        overrides: as on a command line; those that the file says already are left out.
        inputs: stages whose products it reads.
        module: program to run.
        ranks: processes.
        kind: see :class:`Stage`.

    Raises:
        ConfigError: an override does not fit.
    """
    path = CONFIGS / f"{config_name}.yaml"
    overrides = [*overrides, f"--run.dir={run_dir}"]
    config = load_config(RunConfig, path, overrides)
    needed = _needed(overrides, to_dict(load_config(RunConfig, path)))
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    command = (*(torchrun if ranks > 1 else ()), "-m", module, "--config", _shown(path), *needed)
    published = published_path(config)
    product = published.with_name(REPORT_NAME) if config.objective.name == "sae" else published
    products = tuple(stage.product for stage in inputs)
    return Stage(run_dir.name, title, command, product, products, config, ranks, kind=kind)


def _needed(overrides: Sequence[str], said: dict[str, Any]) -> list[str]:
    """Overrides whose key the file gives another value, or that follow one of the same key."""
    keys = [text.partition("=")[0].removeprefix("--") for text in overrides]
    return [
        text
        for text, key in zip(overrides, keys, strict=True)
        if keys.count(key) > 1 or text.partition("=")[2] != str(_value(said, key))
    ]


def _value(config: dict[str, Any], key: str) -> object:
    """What stands at a dotted key; None where its section is absent."""
    section, _, name = key.partition(".")
    return (config.get(section) or {}).get(name)


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
        left_s = estimate_s(stages[number - 1 :], stages, spent)
        left = "" if left_s is None else f" (about {format_duration(left_s)} left)"
        print(f"\n{label} {stage.title}{left}\n$ python {shlex.join(command)}", flush=True)
        start = Spent.now()
        code = runner.run(command, _environment(stage.ranks), quiet=stage.quiet)
        spent[stage.name] = Spent.now() - start
        if runner.stopped:
            raise KeyboardInterrupt
        if code != 0 or not stage.product.exists():
            raise StageError(f"stage {stage.name} failed with exit code {code}, see its output above")
        print(f"{label} done in {spent[stage.name]}", flush=True)
    return spent


def estimate_s(left: Sequence[Stage], stages: Sequence[Stage], spent: dict[str, Spent]) -> float | None:
    """Seconds that ``left`` will take, by what stages of the same kind took, or of any kind.

    Returns:
        ``None`` where nothing can be said: no stage with a kind has run, or none with one is left.
    """
    took: dict[str, list[float]] = {}
    for stage in stages:
        if stage.kind and stage.name in spent:
            took.setdefault(stage.kind, []).append(spent[stage.name].wall)
    kinds = [stage.kind for stage in left if stage.kind]
    if not took or not kinds:
        return None
    means = {kind: sum(walls) / len(walls) for kind, walls in took.items()}
    of_any_kind = sum(means.values()) / len(means)
    return sum(means.get(kind, of_any_kind) for kind in kinds)
