"""Every command on runs of other layouts, and every command on what it cannot read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from data.prepare import PrepareOptions, prepare
from tests.trainer.analysis.test_generate import train_on_ranks, write_run
from tests.trainer.tiny_run import NUM_LATENTS, tiny_config
from trainer.analysis import compare, evaluate, export, generate, inspect, lm_eval
from trainer.analysis.evaluate import validation_path
from trainer.config_io import dump_config
from trainer.model.formats import load_model

Main = Callable[[Sequence[str]], int]

TASK = """
task: tiny_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc}}
"""


@pytest.fixture(scope="module", autouse=True)
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a task whose data are beside it; no request leaves this machine."""
    folder = tmp_path_factory.mktemp("task")
    data = folder / "examples.jsonl"
    data.write_text(json.dumps({"q": "the cat sat on a", "right": " mat"}) + "\n")
    (folder / "tiny_word.yaml").write_text(TASK.format(data=data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        if lm_eval_is_installed():
            patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield folder


def lm_eval_is_installed() -> bool:
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def commands(run: Path, other: Path, out: Path, task: Path) -> dict[str, tuple[Main, list[str]]]:
    """Every analysis command on ``run``, with arguments that a good run takes."""
    found: dict[str, tuple[Main, list[str]]] = {
        "evaluate": (evaluate.main, [str(run)]),
        "compare": (compare.main, [str(run), str(other)]),
        "generate": (generate.main, [str(run), "--prompt=the", "--max_new_tokens=3"]),
        "steer": (generate.main, [str(run), "--prompt=the", "--max_new_tokens=3", "--steer=4=-5:5:5"]),
        "steer the teacher": (
            generate.main,
            [str(run), "--prompt=the", "--max_new_tokens=3", "--steer=4=2", "--teacher"],
        ),
        "inspect": (inspect.main, [str(run), "--steer_concepts=1", "--max_concepts=5"]),
        "export": (export.main, [str(run), str(out)]),
        "export for the authors": (export.main, [str(run), str(out), "--format=authors"]),
    }
    if lm_eval_is_installed():
        found["lm_eval"] = (lm_eval.main, [str(run), "--tasks=tiny_word", f"--include_path={task}"])
    return found


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"parallel__tp": 2},
    "zero": {"parallel__engine": "deepspeed", "parallel__zero_stage": 3},
}


