"""Results of downstream tasks as JSON, table and TensorBoard."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from data.files import replace_text
from trainer.analysis.harness import TaskResults
from trainer.analysis.tables import markdown_table
from trainer.metrics.tensorboard import TensorBoard


def to_markdown(results: TaskResults) -> str:
    """One row per task and metric, with standard errors and the number of examples."""
    rows = [["task", "metric", "value", "standard error", "examples"]]
    for task, metrics in results.metrics.items():
        for name, value in metrics.items():
            if name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr")
            spread = "" if error is None else f"{error:.4f}"
            rows.append([task, name, f"{value:.4f}", spread, str(results.num_examples.get(task, ""))])
    return markdown_table(rows) + "\n"


def task_scalars(results: TaskResults) -> dict[str, float]:
    """Values by TensorBoard tag, standard errors left out."""
    return {
        f"tasks/{task}/{name}": value
        for task, metrics in results.metrics.items()
        for name, value in metrics.items()
        if not name.endswith("_stderr")
    }


def store_tasks(run: Path, step: int, results: TaskResults) -> Path:
    """Write JSON, table and curves of the weights after ``step``; returns the JSON's path."""
    folder = run / "evaluation"
    folder.mkdir(exist_ok=True)
    path = folder / f"tasks_{step:08d}.json"
    replace_text(path.with_suffix(".md"), to_markdown(results))
    replace_text(path, json.dumps({"step": step, **asdict(results)}, indent=2, sort_keys=True) + "\n")
    # A TensorBoard run of its own: the training's own file may be open.
    board = TensorBoard(run / "tb" / "evaluation", None)
    board.tagged(step, task_scalars(results))
    board.markdown("tasks", to_markdown(results), step)
    board.close()
    return path
