"""A run's curves, texts and hyper-parameters in TensorBoard."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

logger = logging.getLogger(__name__)

_AXES = ("step", "tokens", "seconds", "flops")
_TAGS = MappingProxyType(
    {
        "lr": "optim/lr",
        "grad_norm": "optim/grad_norm",
        "tokens_per_s": "throughput/tokens_per_s",
        "mfu": "throughput/mfu",
        "data_wait_s": "throughput/data_wait_s",
    }
)
_GROUPS = (
    ("loss_", "loss/"),
    ("concept_", "concepts/"),
    ("sae_", "sae/"),
    ("memory_", "memory/"),
    ("val_", "validation/"),
    ("tokens/", "sources/tokens/"),
    ("epochs/", "sources/epochs/"),
)

_LAYOUT: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "Loss": {
            "next token": (r"loss/ntp$", r"validation/loss_ntp$"),
            "concepts": (r"loss/concept$", r"validation/loss_concept$"),
            "perplexity": (r"^perplexity$", r"validation/perplexity$"),
            "validation by source": (r"validation/loss_ntp/",),
        },
        "Concepts": {
            "recall": (r"concepts/recall_at_A$", r"validation/concept_recall_at_A$"),
            "share of the dictionary": (r"concepts/share_targeted$", r"concepts/share_used$"),
            "mean rank": (r"concepts/mean_rank$",),
        },
        "Throughput": {
            "tokens per second": (r"throughput/tokens_per_s$",),
            "model FLOPs utilisation": (r"throughput/mfu$",),
            "seconds waiting for data": (r"throughput/data_wait_s$",),
        },
        "Memory": {"peak bytes": (r"memory/peak_bytes$",)},
        "Health": {"gradient norm": (r"optim/grad_norm$",), "learning rate": (r"optim/lr$",)},
    }
)
"""Charts by heading: regular expressions of the tags that share one."""


def _tag(key: str) -> str:
    """TensorBoard tag of a record's key."""
    for prefix, group in _GROUPS:
        if key.startswith(prefix):
            return group + key.removeprefix(prefix)
    return _TAGS.get(key, f"other/{key}")


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # a float overflows above exp(709)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested sections as dotted keys, with values that TensorBoard's hparams accept."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


class TensorBoard:
    """The curves, texts and hyper-parameters of a run, in one event file per process.

    Args:
        log_dir: ``tb/`` of the run directory.
        purge_step: From this step on, points that a process which died has written are hidden;
            ``None`` hides nothing.
    """

    def __init__(self, log_dir: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self._writer: Any = SummaryWriter(log_dir=str(log_dir), purge_step=purge_step)

    def _write(self, work: Callable[[Any], object]) -> None:
        """Do something with the writer; an error (a full disk) ends the curves and not the run."""
        if self._writer is None:
            return
        try:
            work(self._writer)
        except OSError as error:
            self._writer = None
            logger.error("TensorBoard is off from here on: %s", error)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a point per numeric key, and perplexities beside the next-token losses."""
        points = {
            _tag(key): value
            for key, value in values.items()
            if key not in _AXES and isinstance(value, int | float)
        }
        for key, tag in (("loss_ntp", "perplexity"), ("val_loss_ntp", "validation/perplexity")):
            if isinstance(values.get(key), float):
                points[tag] = _perplexity(values[key])
        self.tagged(step, points)

    def tagged(self, step: int, points: Mapping[str, float]) -> None:
        """Add a point per tag."""
        self._write(lambda writer: [writer.add_scalar(tag, value, step) for tag, value in points.items()])

    def histogram(self, tag: str, limits: Sequence[float], counts: Sequence[float], step: int) -> None:
        """Add how many values lie between each limit and the one before it; the first bin is as wide."""
        middles = [limit - (limits[1] - limits[0]) / 2 for limit in limits]
        moments = [sum(c * m**power for c, m in zip(counts, middles, strict=True)) for power in (0, 1, 2)]
        edges = (2 * middles[0] - limits[0], limits[-1])
        self._write(
            lambda writer: writer.add_histogram_raw(
                tag, *edges, *moments, [edges[0], *limits], [0, *counts], step
            )
        )

    def markdown(self, tag: str, text: str, step: int) -> None:
        """Add a text that TensorBoard renders: a table of numbers and known names."""
        self._write(lambda writer: writer.add_text(tag, text, step))

    def text(self, tag: str, text: str, step: int) -> None:
        """Add a text as it stands; indented, because TensorBoard renders Markdown."""
        indented = "".join(f"    {line}\n" for line in text.splitlines())
        self._write(lambda writer: writer.add_text(tag, indented, step))

    def hparams(self, config: Mapping[str, Any], values: Mapping[str, float], step: int) -> None:
        """Add hyper-parameters and final values; ``add_hparams`` would open a second event file."""
        from torch.utils.tensorboard.summary import hparams

        metrics = {f"hparam/{name}": value for name, value in values.items()}

        def add(writer: Any) -> None:
            for summary in hparams(_flat(config), metrics):
                writer.file_writer.add_summary(summary)
            for tag, value in metrics.items():
                writer.add_scalar(tag, value, step)

        self._write(add)

    def layout(self) -> None:
        """Arrange the curves of a training run on the custom-scalars page."""
        charts = {
            heading: {title: ["Multiline", list(tags)] for title, tags in items.items()}
            for heading, items in _LAYOUT.items()
        }
        self._write(lambda writer: writer.add_custom_scalars(charts))

    def flush(self) -> None:
        """Write buffered events."""
        self._write(lambda writer: writer.flush())

    def close(self) -> None:
        """Write buffered events and close the file."""
        self._write(lambda writer: writer.close())
