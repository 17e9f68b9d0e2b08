"""EleutherAI's lm-evaluation-harness on our models; the only importer of ``lm_eval``."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.tokenizer import Tokenizer
from trainer.analysis.scoring import Request, Scorer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.api.instance import Instance

INSTALL = "the lm-evaluation-harness is not installed: pip install 'cocomix[eval]'"

Write = Callable[[list[list[int]], int], list[list[int]]]
"""The most probable continuations of prompts (token ids), each at most so many tokens."""

MAX_NEW_TOKENS = 256
"""Of a generated answer whose task does not say."""

BOOTSTRAPS = 1000
"""Resamples behind a standard error that has no formula."""


@dataclass(frozen=True, slots=True)
class TaskResults:
    """What the harness measured."""

    metrics: dict[str, dict[str, float]]
    """By task and metric; a metric's standard error is called ``<metric>_stderr``."""
    num_examples: dict[str, int]
    """Examples by task."""
    versions: dict[str, str]
    """Versions of the tasks, and of the harness under ``lm_eval``."""


def run_tasks(
    scorer: Scorer,
    tokenizer: Tokenizer,
    write: Write,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    standard_errors: bool = True,
) -> TaskResults | None:
    """Evaluate on tasks of the harness.

    Ranks that share a sharded model call this together: each builds the same requests, and the scorer
    deals them out. Random generators are left as they were.

    Args:
        scorer: the model.
        tokenizer: of the model.
        write: generates answers for tasks that ask for text.
        tasks: names of tasks, groups and tags; ``*`` and ``?`` match.
        include_path: folder with further tasks (YAML; they may run code of their own: use what you trust).
        limit: examples per task; all if ``None``.
        num_fewshot: solved examples in each prompt; the task's own number if ``None``.
        standard_errors: estimate them too; the harness starts processes for some of them.

    Returns:
        ``None`` on ranks that are not the first of their node.

    Raises:
        ValueError: an unknown task, or one whose data cannot be had.
        ModuleNotFoundError: the harness is not installed.
    """
    import lm_eval

    with _quiet(), _generators_kept():
        found = lm_eval.simple_evaluate(
            _harness_model(scorer, tokenizer, write),
            tasks=_load(tasks, include_path),
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS if standard_errors else 0,
        )
    return None if found is None else _results(found, lm_eval.__version__)


def _load(tasks: Sequence[str], include_path: Path | None) -> list[Any]:
    """Tasks and groups by name, with their data."""
    from lm_eval.tasks import TaskManager

    manager: Any = None
    if include_path is not None:
        # The harness's own tasks are thousands of files: they are looked through where they are needed.
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    objects: list[Any] = []
    for name in _known(manager, tasks):
        try:
            loaded = manager.load([name])
        except (OSError, LookupError, ValueError, TypeError) as error:
            raise ValueError(f"the data of task {name} cannot be had: {_first_line(error)}") from error
        group = loaded["groups"].get(name)
        objects += loaded["tasks"].values() if group is None else [group]
    return objects


def _known(manager: Any, tasks: Sequence[str]) -> list[str]:
    names: list[str] = []
    for task in tasks:
        matches = manager.match_tasks([task])
        if not matches:
            raise ValueError(f"task={task} is unknown to the harness; --include_path adds a folder of tasks")
        names += [name for name in matches if name not in names]
    return names


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _results(found: dict[str, Any], version: str) -> TaskResults:
    metrics: dict[str, dict[str, float]] = {}
    for task, values in found["results"].items():
        named = {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and name != "sample_len"
        }
        metrics[task] = {name.replace(",", "_"): value for name, value in named.items()}
    versions = {task: str(number) for task, number in found["versions"].items()} | {"lm_eval": version}
    counts = {task: int(number["effective"]) for task, number in found["n-samples"].items()}
    return TaskResults({task: values for task, values in metrics.items() if values}, counts, versions)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness warns of much that is meant so, and prints where our results go."""
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        harness.setLevel(level)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """The harness seeds every global generator: a run that evaluates must train as one that does not."""
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


def _harness_model(scorer: Scorer, tokenizer: Tokenizer, write: Write) -> Any:
    """The model as the harness wants it; the class is made here because its base takes seconds to import."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(TemplateLM):
        """Scores and writes text; one process to the harness, however many ranks there are."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eot_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(
            self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            scores = scorer([Request(context, continuation) for _, context, continuation in requests])
            return [(score.log_likelihood, score.is_greedy) for score in scores]

        def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
            """Log-likelihood of whole texts in windows, with the end-of-text token before the first."""
            windows = [
                (number, Request(*make_disjoint_window(window)))
                for number, request in enumerate(requests)
                for window in get_rolling_token_windows(
                    token_list=tokenizer.encode(request.args[0]),
                    prefix_token=tokenizer.eot_id,
                    max_seq_len=scorer.max_context,
                    context_len=1,
                )
            ]
            totals = [0.0] * len(requests)
            for (number, _), score in zip(windows, scorer([item for _, item in windows]), strict=True):
                totals[number] += score.log_likelihood
            return totals

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
            """Most probable text after each context, up to the first stop string."""
            order = sorted(range(len(requests)), key=lambda index: _new_tokens(requests[index]))
            answers = [""] * len(requests)
            for new_tokens, group in groupby(order, key=lambda index: _new_tokens(requests[index])):
                indices = list(group)
                room = scorer.max_context - new_tokens + 1
                if room < 1:
                    raise ValueError(
                        f"answers of {new_tokens} tokens do not fit into {scorer.max_context} positions"
                    )
                prompts = [tokenizer.encode(requests[index].args[0])[-room:] for index in indices]
                written = write([ids or [tokenizer.eot_id] for ids in prompts], new_tokens)
                for index, ids in zip(indices, written, strict=True):
                    answers[index] = _up_to_stop(tokenizer.decode(ids), requests[index].args[1])
            return answers

    return HarnessModel()


def _new_tokens(request: Instance) -> int:
    options = request.args[1]
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise ValueError("tasks that sample their answers are not supported, only the most probable text")
    return int(options.get("max_gen_toks", MAX_NEW_TOKENS))


def _up_to_stop(text: str, options: dict[str, Any]) -> str:
    stops = options.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return text
