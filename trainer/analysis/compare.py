"""``python -m trainer.analysis.compare RUN_A RUN_B ... [--out DIR]``: runs at equal cost, as measured.

RUN_A is the baseline. Losses are compared three ways, at equal tokens, equal model FLOPs and equal
seconds of training, because fewer tokens need not mean less compute. Runs that differ by their seeds
alone are also shown as one, with confidence intervals; ``--seeds`` shows nothing else. With ``--out`` the
folder gets ``comparison.md``, ``comparison.json``, ``curves.csv`` and ``curves.png``, and with seeds their
tables alone as ``seeds.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.cli import run_cli
from data.config import DataConfig
from data.files import replace_text
from data.manifest import MANIFEST_NAME, read_manifest
from trainer.analysis.compare_budgets import Comparison, Run, compare
from trainer.analysis.compare_plot import check_plot_installed, write_plot
from trainer.analysis.compare_report import seeds_markdown, to_csv, to_json, to_markdown
from trainer.analysis.compare_seeds import Setting, group_by_seed
from trainer.analysis.curves import read_curve
from trainer.config import RunConfig
from trainer.config_io import load_config
from trainer.flops import parameter_count
from trainer.metrics.json_lines import read_json_lines


class Validated(NamedTuple):
    """On what a run was validated; losses of runs that differ here must not be compared."""

    data: str
    """Fingerprint of tokenizer and validation shards, or the folder where there is no manifest any more."""
    seq_len: int
    share: float


def read_runs(folders: Sequence[Path]) -> list[Setting]:
    """Read run directories whose losses can be compared, seeds of one setting together.

    Raises:
        ValueError: a folder is no run of a language model, given twice, or validated on other data.
        DataError: a damaged manifest.
        OSError: a file is missing.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} run given, a comparison needs at least 2")
    names = _names(folders)
    configs = [load_config(RunConfig, _existing(folder / "config.yaml")) for folder in folders]
    _check_same_validation(names, [_validated(config) for config in configs])
    runs = [_read_run(*item) for item in zip(names, folders, configs, strict=True)]
    return group_by_seed(configs, runs)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts, or their paths where those are not unique."""
    doubled = [folder for folder, count in Counter(map(Path.resolve, folders)).items() if count > 1]
    if doubled:
        raise ValueError(f"{doubled[0]}: given more than once")
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(2, "no such file, so this is no run directory", str(path))
    return path


def _validated(config: RunConfig) -> Validated:
    data = "; ".join(_validation_data(part) for part in config.data.by_source.values())
    if config.data.sources:  # whose losses count by their weights
        data += f"; weights {', '.join(f'{source.weight:g}' for source in config.data.sources)}"
    return Validated(data, config.data.seq_len, config.validation.share)


def _validation_data(data: DataConfig) -> str:
    folder = Path(data.dir)
    if not (folder / MANIFEST_NAME).is_file():
        return data.dir if data.is_remote else str(folder.resolve())
    manifest = read_manifest(folder)
    shards = ",".join(shard.sha256 for shard in manifest.splits["val"].shards)
    return f"tokenizer {manifest.tokenizer.sha256}, shards {shards}"


def _check_same_validation(names: Sequence[str], validated: Sequence[Validated]) -> None:
    keys = {"data": "data.dir", "seq_len": "data.seq_len", "share": "validation.share"}
    for name, other in zip(names[1:], validated[1:], strict=True):
        for field, key in keys.items():
            ours, theirs = getattr(validated[0], field), getattr(other, field)
            if ours != theirs:
                raise ValueError(
                    f"{name} was validated on other data than {names[0]}: {key} {_short(theirs)}, "
                    f"not {_short(ours)}"
                )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_run(name: str, folder: Path, config: RunConfig) -> Run:
    if config.model is None:
        raise ValueError(f"{folder}: objective.name={config.objective.name} trains no language model")
    path = _existing(folder / "metrics.jsonl")
    curve = read_curve(name, read_json_lines(path), str(path))
    parameters = sum(parameter_count(config.model, config.insertion).values())
    return Run(curve, parameters, curve.final.flops / curve.final.tokens, config.train.steps)


def write_comparison(out: Path, comparison: Comparison, settings: Sequence[Setting]) -> None:
    """Write the four files, and ``seeds.md`` where there are seeds; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    curves = [run.curve for run in comparison.runs]
    write_plot(out / "curves.png", settings)
    replace_text(out / "curves.csv", to_csv(curves))
    replace_text(out / "comparison.json", json.dumps(to_json(comparison, settings), indent=2) + "\n")
    if any(len(setting.runs) > 1 for setting in settings):
        replace_text(out / "seeds.md", seeds_markdown(settings))
    replace_text(out / "comparison.md", to_markdown(comparison, settings))


def _check_seeds(settings: Sequence[Setting]) -> None:
    if len(settings) < 2 or all(len(setting.runs) == 1 for setting in settings):
        raise ValueError("--seeds needs at least two settings and several seeds of one of them")


def _main(args: argparse.Namespace) -> None:
    if args.out is not None:
        check_plot_installed()
    settings = read_runs(args.runs)
    if args.seeds:
        _check_seeds(settings)
    comparison = compare([run for setting in settings for run in setting.runs])
    print(seeds_markdown(settings) if args.seeds else to_markdown(comparison, settings), end="")
    if args.out is not None:
        write_comparison(args.out, comparison, settings)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.analysis.compare",
        description="Compare validation losses at equal tokens, equal FLOPs and equal seconds",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory; the first is A")
    parser.add_argument("--seeds", action="store_true", help="show settings over their seeds, no single runs")
    parser.add_argument("--out", type=Path, help="folder for comparison.md, .json, curves.csv and curves.png")
    return run_cli(_main, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
