"""The simulation of changing ranks counts what the loader does, and notices when it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulate_elasticity import (
    RANKS_PER_NODE,
    Segment,
    Simulation,
    balance,
    main,
    openwebtext_shards,
    random_segments,
    simulate,
)
from data.manifest import DataError
from data.order import WindowOrder
from data.stream import plan_reads


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenWebText's real shape: 8,618 chunks of a million tokens."""
    return openwebtext_shards(tmp_path_factory.mktemp("openwebtext"))


def test_three_epochs_of_openwebtext_with_up_to_1024_ranks_and_20_changes(shards: Path) -> None:
    """Catches windows lost or seen twice at a change, nodes that read too much, a state that grows."""
    simulation, reads = simulate(shards, epochs=3, changes=20, seed=0)
    assert simulation.order.num_windows == 8_823_810
    assert all((simulation.seen[epoch] == 1).all() for epoch in (0, 1))
    assert len({item.segment.ranks for item in reads}) > 15
    assert reads[0].segment.ranks == 1024
    assert simulation.state_bytes < 10_000
    nodes = balance(reads)
    assert len(nodes) == 128
    assert np.abs(nodes - 1).max() < 0.1


@pytest.mark.parametrize("segment", [Segment(1000, 2000, 2, 40), Segment(72, 504, 7, 300)])
def test_reads_are_those_of_the_loader_s_plan(shards: Path, segment: Segment) -> None:
    """Catches a count of reads that the loader would not make."""
    simulation = Simulation(shards)
    found = simulation.run(segment)
    rows, keep = segment.rows_per_step, simulation.order.keep_steps(segment.rows_per_step, segment.ranks)

    def steps(rank: int) -> Iterator[np.ndarray]:
        for step in range(segment.steps):
            yield simulation.order.rows_of_rank(step * rows, rows, rank, segment.ranks)

    for node in (0, 4, segment.ranks // RANKS_PER_NODE - 1):
        ranks = range(node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE)
        reads = sum(len(missing) for rank in ranks for _, missing, _ in plan_reads(steps(rank), keep))
        assert found.per_node[node] * segment.steps == pytest.approx(reads)


def test_a_lost_window_is_noticed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a count that always agrees."""
    sound = WindowOrder.locate

    def repeats(order: WindowOrder, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        return sound(order, np.where(rows == 77_777, 77_776, rows))

    monkeypatch.setattr(WindowOrder, "locate", repeats)
    simulation = Simulation(shards)
    for segment in random_segments(100_000, 1, seed=0):
        simulation.run(segment)
    assert simulation.seen[0].max() == 2
    monkeypatch.setattr(
        "benchmarks.simulate_elasticity.random_segments", lambda *_: [Segment(8, 8192, 1, 12)]
    )
    with pytest.raises(DataError, match="windows of epoch 0 were seen twice"):
        simulate(shards, epochs=1, changes=1, seed=0)


def test_the_command_prints_a_line_for_each_segment(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that does not run, and options that are not checked."""
    assert main(["--scale", "50", "--epochs", "3", "--changes", "4"]) in (0, 1)
    out = capsys.readouterr().out
    assert out.count("\n| ") == 5
    assert "each once in 3 whole epochs over 4 changes; state 185 bytes" in out
    assert main(["--changes", "0"]) == 2
