"""Signs of life for whoever watches a run: a beat per rank, the run's status, stacks on request."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

from data.files import replace_text

Phase = Literal["start", "step", "validation", "checkpoint", "samples", "tasks", "publish", "leave"]
Status = Literal["running", "stopped", "finished"]

_INTERVAL_S = 0.5


class Heartbeat:
    """Says which step this rank is at, in ``RUN/heartbeat/rank_N.json``.

    Beaten by the loop itself and not by a thread: a rank that hangs in a collective must fall silent.
    SIGUSR2 makes the process append the stacks of its threads to ``RUN/logs/stacks_rank_N.txt``.

    Args:
        run_dir: run directory.
        rank: number of this process.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / "heartbeat" / f"rank_{rank}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        (run_dir / "logs").mkdir(exist_ok=True)
        self._stacks: IO[str] = open(run_dir / "logs" / f"stacks_rank_{rank}.txt", "a")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True, chain=False)
        self._who = {"pid": os.getpid(), "host": socket.gethostname()}
        self._last = 0.0
        self._step, self._phase = 0, "start"
        self.beat(0, "start")

    def beat(self, step: int, phase: Phase) -> None:
        """Note the step; written at once when the phase changed, else twice a second at most."""
        now = time.time()
        if phase == self._phase and now - self._last < _INTERVAL_S:
            return
        self._last, self._step, self._phase = now, step, phase
        text = json.dumps({**self._who, "step": step, "time": now, "phase": phase})
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(text)  # not fsynced: a beat that a power loss takes is of no use
            temporary.replace(self._path)
        except OSError:
            # A full disk must neither end the run nor make it look dead: the block that the last beat
            # lies in can still be written over.
            with suppress(OSError), open(self._path, "r+") as file:
                file.write(text)
                file.truncate()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Do something long between two steps."""
        self.beat(self._step, name)
        yield
        self.beat(self._step, "step")

    def close(self) -> None:
        """Stop answering SIGUSR2, which from now on does nothing: its default would kill the process."""
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._stacks.close()


def write_status(run_dir: Path, state: Status, step: int) -> None:
    """Write ``RUN/status.json`` (rank 0). ``stopped`` means saved and to be started again.

    A launcher cannot rely on exit codes: torchrun turns every one of a worker's into 1.
    """
    status = {"state": state, "step": step, "time": time.time()}
    replace_text(run_dir / "status.json", json.dumps(status) + "\n")
