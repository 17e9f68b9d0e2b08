"""Starts orchestrators on tiny runs, watches what they do and ends what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.processes import environment
from launch.records import History, RunFiles, read_heartbeats

ROOT = Path(__file__).parents[2]
STEPS = 120
SAVE_EVERY = 20

_CONFIG = """
run: {{dir: {run_dir}, seed: 1, device: cpu}}
data: {{dir: {shards}, seq_len: 16, lanes: 4}}
model: {{d_model: 16, n_layer: 1, n_head: 2, vocab_size: 300, n_positions: 16}}
objective: {{name: ntp}}
optim: {{lr: 1e-2, min_lr: 1e-3, warmup_steps: 5}}
train: {{steps: {steps}, batch_size: 24, microbatch_size: 2, precision: fp32}}
validation: {{every_steps: 0, share: 0.2}}
checkpoint: {{every_steps: {save_every}, keep_last: 2}}
parallel: {{timeout_s: 60}}
log: {{every: 1, tensorboard: false, peak_tflops: 1.0}}
"""


def read_losses(run_dir: Path) -> dict[int, float]:
    """Return the next-token loss of every logged step, exactly as it was written."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss_ntp"] for record in map(json.loads, lines)}


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Return the orchestrator's events of one kind."""
    return [event for event in History(RunFiles(run_dir).history).events() if event["kind"] == kind]


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Wait until a condition holds; returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.05)
    return time.monotonic() - started


def last_step(run_dir: Path) -> int:
    """Newest step of any rank of the present launch; -1 before the first."""
    return max((beat.step for beat in read_heartbeats(RunFiles(run_dir)).values()), default=-1)


def wait_for_events(run_dir: Path, kind: str, count: int, timeout_s: float = 120.0) -> float:
    """Wait until there are so many events of a kind; returns the seconds that it took."""
    return wait_for(lambda: len(events(run_dir, kind)) >= count, timeout_s, f"{kind} number {count}")


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 120.0) -> None:
    wait_for(lambda: last_step(run_dir) >= step, timeout_s, f"{run_dir}: step {step}")


def processes_of(config: Path) -> list[int]:
    """Return all processes whose command line names a configuration, whoever is their parent."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if str(config).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def rank_pid(config: Path, rank: int) -> int:
    """Return the process of a rank of the present launch."""
    return next(pid for pid in processes_of(config) if environment(pid).get("RANK") == str(rank))


class Started:
    """An orchestrator that was started outside SLURM."""

    def __init__(self, config: Path, arguments: tuple[str, ...]) -> None:
        self.config, self.run_dir = config, config.parent / "run"
        self._output = config.parent / "output.txt"
        command = [sys.executable, "-m", "launch.orchestrator", f"--config={config}", *arguments]
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

    @property
    def output(self) -> str:
        """Everything it printed."""
        return self._output.read_text()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self, expected: int, timeout_s: float) -> None:
        """Wait for its end; fails with its output when it ends otherwise, and kills it when it does not."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {timeout_s:g} s:\n{self.output}") from None
        assert code == expected, f"exit code {code}:\n{self.output}"

    def kill(self) -> None:
        """End it and all its ranks."""
        self.process.kill()
        self.process.wait()
        for pid in processes_of(self.config):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class RunMaker:
    """Writes configurations of tiny runs and starts them."""

    def __init__(self, shards: Path) -> None:
        self._shards = shards

    def write(self, folder: Path) -> Path:
        """Write ``folder/config.yaml``; its run directory is ``folder/run``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        text = _CONFIG.format(run_dir=folder / "run", shards=self._shards, steps=STEPS, save_every=SAVE_EVERY)
        path.write_text(text)
        return path

    def start(self, config: Path, *arguments: str) -> Started:
        """Start an orchestrator of two ranks."""
        return Started(config, ("--nproc_per_node=2", "--restart_delay_s=0", *arguments))

    @contextlib.contextmanager
    def started(self, config: Path, *arguments: str) -> Iterator[Started]:
        """As :meth:`start`; nothing of it is left afterwards."""
        run = self.start(config, *arguments)
        try:
            yield run
        finally:
            run.kill()
