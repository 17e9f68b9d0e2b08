"""What a run reports: sums on the device, records one step late, TensorBoard, logs.

How a number travels:

1. Every microbatch adds detached sums to the named slots of one fp64 vector (`StepMetrics.add`).
2. On a step that is logged, one all-reduce sums the vector over the data-parallel ranks and ratios of
   slots become the step's means (`StepMetrics.reduce`), still on the device.
3. `MetricsLogger.submit` starts their copy to pinned memory and writes the record that was submitted
   BEFORE, whose copy has long arrived. The step never waits for the device.

``metrics.jsonl`` holds one JSON object per logged step, written whole. Floats are written by ``repr``,
so equal text means bitwise equal values; NaN and infinities, which JSON lacks, become ``null``. Keys:

``step``, ``tokens``    optimizer steps and tokens since the start of training
``loss_ntp``            mean next-token cross entropy over the global batch, nats
``loss_concept``        mean concept cross entropy over the global batch, nats (with ``objective.regression``
                        the mean distance to the teacher's state), without lambda; these first
                        four keys stand in every record, ``null`` where an objective has no such loss
``loss_kd``             mean divergence from the teacher's distribution, nats, without its weight
``loss_total``          what was minimised, nats
``concept_weight``      lambda, the weight of ``loss_concept`` in ``loss_total``
``concept_*``           recall at A and mean rank of the targets, shares of the dictionary in use
``lr``, ``grad_norm``   learning rate; global gradient norm before clipping
``tokens_per_s``        training throughput of all ranks since the record before
``mfu``                 its FLOPs over the peak of all devices, ``null`` where the peak is unknown
``seconds``, ``flops``  training time and model FLOPs since the start of training, over all its processes;
                        validation, checkpoints and time between processes do not count, nor does work that
                        was lost with a process that died
``memory_peak_bytes``   largest allocated device memory of rank 0, on CPU its largest resident set
``val_*``               validation of the model after this step; with ``data.sources`` the mean of the sources
                        by their rows, and ``val_*/NAME`` that of each source
``tokens/NAME``         tokens of a source since the start of training, ``epochs/NAME`` the same in passes
                        over its windows; with ``data.sources`` only
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import LogConfig
from trainer.metrics.device import memory_peak_bytes
from trainer.metrics.json_lines import JsonLines
from trainer.metrics.lagged import LaggedValues
from trainer.metrics.sums import DENSITY_LIMITS
from trainer.metrics.tensorboard import TensorBoard

logger = logging.getLogger(__name__)


class TrainingClock:
    """Seconds of training over all processes of a run; starts stopped, at ``seconds``."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def start(self) -> None:
        """Count on."""
        assert self._started is None, "the clock runs already"
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop counting."""
        self._before, self._started = self.seconds, None


@dataclass(slots=True)
class _Pending:
    """A record that is not written yet; its device values may be on their way."""

    step: int
    host: dict[str, Any]
    names: tuple[str, ...] = ()
    values: LaggedValues = field(default_factory=lambda: LaggedValues(()))
    histograms: Mapping[str, LaggedValues] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    rewritten: bool = False

    def record(self) -> dict[str, Any]:
        """Wait for the device values and join all keys, ``step`` and ``tokens`` first."""
        values = self.values.read()
        axes = {"step": self.step, "tokens": self.host["tokens"], "loss_ntp": None, "loss_concept": None}
        return axes | dict(zip(self.names, values, strict=True)) | self.host | self.validation


_PROGRESS = (
    ("loss_ntp", "loss {:.4f}"),
    ("loss_concept", "concept {:.4f}"),
    ("sae_nmse", "nmse {:.4f}"),
    ("val_loss_ntp", "val {:.4f}"),
    ("tokens_per_s", "{:,.0f} tok/s"),
    ("mfu", "mfu {:.1%}"),
)


class MetricsLogger:
    """Writes a run's records on rank 0; on other ranks only the clock works.

    Call order: :meth:`load_state_dict` when resuming, then :meth:`start`; at a logged step :meth:`submit`,
    then :meth:`validation` where due, then :meth:`state_dict` for a checkpoint; last :meth:`close`.

    Args:
        run_dir: Run directory; gets ``metrics.jsonl``, ``events.jsonl`` and ``tb/``.
        config: The ``log:`` section.
        is_main: True on rank 0.
        resume_step: Step of the checkpoint that training continues from, 0 for a fresh start. Records of
            later steps, left by a process that died, are dropped.
        total_steps: Steps of the whole run.
        tokens_per_step: Tokens of one step over all ranks.
        flops_per_token: Model FLOPs of one token, ``FlopsPerToken.total``.
        peak_flops: FLOP/s that the devices of all ranks together reach at most; None when unknown.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        *,
        is_main: bool,
        resume_step: int,
        total_steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
    ) -> None:
        self._path, self._every, self._is_main = run_dir / "metrics.jsonl", config.every, is_main
        self._total_steps, self._tokens_per_step = total_steps, tokens_per_step
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._clock = TrainingClock()
        self._interval_start = (resume_step * tokens_per_step, 0.0)
        self._pending: _Pending | None = None
        self._tensorboard: TensorBoard | None = None
        if is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._records = self._open_records(resume_step)
            self._events = JsonLines(run_dir / "events.jsonl")
            if config.tensorboard:
                self._tensorboard = TensorBoard(run_dir / "tb", resume_step + 1)
                if resume_step == 0:
                    self._tensorboard.layout()

    def rewind(self, step: int) -> None:
        """Drop the records of later steps: training goes back to ``step`` in this process."""
        self._interval_start = (step * self._tokens_per_step, self._clock.seconds)
        if not self._is_main:
            return
        self.flush()
        self._records.close()
        self._records = self._open_records(step)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = TensorBoard(self._path.parent / "tb", step + 1)

    def _open_records(self, last_step: int) -> JsonLines:
        return JsonLines(self._path, lambda record: record.get("step", math.inf) <= last_step)

    def due(self, step: int) -> bool:
        """Return whether ``step`` (the first is 1) is logged: every ``log.every`` steps, and the last one."""
        return step % self._every == 0 or step == self._total_steps

    def start(self) -> None:
        """Count training time from here: everything is built and the next step begins."""
        self._clock.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep validation, checkpoints and samples out of the training time."""
        self._drain_device()  # work that is still queued belongs to training
        self._clock.stop()
        try:
            yield
        finally:
            self._drain_device()
            self._clock.start()

    @staticmethod
    def _drain_device() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def submit(
        self,
        step: int,
        tokens: int,
        device_values: Mapping[str, Tensor],
        host_values: Mapping[str, float | None],
        histograms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Hand over a step's values and write the record that was submitted before.

        Args:
            step: Optimizer steps done.
            tokens: Tokens since the start of training, over all ranks.
            device_values: 0-dim tensors of one device, reduced over the ranks: means, ``grad_norm``, shares.
            host_values: What the host knows, such as ``lr`` and ``data_wait_s``; None becomes ``null``.
            histograms: Counts of concepts by tag, for TensorBoard alone; see ``trainer.metrics.sums``.
        """
        if not self._is_main:
            return
        values = LaggedValues(list(device_values.values()))
        self._write_pending()
        host = {"tokens": tokens, **host_values, **self._throughput(tokens)}
        host["memory_peak_bytes"] = memory_peak_bytes(torch.device("cuda" if values.on_cuda else "cpu"))
        lagged = {tag: LaggedValues([counts]) for tag, counts in (histograms or {}).items()}
        self._pending = _Pending(step, host, tuple(device_values), values, lagged)

    def _throughput(self, tokens: int) -> dict[str, float | None]:
        # Read after the wait for the record before: a host that runs far ahead of its device is paced
        # by that wait, so that the time between two records is the device's.
        seconds = self._clock.seconds
        tokens_before, seconds_before = self._interval_start
        self._interval_start = (tokens, seconds)
        rate = (tokens - tokens_before) / max(seconds - seconds_before, 1e-9)
        return {
            "tokens_per_s": rate,
            "mfu": rate * self._flops_per_token / self._peak_flops if self._peak_flops else None,
            "seconds": seconds,
            "flops": float(tokens * self._flops_per_token),
        }

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Add ``val_<key>`` to the record of ``step``, also where it is written already or was not due."""
        if not self._is_main:
            return
        if self._pending is None or self._pending.step != step:
            self._write_pending()
            self._pending = self._reopen(step)
        self._pending.validation |= {f"val_{key}": value for key, value in values.items()}

    def _reopen(self, step: int) -> _Pending:
        last = self._records.last
        assert last is None or last["step"] <= step, "records are written in the order of steps"
        if last is None or last["step"] != step:
            tokens = step * self._tokens_per_step
            axes = {"seconds": self._clock.seconds, "flops": float(tokens * self._flops_per_token)}
            return _Pending(step, {"tokens": tokens, **axes})
        self._records.close()
        self._records = self._open_records(step - 1)
        return _Pending(step, last, rewritten=True)

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        record = pending.record()
        self._records.write(record)
        if self._tensorboard is not None:
            self._tensorboard.scalars(pending.step, pending.validation if pending.rewritten else record)
            for tag, counts in pending.histograms.items():
                self._tensorboard.histogram(tag, DENSITY_LIMITS, counts.read(), pending.step)
        logger.info(self._progress(record), extra={"progress": True})

    def _progress(self, record: Mapping[str, Any]) -> str:
        shown = [text.format(record[key]) for key, text in _PROGRESS if record.get(key) is not None]
        rate = record.get("tokens_per_s")
        if rate:
            left_s = (self._total_steps - record["step"]) * self._tokens_per_step / rate
            shown.append(f"eta {timedelta(seconds=round(left_s))}")
        return "  ".join([f"step {record['step']}/{self._total_steps}", *shown])

    def event(self, kind: str, **fields: Any) -> None:
        """Append to ``events.jsonl``: UTC time, kind (start, resume, save, preempt, fault, skip), fields."""
        if self._is_main:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._events.write({"time": now, "kind": kind, **fields})

    def config_text(self, text: str) -> None:
        """Show the resolved configuration in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.text("config", text, 0)

    def samples(self, step: int, continuations: Mapping[str, str]) -> None:
        """Show what the model wrote after each prompt in TensorBoard and in the log."""
        if not self._is_main:
            return
        for index, (prompt, continuation) in enumerate(continuations.items()):
            logger.info("sample at step %d: %r -> %r", step, prompt, continuation)
            if self._tensorboard is not None:
                self._tensorboard.text(f"samples/{index}", prompt + continuation, step)

    def hparams(self, config: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """Record the run for TensorBoard's comparison of runs: nested configuration and final values."""
        if self._tensorboard is not None:
            self._tensorboard.hparams(config, values, self._total_steps)

    def flush(self) -> None:
        """Write the record that is pending, and buffered events."""
        self._write_pending()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps; flushes first, so that a resumed run lacks no record."""
        self.flush()
        return {"seconds": self._clock.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the training time of the processes before; call before :meth:`start`."""
        self._clock = TrainingClock(state["seconds"])
        self._interval_start = (self._interval_start[0], state["seconds"])

    def close(self) -> None:
        """Write what is pending and close all files."""
        self.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._is_main:
            self._records.close()
            self._events.close()
