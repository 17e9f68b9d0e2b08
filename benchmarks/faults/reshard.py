"""A run that goes on with another number of ranks or another layout, again and again."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.faults.lab import Lab
from benchmarks.faults.ranks import rank_folder, run_ranks
from benchmarks.faults.report import Trials
from benchmarks.faults.watched import Observer, train_observed
from benchmarks.faults.world import read_events
from data.loader import TokenLoader
from parallel.engine import Engine
from parallel.world import World
from trainer.build import Parts
from trainer.config import RunConfig
from trainer.stop import StopRequest

LAYOUTS = ((4, 1), (2, 1), (3, 1), (2, 2), (4, 2))
"""Number of ranks, and how many of them share a tensor; the others share the batch."""
STEPS_PER_LAYOUT = 6


def state_hash(engine: Engine) -> str:
    """SHA-256 over names, shapes and bytes of all weights and optimizer state; a collective."""
    digest = hashlib.sha256()
    for name, value in sorted(_flatten(engine.state_dict())):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(f"{name} {tuple(whole.shape)} {whole.dtype}\n".encode())
        digest.update(whole.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{name}.{key}")
    else:
        yield name, value


class Historian(Observer):
    """Keeps the hash of the first state, and the rows of every step; asks the run to stop in time."""

    def __init__(self, parts: Parts, stop: StopRequest, num_steps: int) -> None:
        super().__init__(parts)
        self._stop, self._num_steps = stop, num_steps
        self.first_hash = ""
        self.rows: list[list[list[int]]] = []
        """By step: this rank's (T+1,) windows."""

    def on_start(self) -> None:
        """Take the hash of what was loaded; begin a step's list of rows."""
        if not self.rows:
            self.first_hash = state_hash(self.parts.engine)
        self.rows.append([])

    def on_tokens(self, tokens: Tensor) -> None:
        """Note the rows."""
        self.rows[-1] += tokens.tolist()

    def on_end(self) -> None:
        """Flags are agreed one step late, so the request comes one step early."""
        if self.steps == self._num_steps - 1:
            self._stop.signal_name = "SIGTERM"


def other_world_sizes(lab: Lab, trials: Trials) -> str:
    """Train in one layout after the other: each starts with the state that the one before ended with."""
    folder = lab.room("reshard")
    config = lab.world.config(folder / "run", checkpoint__every_steps=0, validation__every_steps=0)
    expected = _rows_in_order(config)
    last_hash, step = "", 0
    for world_size, tp in LAYOUTS:
        session = _session(replace(config, parallel=replace(config.parallel, tp=tp)))
        results = run_ranks(session, world_size, rank_folder(Path(config.run.dir)))
        problems = []
        if {result["outcome"] for result in results} != {"stopped"}:
            problems.append(f"the ranks ended with {[result['outcome'] for result in results]}")
        first_hashes = {result["first_hash"] for result in results}
        if last_hash and first_hashes != {last_hash}:
            problems.append("the loaded state is not the saved one")
        by_step = zip(*(result["rows"] for result in results[::tp]), strict=True)
        rows: list[list[list[int]]] = [list(itertools.chain(*parts)) for parts in by_step]
        if rows != expected[step : step + len(rows)] or not rows:
            problems.append(f"steps {step + 1} to {step + len(rows)} read other rows, or in another order")
        last_hash, step = results[0]["last_hash"], step + len(rows)
        trials.add(f"{world_size} ranks, tp={tp}", problems, f"to step {step}, state {last_hash[:12]}")
    resumed = [event["step"] for event in read_events(Path(config.run.dir), "resume")]
    wanted = [STEPS_PER_LAYOUT * number for number in range(1, len(LAYOUTS))]
    trials.check("events", [] if resumed == wanted else [f"resumed from {resumed}, not {wanted}"])
    return "0 steps; 0 bits of the full state; 0 rows out of order"


def _session(config: RunConfig) -> Any:
    def one_rank(world: World) -> dict[str, Any]:
        stop = StopRequest()
        outcome, observer = train_observed(
            config, world, lambda parts: Historian(parts, stop, STEPS_PER_LAYOUT), stop
        )
        assert isinstance(observer, Historian)
        return {
            "outcome": outcome,
            "first_hash": observer.first_hash,
            "last_hash": state_hash(observer.parts.engine),
            "rows": observer.rows,
        }

    return one_rank


def _rows_in_order(config: RunConfig) -> list[list[list[int]]]:
    """The rows of each step as one rank alone reads them."""
    loader = TokenLoader(config.data, rows_per_step=config.train.batch_size, rank=0, world_size=1)
    try:
        return [next(loader).tokens.tolist() for _ in range(STEPS_PER_LAYOUT * len(LAYOUTS))]
    finally:
        loader.close()
