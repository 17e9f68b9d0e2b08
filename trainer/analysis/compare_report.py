"""A comparison as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields
from types import MappingProxyType
from typing import Any

from trainer.analysis.compare_budgets import Comparison
from trainer.analysis.compare_seeds import Estimate, Setting, over_seeds
from trainer.analysis.curves import Cost, Curve, Point
from trainer.analysis.tables import markdown_table

CAVEATS = (
    "Losses are read at the largest budget that all runs reached, linearly between validations and "
    "never beyond them.",
    "A learning-rate schedule ends at its run's last step. Before it the rate is not fully decayed, so a "
    "run that is read before its end looks worse than one planned for that budget.",
    "FLOPs are the model's, with a teacher and an autoencoder that run on the fly but not what it took to "
    "train those two. Seconds are those of training steps on the machine that ran them, without validation "
    "and checkpoints.",
)
SINGLE_RUNS = "One run each: the spread over seeds is not known, so a small difference may be chance."
INTERVALS = (
    "Plus or minus is half of the 95% confidence interval over seeds: Student's t for means, Welch's for "
    "differences. A difference whose interval holds 0 may be chance."
)

_HEADS = MappingProxyType({"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"})


def to_markdown(comparison: Comparison, settings: Sequence[Setting] = ()) -> str:
    """Both tables, with several seeds of a setting those over seeds, and the caveats."""
    several = any(len(setting.runs) > 1 for setting in settings)
    unfinished = [
        f"{run.curve.name} is unfinished: validated up to step {run.curve.final.step} of {run.planned_steps}."
        for run in comparison.runs
        if run.curve.final.step < run.planned_steps
    ]
    parts = [
        "Validation loss in nats per token (perplexity) at equal budgets",
        markdown_table(_budget_rows(comparison)),
        f"Spent until the final loss of {comparison.names[0]} was reached, {comparison.target_loss:.4f} "
        f"(relative to {comparison.names[0]})",
        markdown_table(_cost_rows(comparison)),
    ]
    caveats = [*unfinished, *CAVEATS, INTERVALS if several else SINGLE_RUNS]
    if several:
        parts += _over_seeds(settings)
    parts.append("\n".join(f"- {line}" for line in caveats))
    return "\n\n".join(parts) + "\n"


def _budget_rows(comparison: Comparison) -> list[list[str]]:
    budgets = [f"at {quantity(item.budget)} {_HEADS[item.axis]}" for item in comparison.at_budget]
    rows = [["run", "parameters", "FLOPs per token", *budgets]]
    for index, run in enumerate(comparison.runs):
        losses = [_loss_text(item.losses[index]) for item in comparison.at_budget]
        sizes = [f"{run.parameters:,}", quantity(run.flops_per_token)]
        rows.append([run.curve.name, *sizes, *losses])
    best = [winner(comparison.names, item.losses) for item in comparison.at_budget]
    return [*rows, ["**lowest loss**", "", "", *best]]


def _cost_rows(comparison: Comparison) -> list[list[str]]:
    rows = [["run", *(_HEADS[item.axis] for item in comparison.to_loss)]]
    for index, name in enumerate(comparison.names):
        rows.append([name, *(_cost_text(item.costs[index], item.costs[0]) for item in comparison.to_loss)])
    best = [winner(comparison.names, [_value(cost) for cost in item.costs]) for item in comparison.to_loss]
    return [*rows, ["**least spent**", *best]]


def seeds_markdown(settings: Sequence[Setting]) -> str:
    """Settings over their seeds alone, with what a reader must know: for a log of experiments."""
    caveats = "\n".join(f"- {line}" for line in (*CAVEATS, INTERVALS))
    return "\n\n".join([*_over_seeds(settings), caveats]) + "\n"


def _over_seeds(settings: Sequence[Setting]) -> list[str]:
    """Losses, differences to the first setting, and what its loss costs: a heading and a table each."""
    seeds, baseline = over_seeds(settings), settings[0].name
    budgets = [f"at {quantity(item.budget)} {_HEADS[item.axis]}" for item in seeds]
    losses = [["setting", "seeds", *budgets, "parameters", "FLOPs per token"]]
    differences = [["setting", *(f"at equal {_HEADS[item.axis]}" for item in seeds)]]
    costs = [["setting", *(_HEADS[item.axis] for item in seeds)]]
    for index, setting in enumerate(settings):
        found = [_estimate_text(item.losses[index], "not validated so early") for item in seeds]
        run = setting.runs[0]
        sizes = [f"{run.parameters:,}", quantity(run.flops_per_token)]
        losses.append([setting.name, str(len(setting.runs)), *found, *sizes])
        if index:
            found = [_estimate_text(item.differences[index], "-", sign=True) for item in seeds]
            differences.append([setting.name, *found])
        found = [_estimate_text(item.costs[index], "not reached", digits=2, unit="x") for item in seeds]
        costs.append([setting.name, *found])
    return [
        "Validation loss over seeds, nats per token",
        markdown_table(losses),
        f"Difference to {baseline}; below 0 is better",
        markdown_table(differences),
        f"Spent until the final loss that every seed of {baseline} reached, relative to {baseline}",
        markdown_table(costs),
    ]


def _estimate_text(
    value: Estimate | None, missing: str, digits: int = 4, unit: str = "", *, sign: bool = False
) -> str:
    if value is None:
        return missing
    spread = "" if value.half_width is None else f" ± {value.half_width:.{digits}f}"
    return f"{value.mean:{'+' if sign else ''}.{digits}f}{spread}{unit}"


def winner(names: Sequence[str], values: Sequence[float | None]) -> str:
    """Name of the lowest value; all names where it is shared, a dash where there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return " = ".join(name for name, value in zip(names, values, strict=True) if value == min(known))


