"""Downstream tasks in the middle of a training run, with the model as it lies on the ranks."""

from __future__ import annotations

from pathlib import Path

from data.source import open_tokenizer
from trainer.analysis.harness import TaskResults, run_tasks
from trainer.analysis.sampling import Sampling, continue_tokens
from trainer.analysis.scoring import Scorer
from trainer.build import Parts
from trainer.config import RunConfig


def evaluate_in_training(config: RunConfig, parts: Parts) -> TaskResults | None:
    """Evaluate the weights of this moment on ``config.tasks``; a collective over all ranks.

    Every rank builds the same requests. Their scoring is dealt out to the data-parallel ranks; answers
    in text are written by all ranks together, without a cache (``trainer.analysis.sampling``).

    Returns:
        ``None`` on ranks that are not the first of their node.

    Raises:
        ValueError: an unknown task, or one whose data cannot be had.
    """
    assert config.model is not None
    tasks, positions = config.tasks, config.model.n_positions
    model, device = parts.engine.model, parts.world.device

    def write(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return continue_tokens(
            model,
            prompts,
            new_tokens=new_tokens,
            max_context=positions,
            device=device,
            sampling=Sampling(top_k=1),
        )

    was_training = model.training
    model.eval()
    try:
        return run_tasks(
            Scorer(model, positions, device, tasks.batch_tokens, parts.mesh),
            open_tokenizer(config.data),
            write,
            tasks.names,
            include_path=Path(tasks.include_path) if tasks.include_path else None,
            limit=tasks.limit or None,
            standard_errors=False,
        )
    finally:
        model.train(was_training)
