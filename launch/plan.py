"""``python -m launch.plan --config configs/1b.yaml --nodes 8 --gpus 8 [--section.key=value ...]``.

Memory, communication and time of a run on a cluster, before it starts. Nothing is allocated and no GPU is
needed. ``--check`` trains the planned step on fake tensors and compares; ``--markdown`` prints a table of
several configurations and tensor-parallel sizes.

Exit codes: 0 it fits, 2 bad input (what the trainer would refuse too), 3 it does not fit, 4 the plan and the
fake step do not agree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.cli import run_cli
from launch.planning.forecast import Assumptions, Plan, make_plan
from launch.planning.layout import Cluster
from launch.planning.report import aligned, markdown_head, markdown_row, report
from trainer.config import RunConfig
from trainer.config_io import load_config

EXIT_DOES_NOT_FIT = 3
EXIT_DISAGREES = 4


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_cli(_run, _parser(), argv, overrides=True)


def _parser() -> argparse.ArgumentParser:
    default = Assumptions()
    parser = argparse.ArgumentParser(
        prog="python -m launch.plan",
        description="Memory, communication and time of a run; any key can be overridden: --parallel.tp=2",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="YAML file, see configs/")
    parser.add_argument("--nodes", type=int, default=1, help="machines (%(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each machine (%(default)s)")
    parser.add_argument("--gpu", default=default.gpu, help="name that trainer/flops.py knows (%(default)s)")
    for key, text in (
        ("gpu_memory_gb", "GiB of a GPU"),
        ("intra_gbps", "GB/s (1e9 bytes) that a GPU sends to others in its node"),
        ("inter_gbps", "GB/s that a GPU sends to other nodes"),
        ("host_gbps", "GB/s between a GPU and the host's memory, for what is offloaded"),
        ("mfu", "share of the peak that the computation alone reaches"),
    ):
        parser.add_argument(
            f"--{key}", type=float, default=getattr(default, key), help=f"{text} (%(default)s)"
        )
    parser.add_argument(
        "--gpu_hour_price", type=_price, default=None, help="price of one GPU for an hour, or none"
    )
    parser.add_argument("--check", action="store_true", help="compare with a step on fake tensors")
    parser.add_argument(
        "--markdown", type=int, nargs="+", metavar="TP", help="a table with these parallel.tp instead"
    )
    return parser


def _price(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _run(args: argparse.Namespace) -> int:
    assumptions = Assumptions(
        gpu=args.gpu,
        gpu_memory_gb=args.gpu_memory_gb,
        intra_gbps=args.intra_gbps,
        inter_gbps=args.inter_gbps,
        host_gbps=args.host_gbps,
        mfu=args.mfu,
        gpu_hour_price=args.gpu_hour_price,
    )
    cluster = Cluster(args.nodes, args.gpus)
    sizes = [[f"--parallel.tp={tp}"] for tp in args.markdown] if args.markdown else [[]]
    plans = [
        (path.stem, make_plan(load_config(RunConfig, path, [*args.overrides, *size]), cluster, assumptions))
        for path in args.config
        for size in sizes
    ]
    if args.markdown:
        print("\n".join([markdown_head(), *(markdown_row(name, plan) for name, plan in plans)]))
    agrees = True
    for name, plan in plans:
        if not args.markdown:
            print(report(plan))
        if args.check:
            agrees = _check(name, plan) and agrees
    if not agrees:
        return EXIT_DISAGREES
    return 0 if all(plan.fits for _, plan in plans) else EXIT_DOES_NOT_FIT


def _check(name: str, plan: Plan) -> bool:
    """Print the plan beside its step on fake tensors; returns whether they agree."""
    # Not at the top: everything else answers without torch, in a tenth of a second.
    from launch.planning.check import compare
    from launch.planning.measure import measure

    found = compare(plan, measure(plan))
    print(f"\n{name}, tp {plan.layout.tp}, {plan.layout.cluster.world_size} ranks: bytes on fake tensors")
    rows = [("", "planned", "measured", "error", "")]
    for line in found:
        verdict = "" if line.agrees else f"DISAGREES, at most {line.tolerance:.0%} is accepted"
        rows.append((line.what, f"{line.planned:,}", f"{line.measured:,}", f"{line.error:+.2%}", verdict))
    print("\n".join(aligned(rows)))
    return all(line.agrees for line in found)


if __name__ == "__main__":
    sys.exit(main())