def quantity(value: float) -> str:
    """A number with four digits and an SI prefix: 1024000 is ``1.024M``."""
    for size, prefix in (
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= size:
            return f"{value / size:.4g}{prefix}"
    return f"{value:.4g}"


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # a float overflows above exp(709)


def _loss_text(loss: float | None) -> str:
    return "not validated so early" if loss is None else f"{loss:.4f} ({_perplexity(loss):.2f})"


def _value(cost: Cost | None) -> float | None:
    return None if cost is None else cost.value


def _cost_text(cost: Cost | None, baseline: Cost | None) -> str:
    if cost is None:
        return "not reached"
    bound = "at most " if cost.is_upper_bound else ""
    ratio = f" ({cost.value / baseline.value:.2f}x)" if baseline is not None and baseline.value else ""
    return f"{bound}{quantity(cost.value)}{ratio}"


def to_json(comparison: Comparison, settings: Sequence[Setting] = ()) -> dict[str, Any]:
    """Everything in the tables as numbers; None is ``null``."""
    names = comparison.names
    body: dict[str, Any] = {
        "baseline": names[0],
        "target_loss": comparison.target_loss,
        "runs": {
            run.curve.name: {
                "parameters": run.parameters,
                "flops_per_token": run.flops_per_token,
                "final_step": run.curve.final.step,
                "planned_steps": run.planned_steps,
                "final_loss": run.curve.final.loss,
            }
            for run in comparison.runs
        },
        "at_equal": {
            item.axis: {
                "budget": item.budget,
                "losses": dict(zip(names, item.losses, strict=True)),
                "winner": winner(names, item.losses),
            }
            for item in comparison.at_budget
        },
        "to_target_loss": {
            item.axis: {
                name: None if cost is None else cost._asdict()
                for name, cost in zip(names, item.costs, strict=True)
            }
            for item in comparison.to_loss
        },
        "caveats": list(CAVEATS),
    }
    if settings:
        body["settings"] = {setting.name: [run.curve.name for run in setting.runs] for setting in settings}
        body["over_seeds"] = [asdict(item) for item in over_seeds(settings)]
    return body


def to_csv(curves: Sequence[Curve]) -> str:
    """One line per run and validation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *(field.name for field in fields(Point))])
    for curve in curves:
        writer.writerows((curve.name, *astuple(point)) for point in curve.points)
    return text.getvalue()