@pytest.mark.dist
@pytest.mark.usefixtures("deepspeed_before_forks")
def test_every_command_reads_every_layout(
    tiny_world: Path, tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches weights that only the layout which trained them can read, published or in a checkpoint.

    Both layouts compute the same run, so what the commands say of them must be the same.
    """
    for name, changes in LAYOUTS.items():
        config = tiny_config(
            tiny_world, tmp_path / name, train__steps=4, validation__every_steps=2, **changes
        )
        train_on_ranks(config, 2)
        stopped = shutil.copytree(tmp_path / name, tmp_path / f"{name}_stopped")
        shutil.rmtree(stopped / "model")
    baseline = shutil.copytree(tmp_path / "tp", tmp_path / "baseline")
    losses, texts, exported = [], [], []
    for name in ("tp", "tp_stopped", "zero", "zero_stopped"):
        run = tmp_path / name
        for command, (main, argv) in commands(run, baseline, tmp_path / f"{name}_out", task).items():
            assert main(argv) == 0, (name, command, capsys.readouterr().err)
            out, err = capsys.readouterr()
            if command in ("generate", "steer"):
                texts.append((command, out))
                assert ("checkpoint of step 4 of 4" in err) == name.endswith("stopped")
            if command.startswith("export"):
                exported.append(load_model(argv[1]).state_dict())
                shutil.rmtree(argv[1])
        report = json.loads(validation_path(run, 4).read_text())
        losses.append(report["sources"]["data"]["loss"])
        assert (run / "inspect" / "index.html").stat().st_size > 10_000
    assert len(set(texts)) == 2
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    for state in exported[1:]:
        for key, tensor in exported[0].items():
            torch.testing.assert_close(state[key], tensor, atol=1e-5, rtol=0)


# What they refuse


@pytest.fixture(scope="module")
def broken(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good run, and runs that cannot be read."""
    root = tmp_path_factory.mktemp("broken")
    train_on_ranks(tiny_config(tiny_world, root / "good", train__steps=4), 1)
    shutil.copytree(root / "good", root / "other")
    write_run(tiny_world, root / "sae", "sae")
    (root / "empty").mkdir()
    # A run in its first steps: its first checkpoint has no name yet, its first record no end.
    begun = shutil.copytree(root / "good", root / "begun", ignore=shutil.ignore_patterns("model"))
    steps = sorted((begun / "checkpoints").glob("step_*"))
    steps[0].rename(begun / "checkpoints" / ".tmp-step_00000004")
    for path in steps[1:]:
        shutil.rmtree(path)
    (begun / "metrics.jsonl").write_text('{"step": 1, "tokens": 96, "loss_nt')
    # Weights that are still being copied.
    torn = shutil.copytree(root / "good", root / "torn") / "model" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    # A run whose configuration names another vocabulary than its checkpoints have.
    renamed = shutil.copytree(root / "good", root / "renamed", ignore=shutil.ignore_patterns("model"))
    config = tiny_config(tiny_world, root / "good", train__steps=4, model__vocab_size=700)
    (renamed / "config.yaml").write_text(dump_config(config))
    # A run whose data folder was prepared anew with another tokenizer of as many tokens.
    (root / "text").mkdir()
    for number in range(30):
        (root / "text" / f"{number}.txt").write_text(f"other words {number} of another kind " * 9)
    prepare(
        PrepareOptions(
            input=root / "text", out=root / "alien_data", vocab_size=290, val_fraction=0.2, chunk_tokens=64
        )
    )
    for name in ("alien", "alien_stopped"):
        alien = shutil.copytree(root / "good", root / name)
        text = (alien / "config.yaml").read_text()
        (alien / "config.yaml").write_text(text.replace(str(tiny_world / "data"), str(root / "alien_data")))
    shutil.rmtree(root / "alien_stopped" / "model")
    return root


UNREADABLE = {
    "missing": "missing: no such run directory or model folder",
    "empty": "no model.safetensors or pytorch_model.bin in the folder",
    "sae": "objective.name=sae trains no language model",
    "begun": "begun: has no weights yet, neither model/ nor a checkpoint",
    "torn": "not a readable weights file",
    "renamed": "wte.weight",
    "alien": "was trained on tokens of tokenizer",
    "alien_stopped": "was trained on tokens of tokenizer",
}
INCOMPARABLE = {
    "missing": "missing/config.yaml: no such file, so this is no run directory",
    "empty": "empty/config.yaml: no such file, so this is no run directory",
    "sae": "objective.name=sae trains no language model",
    "begun": "begun/metrics.jsonl: no validation points",
    "alien": "was validated on other data",
    "alien_stopped": "was validated on other data",
}
"""The others have records that can be compared without their weights."""


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_one_line(
    name: str, broken: Path, tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, an answer about other weights, and results that are half there."""
    before = {path for path in broken.rglob("*") if path.is_file()}
    for command, (main, argv) in commands(broken / name, broken / "other", tmp_path / "out", task).items():
        messages = INCOMPARABLE if command == "compare" else UNREADABLE
        if name not in messages:
            continue
        assert main(argv) == 2, command
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (command, err)
        assert messages[name] in err, (command, err)
    assert not (tmp_path / "out").exists()
    assert {path for path in broken.rglob("*") if path.is_file()} == before


OUT_OF_RANGE = f"must be from 0 to {NUM_LATENTS - 1}"
REFUSED: list[tuple[str, list[str], str]] = [
    ("evaluate", ["--share=0"], "share=0.0"),
    ("evaluate", ["--data=nowhere"], "nowhere"),
    ("compare", ["--seeds"], "--seeds needs at least two settings"),
    ("generate", ["--max_new_tokens=99"], "max_new_tokens=99 must be at most"),
    ("generate", [f"--steer={NUM_LATENTS}=1"], OUT_OF_RANGE),
    ("generate", ["--steer=-1=1"], "--steer -1: concept id must be"),
    ("steer the teacher", [f"--steer={NUM_LATENTS}=1"], OUT_OF_RANGE),
    ("inspect", [f"--concepts={NUM_LATENTS}"], OUT_OF_RANGE),
    ("inspect", ["--share=2"], "share=2.0"),
    ("export", ["--tokenizer=nowhere"], "nowhere: no tokenizer.json"),
    ("lm_eval", ["--tasks=no_such_task"], "task=no_such_task is unknown"),
    ("lm_eval", ["--include_path=nowhere"], "nowhere: no such folder of tasks"),
]


@pytest.mark.parametrize(("command", "more", "message"), REFUSED)
def test_what_cannot_be_done_is_one_line(
    command: str,
    more: list[str],
    message: str,
    broken: Path,
    tmp_path: Path,
    task: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, and an option that is quietly something else."""
    known = commands(broken / "good", broken / "other", tmp_path / "out", task)
    if command not in known:
        pytest.skip("lm_eval is not installed")
    main, argv = known[command]
    assert main([*argv, *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1 and message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
