"""``torchrun --nproc_per_node=N -m trainer.main --config configs/X.yaml [--section.key=value ...]``.

Trains what the configuration says, from the newest checkpoint of its run directory on. Plain
``python -m trainer.main`` is a run of one rank.

Exit codes: 0 finished, 2 refused (one line says why), 75 stopped by a signal or the job's end time
after saving: the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data.cli import run_cli
from data.files import replace_text
from parallel.world import World, start_world, stop_world, use_deterministic_algorithms
from trainer.build import Parts, build_parts
from trainer.checkpoint.io import Checkpointer
from trainer.checkpoint.policy import CheckpointPolicy, slurm_deadline
from trainer.checkpoint.state import Difference, check_resume, code_version
from trainer.checkpoint.store import CheckpointError, CheckpointStore
from trainer.config import RunConfig
from trainer.config_io import dump_config, load_config, to_dict
from trainer.health import TrainingDiverged
from trainer.heartbeat import Heartbeat, write_status
from trainer.loop import Loop, Outcome
from trainer.metrics.console import setup_logging
from trainer.metrics.device import device_peak_flops
from trainer.metrics.logger import MetricsLogger
from trainer.publish import publish
from trainer.stop import StopRequest

logger = logging.getLogger(__name__)

EXIT_STOPPED = 75
"""EX_TEMPFAIL: nothing is wrong, run the same command again."""


def open_run_directory(config: RunConfig, world: World) -> Path:
    """Create the run directory, or accept one that holds the same run; starts logging into it.

    Settings that may differ from the run's are warned about, each with both values.

    Raises:
        CheckpointError: it holds a run whose configuration differs where that changes the training.
    """
    run_dir = Path(config.run.dir)
    path = run_dir / "config.yaml"
    changed: list[Difference] = []
    if path.exists():
        changed = check_resume(to_dict(load_config(RunConfig, path)), to_dict(config))
    setup_logging(run_dir, world.rank)
    for difference in changed:
        logger.warning("changed since the run was started: %s", difference)
    if world.is_main:
        replace_text(path, dump_config(config))
    return run_dir


def build_logger(config: RunConfig, parts: Parts, run_dir: Path, resume_step: int) -> MetricsLogger:
    """The run's records; measures or looks up the device's peak for the MFU."""
    device_peak = device_peak_flops(parts.world.device, config.train.precision, config.log.peak_tflops)
    return MetricsLogger(
        run_dir,
        config.log,
        is_main=parts.world.is_main,
        resume_step=resume_step,
        total_steps=config.train.steps,
        tokens_per_step=config.tokens_per_step,
        flops_per_token=parts.flops.total,
        peak_flops=None if device_peak is None else device_peak * parts.world.size,
    )


def report_sources(config: RunConfig, parts: Parts) -> None:
    """Say what the run will have read of each source of a mixture when it ends."""
    if not (config.data.sources and parts.world.is_main):
        return
    for use in parts.planned:
        share = parts.loader.shares[use.name]
        logger.info(
            "source %s: %.4g of the rows; %s tokens, %.2f epochs by step %d",
            use.name, share, f"{use.tokens:,}", use.epochs, config.train.steps,
        )  # fmt: skip


def train(config: RunConfig, world: World, stop: StopRequest) -> Outcome:
    """Build, resume, train and publish one run; a collective over all ranks.

    Raises:
        ValueError, DataError, OSError: the configuration and what it names do not fit together.
        CheckpointError: there are checkpoints but none to continue from.
    """
    if config.run.deterministic:
        use_deterministic_algorithms()
    parts = build_parts(config, world)
    run_dir = open_run_directory(config, world)
    keep = config.checkpoint
    store = CheckpointStore(
        run_dir / "checkpoints", keep_last=keep.keep_last, keep_every_steps=keep.keep_every_steps
    )
    checkpointer = Checkpointer(store)
    checkpointer.recover()
    saved = checkpointer.find_newest()
    metrics_logger = build_logger(config, parts, run_dir, 0 if saved is None else saved.checkpoint.step)
    policy = CheckpointPolicy(config.checkpoint, start=time.time(), deadline=slurm_deadline(os.environ))
    heartbeat = Heartbeat(run_dir, world.rank)
    loop = Loop(config, parts, checkpointer, metrics_logger, policy, heartbeat, stop)
    try:
        if saved is None:
            metrics_logger.event("start", world_size=world.size, code=code_version())
            metrics_logger.config_text(dump_config(config))
        else:
            loop.resume(saved)
        report_sources(config, parts)
        if world.is_main:
            write_status(run_dir, "running", loop.progress.step)
        outcome = loop.run()
        if outcome == "finished":
            with heartbeat.phase("publish"):
                publish(config, parts.engine, parts.manifest.tokenizer.sha256, is_main=world.is_main)
        if world.is_main:
            write_status(run_dir, outcome, loop.progress.step)
    except TrainingDiverged as error:
        metrics_logger.event("fault", step=loop.progress.step, what="diverged", error=str(error))
        raise
    finally:
        heartbeat.beat(loop.progress.step, "leave")
        loop.report_saves(checkpointer.close())
        parts.loader.close()
        parts.engine.close()
        metrics_logger.close()
        heartbeat.close()
    return outcome


def run(config: RunConfig) -> int:
    """Train in this process as one rank of the launcher's world; returns the exit code."""
    with StopRequest() as stop:
        world = start_world(config.run.device, config.parallel.timeout_s)
        try:
            outcome = train(config, world, stop)
        finally:
            stop_world()
    return 0 if outcome == "finished" else EXIT_STOPPED


def run_config_cli(
    work: Callable[[RunConfig, Path], int], *, prog: str, description: str, argv: Sequence[str] | None
) -> int:
    """Command line of a program that trains from ``--config`` and overrides; returns the exit code.

    Args:
        work: receives the configuration and its file, returns the exit code.
        prog, description: shown by ``--help``.
        argv: arguments without the program name; ``None`` reads the process's own.
    """
    return run_cli(
        lambda args: work(load_config(RunConfig, args.config, args.overrides), args.config),
        config_parser(prog, description),
        argv,
        errors=(CheckpointError, TrainingDiverged),
        overrides=True,
    )


def config_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Parser of a program that takes ``--config`` and overrides of its keys."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_config_cli(
        lambda config, _: run(config),
        prog="python -m trainer.main",
        description="Train what a configuration says; any key can be overridden: --train.steps=100",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
