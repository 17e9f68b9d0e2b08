"""``python -m launch.sweep configs/sweeps/demo.yaml [--out runs/sweep]``: settings x seeds, compared.

Trains every setting with every seed on the demo's tokens, teacher and autoencoder, one run after the
other, and ends with tables of means and confidence intervals over the seeds, also in ``comparison/``.
Finished runs are skipped, an interrupted one goes on. Before each run it is said how long the rest takes.
Arguments ``--section.key=value`` go to every student.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.cli import EXIT_INTERRUPTED, run_cli
from launch.demo import DEFAULT_OUT as DEMO_OUT
from launch.demo import foundation, placed
from launch.stages import CONFIGS, Runner, Stage, StageError, run_stages, training_stage
from trainer.config import RunConfig
from trainer.config_io import load_config

DEFAULT_OUT = Path("runs/sweep")


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingConfig:
    """One row of the matrix."""

    name: str
    """Of its runs' folders, ``<name>_seed<number>``."""
    config: str
    """File below configs/ without its ending."""
    overrides: tuple[str, ...] = ()
    """What differs from the file, as on a command line."""

    def __post_init__(self) -> None:
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"name={self.name!r} must be letters, digits, - and _: it names folders")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """A sweep's file."""

    seeds: tuple[int, ...]
    """Of weights and of the order of the data; three or more say something about chance."""
    settings: tuple[SettingConfig, ...]
    """The first one is the baseline."""
    overrides: tuple[str, ...] = ()
    """Of every setting, before its own."""

    def __post_init__(self) -> None:
        names = [setting.name for setting in self.settings]
        if len(set(names)) < len(names) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("settings must have different names, and seeds must differ")
        if len(names) * len(self.seeds) < 2:
            raise ValueError("settings must name at least two runs")


def plan(sweep: SweepConfig, base: Path, out: Path, processes: int, extra: Sequence[str] = ()) -> list[Stage]:
    """All stages in their order.

    Args:
        sweep: the matrix.
        base: folder of the demo, whose tokens, teacher and autoencoder are used.
        out: folder of the students and of the comparison.
        processes: ranks of a student.
        extra: overrides of every student.

    Raises:
        ConfigError: an override does not fit.
    """
    made = foundation(base)
    students = [
        _student(setting, seed, base, out, made, processes, (*sweep.overrides, *setting.overrides, *extra))
        for seed in sweep.seeds  # a whole matrix of one seed first: an early look is a fair one
        for setting in sweep.settings
    ]
    return [*made, *students, _comparison(out, sweep, students)]


def _student(
    setting: SettingConfig,
    seed: int,
    base: Path,
    out: Path,
    made: Sequence[Stage],
    processes: int,
    overrides: Sequence[str],
) -> Stage:
    own = [*overrides, f"--run.seed={seed}", f"--data.seed={seed}"]
    config = load_config(RunConfig, CONFIGS / f"{setting.config}.yaml", own)
    places = [f"--data.dir={base / 'data'}"]
    if config.concepts is not None:
        places = [*placed(base)]
    if config.kd is not None:
        places.append(f"--kd.teacher={base / 'teacher' / 'model'}")
    return training_stage(
        out / f"{setting.name}_seed{seed}",
        setting.config,
        f"{setting.name} with seed {seed}",
        overrides=[*own, *places],
        inputs=made,
        ranks=processes,
        kind=setting.name,
    )


def _comparison(out: Path, sweep: SweepConfig, students: Sequence[Stage]) -> Stage:
    # The first setting is the baseline, so its runs come first.
    ordered = sorted(students, key=lambda stage: not stage.name.startswith(f"{sweep.settings[0].name}_seed"))
    command = ("-m", "trainer.analysis.compare", *(str(out / stage.name) for stage in ordered))
    return Stage(
        "comparison",
        "all settings side by side",
        (*command, "--out", str(out / "comparison")),
        out / "comparison" / "comparison.md",
        tuple(stage.product for stage in students),
        quiet=True,
    )


def run_sweep(args: argparse.Namespace) -> int:
    """Run all stages; returns the exit code."""
    if args.processes < 1:
        raise ValueError(f"--processes {args.processes} must be at least 1")
    sweep = load_config(SweepConfig, args.sweep)
    stages = plan(sweep, args.demo, args.out, args.processes, args.overrides)
    with Runner() as runner:
        try:
            run_stages(stages, runner, debug=args.debug)
        except KeyboardInterrupt:
            print(
                "\nstopped; what is finished stays, and the same command goes on from here", file=sys.stderr
            )
            return EXIT_INTERRUPTED
    folder = args.out / "comparison"
    table = folder / ("seeds.md" if len(sweep.seeds) > 1 else "comparison.md")
    print(f"\n{table.read_text(encoding='utf-8')}\nwritten: {folder}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.sweep",
        description="Train settings x seeds on the demo's data and compare them",
        epilog="Arguments --section.key=value go to every student.",
        allow_abbrev=False,
    )
    parser.add_argument("sweep", type=Path, metavar="YAML", help="the matrix, see configs/sweeps/")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder of the runs ({DEFAULT_OUT})")
    parser.add_argument("--demo", type=Path, default=DEMO_OUT, help=f"tokens, teacher, SAE ({DEMO_OUT})")
    parser.add_argument("--processes", type=int, default=2, help="ranks of a student (2)")
    return run_cli(run_sweep, parser, argv, errors=(StageError,), overrides=True)


if __name__ == "__main__":
    sys.exit(main())
