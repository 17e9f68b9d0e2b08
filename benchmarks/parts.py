"""CPU seconds of the parts of a training step, by clocks around the functions that make them up.

A part's time is its own: what a part inside it takes is taken off. Both heads of the student take their
gradients in their forward (``trainer.kernels.lm_head``), so that most of their backward counts as theirs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from statistics import median
from typing import Any
from unittest import mock

from benchmarks import reference_dense
from benchmarks.dense_step import DenseStep
from benchmarks.students import Student
from trainer.concepts import extractor as extraction
from trainer.model.cocomix import CoCoMix
from trainer.objective import CoCoMixLoss

TEACHER = "teacher"
AUTOENCODER = "autoencoder and attribution"
BLOCKS = "student, forward"
CONCEPT_HEAD = "concept head and mixing"
LM_HEAD = "LM head"
BACKWARD = "backward"
UPDATE = "optimizer"
REST = "the rest"
PARTS = (TEACHER, AUTOENCODER, BLOCKS, CONCEPT_HEAD, LM_HEAD, BACKWARD, UPDATE, REST)


def _nothing() -> defaultdict[str, float]:
    return defaultdict(float)


@dataclass(slots=True)
class PartClock:
    """Seconds by part since it was made."""

    seconds: defaultdict[str, float] = field(default_factory=_nothing)
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to a part."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def around(self, owner: object, attribute: str, name: str, within: str | None = None) -> Any:
        """A context in which calls of ``owner.attribute`` belong to a part.

        Args:
            owner: module, class or object.
            attribute: of a function or method.
            name: of the part.
            within: only inside this part.
        """
        function: Callable[..., Any] = getattr(owner, attribute)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if within is not None and within not in self._open:
                return function(*args, **kwargs)
            with self.part(name):
                return function(*args, **kwargs)

        return mock.patch.object(owner, attribute, timed)

    def _book(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def own_parts(student: Student, step: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median CPU seconds of the parts of the step that trains."""
    clock, model = PartClock(), student.engine.model
    owners: list[tuple[object, str, str]] = [
        (model, "forward", BLOCKS),
        (model, "head_loss", LM_HEAD),
        (student.engine, "backward", BACKWARD),
        (student.engine, "step", UPDATE),
    ]
    if isinstance(model, CoCoMix):
        owners.append((model.mixer, "forward", CONCEPT_HEAD))
    objective = student.objective
    if isinstance(objective, CoCoMixLoss) and objective.extractor is not None:
        owners += [
            (extraction, "residual_and_gradient", TEACHER),
            (objective.extractor.sae, "encode", AUTOENCODER),
            (extraction, "attribution", AUTOENCODER),
            (extraction, "select_targets", AUTOENCODER),
        ]
    return _measure(clock, [clock.around(*owner) for owner in owners], step, repeats)


def dense_parts(step: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median CPU seconds of the parts of the oracle's step."""
    clock = PartClock()
    contexts = [
        clock.around(reference_dense.DenseExtractor, "forward", TEACHER),
        clock.around(reference_dense.DenseExtractor, "backward", TEACHER),
        clock.around(reference_dense.DenseExtractor, "select", AUTOENCODER),
        clock.around(reference_dense, "cocomix_loss", BLOCKS),
        clock.around(reference_dense.DenseCoCoMix, "mix", CONCEPT_HEAD),
        clock.around(reference_dense, "concept_loss", CONCEPT_HEAD),
        clock.around(reference_dense.DenseGPT2, "logits", LM_HEAD, within=BLOCKS),
        clock.around(reference_dense, "next_token_loss", LM_HEAD, within=BLOCKS),
        clock.around(DenseStep, "backward", BACKWARD),
        clock.around(DenseStep, "update", UPDATE),
    ]
    return _measure(clock, contexts, step, repeats)


def _measure(
    clock: PartClock, contexts: Sequence[Any], step: Callable[[], object], repeats: int
) -> dict[str, float]:
    samples: list[defaultdict[str, float]] = []
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        for _ in range(repeats):
            clock.seconds = _nothing()
            with clock.part(REST):
                step()
            samples.append(clock.seconds)
    return {name: median(sample[name] for sample in samples) for name in PARTS if samples[0][name]}
