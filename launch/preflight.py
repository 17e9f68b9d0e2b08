"""``python -m launch.preflight --config configs/X.yaml [--nproc_per_node N] [--section.key=value ...]``.

Checks, in seconds, what would otherwise fail a run after minutes or hours. One line per check; exit code 2
when one failed, with the failed ones on top. Inside a SLURM job all its nodes take part.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.cli import describe, run_cli
from data.joint import join_sources
from data.limits import planned_use
from data.manifest import DataError
from data.source import open_source
from launch.gpus import Gpu, query_gpus
from launch.processes import adopt_orphans
from launch.records import RunFiles, read_json
from launch.workers import Group, Place, find_place
from trainer.checkpoint.state import check_resume
from trainer.checkpoint.store import CheckpointError, CheckpointStore
from trainer.concepts.cache import open_labels
from trainer.config import RunConfig
from trainer.config_io import load_config, to_dict
from trainer.flops import parameter_count, sae_parameter_count

BYTES_PER_WEIGHT = 12
"""Of a checkpoint: fp32 weight and both AdamW moments."""
MAX_CELSIUS = 85.0
MAX_USED_SHARE = 0.05
PROBE_MIB = 1024.0
"""GPU memory that ranks of the probe itself may take already while another one asks."""
MAX_CLOCK_DIFFERENCE_S = 5.0
PROBE_TIMEOUT_S = 120.0

Outcome = Literal["ok", "FAIL", "skip"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    outcome: Outcome
    text: str

    def __str__(self) -> str:
        return f"{self.outcome:<5}{self.name:<16}{self.text}"


class Skip(Exception):
    """A check does not apply here; the text says why."""


def check(name: str, run: Callable[[], str]) -> Check:
    """Run one check: its returned text is good news, what it raises is bad news or a reason to skip."""
    try:
        return Check(name, "ok", run())
    except Skip as reason:
        return Check(name, "skip", str(reason))
    except (ValueError, DataError, CheckpointError, OSError, RuntimeError) as error:
        return Check(name, "FAIL", describe(error))


def check_batch(config: RunConfig, place: Place) -> str:
    """World size against the mesh and the batch."""
    size, parallel = place.world_size, config.parallel
    fixed = parallel.dp_replicate * parallel.tp * max(parallel.dp_shard, 1)
    if size % fixed or (parallel.dp_shard != -1 and size != fixed):
        raise ValueError(
            f"parallel.dp_replicate={parallel.dp_replicate} x dp_shard={parallel.dp_shard} "
            f"x tp={parallel.tp} does not make {size} ranks "
            f"({len(place.hosts)} nodes x {place.nproc_per_node})"
        )
    data_parallel = size // parallel.tp
    if config.train.batch_size % data_parallel:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} must be a multiple of the "
            f"{data_parallel} data-parallel ranks ({len(place.hosts)} nodes x {place.nproc_per_node})"
        )
    rows = config.train.batch_size // data_parallel
    return f"{size} ranks on {len(place.hosts)} nodes, {rows} sequences per rank and step"


def check_data(config: RunConfig) -> str:
    """Manifests, shard sizes, sequence length, vocabulary, and how often each source is read."""
    data = config.data
    sources = {name: open_source(part) for name, part in data.by_source.items()}
    vocab_size = join_sources(data.place, sources).manifest.tokenizer.vocab_size
    if config.model is not None and vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be at least {vocab_size}, "
            f"the vocabulary of the tokens in {data.place}"
        )
    manifests = [source.manifest for source in sources.values()]
    planned = planned_use(data, manifests, config.train.batch_size, config.train.steps)
    return "; ".join(
        f"{part.dir}: {sum(len(split.shards) for split in manifest.splits.values())} shards, "
        f"{manifest.splits['train'].tokens:,} training tokens, {use.epochs:.2f} epochs of them"
        for part, manifest, use in zip(data.by_source.values(), manifests, planned, strict=True)
    )


def check_concepts(config: RunConfig) -> str:
    """Teacher and autoencoder are there, or the targets that were stored with them."""
    if config.reads_labels and config.concepts is not None:
        manifests = [open_source(part).manifest for part in config.data.by_source.values()]
        labels = open_labels(config.concepts, config.data, manifests)
        return f"not needed: targets are read from {', '.join(cache.place for cache in labels)}"
    paths = config.frozen_models
    if not paths:
        raise Skip(f"objective.name={config.objective.name} needs no teacher")
    for key, path in paths.items():
        if not Path(path).exists():
            raise ValueError(f"{key}={path}: no such file or folder")
    return ", ".join(f"{key}={path}" for key, path in paths.items())


def check_run_dir(config: RunConfig) -> str:
    """The run directory can be written, and holds the same run or none."""
    run_dir = Path(config.run.dir)
    existing = existing_parent(run_dir)
    with tempfile.NamedTemporaryFile(dir=existing, prefix=".preflight-") as file:
        file.write(b"\0")
        file.flush()
        os.fsync(file.fileno())
    written = run_dir / "config.yaml"
    if written.exists():
        check_resume(to_dict(load_config(RunConfig, written)), to_dict(config))
    steps = CheckpointStore(RunFiles(run_dir).checkpoints).steps()
    return f"{run_dir}: {f'continues from step {steps[-1]}' if steps else 'a fresh run'}"


def existing_parent(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def num_parameters(config: RunConfig) -> int:
    """Weights that a checkpoint of the run holds."""
    if config.objective.name == "sae":
        assert config.sae is not None
        return sae_parameter_count(_teacher_width(Path(config.sae.teacher)), config.sae.num_latents)
    assert config.model is not None
    return sum(parameter_count(config.model, config.insertion).values())


def _teacher_width(path: Path) -> int:
    for folder in (path, path.parent):
        described = read_json(folder / "config.json")
        if described is not None and "n_embd" in described:
            return int(described["n_embd"])
    raise Skip(f"the width of {path} is not known before it is loaded")


def check_disk(config: RunConfig) -> str:
    """Room for the checkpoints that are kept and the one that is being written."""
    one = BYTES_PER_WEIGHT * num_parameters(config)
    run_dir = Path(config.run.dir)
    present = len(CheckpointStore(RunFiles(run_dir).checkpoints).steps())
    needed = one * max(config.checkpoint.keep_last + 1 - present, 1)
    free = shutil.disk_usage(existing_parent(run_dir)).free
    text = f"{free / 1e9:,.1f} GB free, {needed / 1e9:,.2f} GB needed, {one / 1e9:,.2f} GB per checkpoint"
    if free < needed:
        raise ValueError(f"{run_dir}: {text}; free some, or lower checkpoint.keep_last")
    return text


def check_port(place: Place) -> str:
    """The rendezvous port is free on the first node."""
    if place.job is None:
        return "chosen when the ranks start"
    port = place.port(0)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(f"port {port} on {socket.gethostname()}: {error.strerror}") from error
    return f"{port} on {place.hosts[0]}"


def check_gpus(gpus: Sequence[tuple[str, Gpu]]) -> str:
    """Nobody else uses the GPUs, and they are not too hot to start.

    Args:
        gpus: Pairs of host name and GPU.
    """
    if not gpus:
        raise Skip("nvidia-smi lists no GPU")
    for host, gpu in gpus:
        allowed_mib = MAX_USED_SHARE * gpu.total_mib + PROBE_MIB
        if gpu.used_mib > allowed_mib:
            raise ValueError(
                f"{host} GPU {gpu.index}: {gpu.used_mib:.0f} of {gpu.total_mib:.0f} MiB are in use, "
                f"at most {allowed_mib:.0f} may be: another process holds it"
            )
        if gpu.celsius > MAX_CELSIUS:
            raise ValueError(
                f"{host} GPU {gpu.index}: {gpu.celsius:.0f} degrees, at most {MAX_CELSIUS:.0f} may be"
            )
    hottest = max(gpu.celsius for _, gpu in gpus)
    return f"{len(gpus)} GPUs, memory free, at most {hottest:.0f} degrees"


def probe_ranks(config: RunConfig, place: Place) -> dict[str, Any]:
    """Start all ranks for a moment and return what :mod:`launch.probe` found.

    Raises:
        RuntimeError: They did not get through; the text ends with the last line of their output.
    """
    folder = RunFiles(Path(config.run.dir)).root / "logs" / "preflight"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = folder / "result.json"
    command = [
        "launch.probe",
        f"--device={config.run.device}",
        f"--timeout_s={PROBE_TIMEOUT_S / 2}",
        f"--witness={folder}",
        f"--result={result}",
    ]
    group = Group(place, command, run_dir=folder, launch_dir=folder, port=place.port(0))
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    try:
        while group.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        group.kill()
    found = read_json(result)
    if group.exit_code() or found is None:
        raise RuntimeError(f"{place.world_size} ranks did not get through: {_last_line(folder)}")
    return found


def _last_line(folder: Path) -> str:
    logs = [path for path in folder.glob("node_*/*/attempt_0/*/stderr.log") if path.stat().st_size]
    if not logs:
        return f"no answer in {PROBE_TIMEOUT_S:.0f} s and no message"
    first = min(logs, key=lambda path: path.stat().st_mtime)
    return first.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-1]


def check_all_reduce(found: dict[str, Any]) -> str:
    """The probe's timing, with what it saw of file system and clocks."""
    ranks = found["ranks"]
    blind = sorted({rank["host"] for rank in ranks if not rank["sees_run_dir"]})
    if blind:
        raise ValueError(f"{', '.join(blind)}: run.dir is not there; it must be on a shared file system")
    times = [rank["time"] for rank in ranks]
    if max(times) - min(times) > MAX_CLOCK_DIFFERENCE_S:
        raise ValueError(
            f"clocks of the nodes differ by {max(times) - min(times):.1f} s, at most "
            f"{MAX_CLOCK_DIFFERENCE_S} s may be: the run's lock needs them"
        )
    gigabytes_per_s = 4 * 2**20 / found["seconds"] / 1e9
    return (
        f"{len(ranks)} ranks ({found['device']}): 4 MiB in {1e3 * found['seconds']:.2f} ms, "
        f"{gigabytes_per_s:.2f} GB/s"
    )


