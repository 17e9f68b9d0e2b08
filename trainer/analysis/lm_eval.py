"""``python -m trainer.analysis.lm_eval RUN --tasks lambada_openai,hellaswag``: downstream tasks.

RUN is a run directory or an exported folder, as for ``trainer.analysis.generate``. The tasks are those of
EleutherAI's lm-evaluation-harness, their data come from the Hugging Face hub or its local cache, and
``--include_path`` adds tasks of one's own with local data. A run gets ``evaluation/tasks_<step>.json`` and
``.md``, and curves in TensorBoard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from data.cli import run_cli
from parallel.world import choose_device
from trainer.analysis.harness import INSTALL, TaskResults, run_tasks
from trainer.analysis.sampling import Sampling, generate
from trainer.analysis.scoring import Scorer
from trainer.analysis.task_report import store_tasks, to_markdown
from trainer.analysis.trained import TrainedModel, is_run, open_trained
from trainer.checkpoint.store import CheckpointError
from trainer.model.gpt2 import GPT2

PAPER_TASKS = "lambada_openai,wikitext,hellaswag,piqa,social_iqa,arc_easy,winogrande"


def evaluate_tasks(trained: TrainedModel, args: argparse.Namespace) -> TaskResults:
    """Run the tasks on a model that is whole; raises as :func:`trainer.analysis.harness.run_tasks`."""
    device = choose_device(args.device)
    model = trained.model.to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    scorer = Scorer(model, model.config.n_positions, device, args.batch_tokens)
    results = run_tasks(
        scorer,
        trained.tokenizer,
        partial(write_greedily, model, trained.tokenizer.eot_id),
        args.tasks.split(","),
        include_path=args.include_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
    )
    assert results is not None, "there is one process"
    return results


def write_greedily(model: GPT2, eot_id: int, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The most probable continuations, with cached keys and values."""
    sampling = Sampling(top_k=1)
    results = generate(model, prompts, sampling, max_new_tokens=new_tokens, stop_id=eot_id)
    return [result.ids for result in results]


def _main(args: argparse.Namespace) -> None:
    for name in ("batch_tokens", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if args.include_path is not None and not args.include_path.is_dir():
        raise FileNotFoundError(2, "no such folder of tasks", str(args.include_path))
    trained = open_trained(args.run, args.tokenizer)
    try:
        results = evaluate_tasks(trained, args)
    except ModuleNotFoundError as error:
        raise ValueError(INSTALL) from error
    print(f"weights: {trained.source}", file=sys.stderr)
    print(to_markdown(results), end="")
    if is_run(args.run):
        assert trained.step is not None
        print(f"written: {store_tasks(args.run, trained.step, results)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.analysis.lm_eval",
        description="Evaluate a trained model on tasks of the lm-evaluation-harness",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory or exported folder")
    parser.add_argument(
        "--tasks", default=PAPER_TASKS, metavar="A,B", help=f"tasks, the paper's by default ({PAPER_TASKS})"
    )
    parser.add_argument("--include_path", type=Path, metavar="DIR", help="folder with further tasks (YAML)")
    parser.add_argument("--limit", type=int, metavar="N", help="examples per task (all)")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="solved examples first (the task's)")
    parser.add_argument(
        "--batch_tokens", type=int, default=4096, metavar="N", help="positions per forward (4096)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json or its folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights (fp32)")
    return run_cli(_main, parser, argv, errors=(CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
