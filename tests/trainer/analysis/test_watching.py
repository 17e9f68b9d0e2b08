"""What TensorBoard's real server shows of a run that was trained, evaluated and inspected."""

from __future__ import annotations

from pathlib import Path

import pytest

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from tests.trainer.analysis.test_generate import train_on_ranks
from tests.trainer.test_metrics import ask, ask_bins, await_tags, tensorboard_server
from tests.trainer.tiny_run import NUM_LATENTS, tiny_config
from trainer.analysis import evaluate, inspect


@pytest.mark.dist
def test_histograms_tables_and_samples_are_served(tiny_world: Path, tmp_path: Path) -> None:
    """Catches counts of one rank, histograms that no run writes, texts that arrive in another run's place."""
    run = tmp_path / "run"
    config = tiny_config(tiny_world, run, train__steps=4, log__tensorboard=True, log__every=2)
    train_on_ranks(config, 2)
    assert evaluate.main([str(run)]) == 0
    assert inspect.main([str(run), "--steer_concepts=2", "--max_concepts=3"]) == 0
    steered = (run / "inspect" / "steering.txt").read_text()
    with tensorboard_server(run / "tb") as address:
        await_tags(address, "text", "evaluation")
        texts = ask(f"{address}data/plugin/text/tags")
        tags = [tag.removesuffix("/text_summary") for tag in texts["evaluation"]]
        concepts = [tag.removeprefix("steering/") for tag in tags if tag.startswith("steering/")]
        assert len(concepts) == 2 and "validation" in tags
        for concept in concepts:
            assert f"{concept}=-10 | " in steered
            (event,) = ask(
                f"{address}data/plugin/text/text?run=evaluation&tag=steering/{concept}/text_summary"
            )
            assert event["step"] == 4
            assert f"{concept}=-10 |" in event["text"]
        (table,) = ask(f"{address}data/plugin/text/text?run=evaluation&tag=validation/text_summary")
        assert "recall@A" in table["text"] and "<table>" in table["text"]
        for tag in ("concepts/density_used", "concepts/density_targeted"):
            points = ask(f"{address}data/plugin/histograms/histograms?run=.&tag={tag.replace('/', '%2F')}")
            assert [step for _, step, _ in points] == [2, 4]
            assert sum(count for _, _, count in ask_bins(address, tag)) == pytest.approx(NUM_LATENTS)
