"""Run by every rank before a run: do ranks reach each other and see one file system, are GPUs free?

Started by ``launch.preflight`` through the same agents as the run itself. Rank 0 writes the result.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.gpus import Gpu, query_gpus
from launch.records import write_json
from parallel.world import World, start_world, stop_world

_NUM_ELEMENTS = 1 << 20
_REPEATS = 5


def measure_all_reduce(world: World) -> float:
    """Return the seconds of one all-reduce of 4 MiB, the shortest of several.

    Raises:
        RuntimeError: The sum is wrong.
    """
    expected = world.size * (world.size + 1) / 2
    shortest = float("inf")
    for _ in range(_REPEATS):
        values = torch.full((_NUM_ELEMENTS,), world.rank + 1.0, device=world.device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        smallest, largest = float(values.min()), float(values.max())
        shortest = min(shortest, time.perf_counter() - started)
        if not smallest == largest == expected:
            raise RuntimeError(f"an all-reduce over {world.size} ranks gave {smallest}, not {expected}")
    return shortest


def rank_facts(witness: Path, gpus: list[Gpu]) -> dict[str, Any]:
    """Return what this rank sees: its clock, whether the run directory is shared, its node's GPUs."""
    return {
        "host": socket.gethostname(),
        "time": time.time(),
        "sees_run_dir": witness.exists(),
        "gpus": [gpu.to_json() for gpu in gpus],
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 0, or raises what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m launch.probe", allow_abbrev=False)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), required=True)
    parser.add_argument("--timeout_s", type=float, required=True)
    parser.add_argument("--witness", type=Path, required=True, help="file that every node must see")
    parser.add_argument("--result", type=Path, required=True, help="JSON file that rank 0 writes")
    args = parser.parse_args(argv)
    # Before this rank's own use of them; one rank per node asks.
    gpus = query_gpus() if args.device != "cpu" and os.environ.get("LOCAL_RANK", "0") == "0" else []
    world = start_world(args.device, args.timeout_s)
    try:
        seconds = measure_all_reduce(world)
        dist.barrier()  # clocks are read together
        facts: list[Any] = [None] * world.size
        dist.all_gather_object(facts, rank_facts(args.witness, gpus))
        if world.is_main:
            write_json(args.result, {"seconds": seconds, "device": world.device.type, "ranks": facts})
    finally:
        stop_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())
