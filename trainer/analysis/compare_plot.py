"""Picture of validation curves: loss against tokens, FLOPs and seconds (needs the extra ``plot``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data.files import replace_file
from trainer.analysis.compare_seeds import Setting
from trainer.analysis.curves import AXES, Axis, common_budget

_LABELS = MappingProxyType(
    {
        "tokens": ("training tokens", ""),
        "flops": ("training compute", "FLOP"),
        "seconds": ("training time", "s"),
    }
)
"""Label and unit of each axis; matplotlib puts the SI prefix before the unit."""


def check_plot_installed() -> None:
    """Raise ``ValueError`` that names the extra when matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("curves.png needs matplotlib: pip install 'cocomix[plot]'")


def write_plot(path: Path, settings: Sequence[Setting]) -> None:
    """Write the curves as a PNG with one panel per axis; the first setting is the baseline.

    Seeds of one setting have one colour. The dotted vertical line is the largest budget that all runs
    reached, the horizontal one the final loss of the baseline's first run.
    """
    # Without pyplot no window system is asked for, and no figure outlives this call.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, axis in zip(panels, AXES, strict=True):
        _draw(panel, axis, settings)
    panels[0].set_ylabel("validation loss (nats per token)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), frameon=False)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def _draw(panel: Any, axis: Axis, settings: Sequence[Setting]) -> None:
    from matplotlib.ticker import EngFormatter

    for number, setting in enumerate(settings):
        for run in setting.runs:
            losses = [point.loss for point in run.curve.points]
            label = setting.name if run is setting.runs[0] else None
            style = {"color": f"C{number % 10}", "marker": "o", "markersize": 3.5, "linewidth": 1.6}
            panel.plot(run.curve.spent(axis), losses, label=label, **style)
    curves = [run.curve for setting in settings for run in setting.runs]
    grey = {"color": "0.45", "linestyle": ":", "linewidth": 1.1}
    panel.axvline(common_budget(curves, axis), label="largest common budget", **grey)
    panel.axhline(curves[0].final.loss, label=f"final loss of {curves[0].name}", **grey | {"linestyle": "--"})
    label, unit = _LABELS[axis]
    panel.set_xlabel(f"{label} ({unit})" if unit else label)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_formatter(EngFormatter(sep=" " if unit else ""))
    panel.grid(alpha=0.25)
    panel.set_title(f"at equal {'FLOPs' if axis == 'flops' else axis}", fontsize=11)
