"""``python -m benchmarks.faults [--kills 100] [--only NAME ...] [--record] [--seed 0]``: the chaos suite.

Puts real runs through real faults (2 to 4 gloo processes, a tiny model) and shows what was tried, what
was survived and what was lost. Exit code 1 when anything was not survived.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.damage import damaged_files
from benchmarks.faults.disk import full_disk
from benchmarks.faults.gradients import nan_gradients
from benchmarks.faults.hostile import hostile_files
from benchmarks.faults.kills import random_kills
from benchmarks.faults.lab import Lab
from benchmarks.faults.launcher import hung_rank, launcher_signals, second_job
from benchmarks.faults.report import Trials, markdown_table
from benchmarks.faults.reshard import other_world_sizes
from benchmarks.faults.writer import dead_writer
from benchmarks.record import Transcript, command_line, write_record
from data.cli import run_cli


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the table."""

    name: str
    title: str
    run: Callable[[Lab, Trials], str]
    """Tries the fault; returns what it costs where it is survived."""


FAULTS = (
    Fault("kills", "SIGKILL of random ranks at random times, half of them in a save", random_kills),
    Fault("damage", "bit flip, truncation, deletion of each class of file in a checkpoint", damaged_files),
    Fault("signals", "SIGTERM / SIGUSR1 to the launcher", launcher_signals),
    Fault("disk", "disk full while saving", full_disk),
    Fault("hang", "SIGSTOP of one rank", hung_rank),
    Fault("gradients", "NaN or infinite gradient on one rank", nan_gradients),
    Fault("writer", "background writer killed", dead_writer),
    Fault("two-jobs", "two jobs, one run directory", second_job),
    Fault("reshard", "world size 4 -> 2 -> 3 (FSDP) -> 2 (TP) -> 4 (FSDP x TP)", other_world_sizes),
    Fault("hostile", "malicious pickle, tar member, shard name", hostile_files),
)


def try_fault(fault: Fault, lab: Lab, transcript: Transcript, *, debug: bool = False) -> Trials:
    """Try one fault; an error of the trial itself counts as not survived."""
    trials = Trials(fault.name, transcript.say)
    started = time.monotonic()
    try:
        trials.lost = fault.run(lab, trials)
    except Exception as error:
        if debug:
            raise
        trials.add("the trial itself", [f"{type(error).__name__}: {' '.join(str(error).split())}"])
    trials.seconds = time.monotonic() - started
    return trials


def try_all(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Try what was asked for, print the table; returns the exit code."""
    # Ends as an error does: mounts are undone, files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.kills < 1:
        raise ValueError(f"--kills {args.kills} must be at least 1")
    faults = [fault for fault in FAULTS if not args.only or fault.name in args.only]
    transcript = Transcript()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        transcript.hidden[folder] = "LAB"
        lab = Lab(Path(folder), kills=args.kills, seed=args.seed)
        rows = [(fault.title, try_fault(fault, lab, transcript, debug=args.debug)) for fault in faults]
    passed = all(trials.passed for _, trials in rows)
    transcript.say(f"\n{markdown_table(rows)}\n")
    for _, trials in rows:
        for problem in trials.problems:
            transcript.say(f"FAIL [{trials.name}] {problem}")
    seconds = sum(trials.seconds for _, trials in rows)
    transcript.say(f"{'all survived' if passed else 'NOT all survived'}, {seconds:.0f} s")
    if args.record:
        path = write_record(
            "faults",
            command=command_line("benchmarks.faults", argv),
            config={"kills": args.kills, "seed": args.seed, "faults": [fault.name for fault in faults]},
            results=[trials.to_json() for _, trials in rows],
            log=transcript.text,
        )
        print(f"record: {path}")
    return 0 if passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description="Put runs through faults and count what survives"
    )
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--kills", type=int, default=100, help="processes killed at random")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"any of {', '.join(names)}")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--record", action="store_true", help="write a record below benchmarks/records")
    return run_cli(lambda args: try_all(args, argv), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