def check_ranks(config: RunConfig, place: Place, *, quick: bool) -> list[Check]:
    """The checks that need the ranks, or with ``quick`` this machine's GPUs alone."""
    if quick:
        here = [(socket.gethostname(), gpu) for gpu in query_gpus()] if config.run.device != "cpu" else []
        return [Check("all-reduce", "skip", "--quick"), check("gpus", partial(check_gpus, here))]
    found: dict[str, Any] = {}

    def run_probe() -> str:
        found.update(probe_ranks(config, place))
        return check_all_reduce(found)

    reduced = check("all-reduce", run_probe)
    gpus = [(rank["host"], Gpu(**gpu)) for rank in found.get("ranks", []) for gpu in rank["gpus"]]
    return [reduced, check("gpus", partial(check_gpus, gpus))]


def run_checks(config: RunConfig, place: Place, *, quick: bool) -> list[Check]:
    """Run all checks; the ranks are started only when everything before is good."""
    checks = [
        check("world size", partial(check_batch, config, place)),
        check("data", partial(check_data, config)),
        check("teacher, SAE", partial(check_concepts, config)),
        check("run directory", partial(check_run_dir, config)),
        check("disk", partial(check_disk, config)),
        check("port", partial(check_port, place)),
    ]
    if any(one.outcome == "FAIL" for one in checks):
        return [*checks, Check("all-reduce", "skip", "after the failures above")]
    return [*checks, *check_ranks(config, place, quick=quick)]


def preflight(args: argparse.Namespace) -> int:
    """Print all checks, failed ones first; returns 2 when one failed."""
    adopt_orphans()
    config = load_config(RunConfig, args.config, args.overrides)
    place = find_place(args.nproc_per_node)
    checks = [
        Check("configuration", "ok", str(args.config)),
        *run_checks(config, place, quick=args.quick),
    ]
    failed = [one for one in checks if one.outcome == "FAIL"]
    for one in sorted(checks, key=lambda one: one.outcome != "FAIL"):
        print(f"[preflight] {one}", flush=True)
    return 2 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.preflight", allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
    parser.add_argument("--nproc_per_node", type=int, help="ranks per node; one per GPU by default")
    parser.add_argument("--quick", action="store_true", help="do not start ranks for an all-reduce")
    return run_cli(preflight, parser, argv, overrides=True)


if __name__ == "__main__":
    sys.exit(main())
