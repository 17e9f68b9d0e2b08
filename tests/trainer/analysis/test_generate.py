"""The command line: from a run directory to text, and every way to be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from data.files import replace_text
from data.tokenizer import load_tokenizer
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.model.tiny import randomize
from tests.trainer.tiny_run import NUM_LATENTS, tiny_config
from trainer.analysis.generate import main
from trainer.analysis.sampling import Sampling, generate
from trainer.analysis.trained import open_trained
from trainer.config import RunConfig
from trainer.config_io import dump_config
from trainer.main import train
from trainer.model.formats import load_model, save_model
from trainer.model.student import build_student
from trainer.stop import StopRequest


def write_run(world: Path, run: Path, objective: str = "cocomix", **changes: Any) -> Path:
    """A run directory as training leaves it, with random weights."""
    config = tiny_config(world, run, objective, **changes)
    run.mkdir(parents=True)
    replace_text(run / "config.yaml", dump_config(config))
    if objective != "sae":
        assert config.model is not None
        model = build_student(config.model, config.insertion)
        randomize(model, seed=7)
        save_model(
            run / "model",
            model.state_dict(),
            config.model,
            config.concepts if objective == "cocomix" else None,
        )
    return run


@pytest.fixture(scope="module")
def runs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published runs ``cocomix`` and ``ntp``, an autoencoder's, and one that has only begun."""
    root = tmp_path_factory.mktemp("runs")
    for objective in ("cocomix", "ntp", "sae"):
        write_run(tiny_world, root / objective, objective)
    write_run(tiny_world, root / "begun")
    shutil.rmtree(root / "begun" / "model")
    return root


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert main([*argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_holds_what_generate_returns(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a flag that does not arrive, and samples that stand under another prompt."""
    flags = ["--max_new_tokens=9", "--num_samples=2", "--seed=3"]
    flags += ["--temperature=1.4", "--top_k=0", "--top_p=0.95"]
    prompts = ["the cat", "a dog"]
    argv = [str(runs / "cocomix"), *(f"--prompt={prompt}" for prompt in prompts), *flags]
    lines = run_json(capsys, *argv)
    trained = open_trained(runs / "cocomix")
    expected = generate(
        trained.model,
        [trained.tokenizer.encode(prompt) for prompt in prompts],
        Sampling(temperature=1.4, top_k=0, top_p=0.95, seed=3),
        max_new_tokens=9,
        num_samples=2,
        stop_id=trained.tokenizer.eot_id,
    )
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        (prompt, sample) for prompt in prompts for sample in (0, 1)
    ]
    assert [(line["tokens"], line["ended"]) for line in lines] == [tuple(result) for result in expected]
    assert [line["text"] for line in lines] == [trained.tokenizer.decode(line["tokens"]) for line in lines]
    assert run_json(capsys, *argv) == lines


def test_a_range_of_strengths_becomes_a_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches rows of the table that stand beside another strength, and text that breaks its lines."""
    argv = [str(runs / "cocomix"), "--prompt=the", "--prompt=a hill", "--max_new_tokens=6"]
    steer = ["--steer=4=-20:20:20", "--steer=5=2", "--steer_mode=set"]
    assert main([*argv, *steer]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 8 and table[0] == "prompt: the" and table[4] == "prompt: a hill"
    lines = run_json(capsys, *argv, *steer)
    for strength, line in zip((-20.0, 0.0, 20.0), lines[:3], strict=True):
        assert line["steer"] == {"4": strength, "5": 2.0} and line["steer_mode"] == "set"
        alone = run_json(capsys, *argv, f"--steer=4={strength}", "--steer=5=2", "--steer_mode=set")
        assert alone[0]["tokens"] == line["tokens"]
    assert [row.split(" | ")[0].split() for row in table[1:4]] == [
        [f"4={strength}", "5=2"] for strength in (-20, 0, 20)
    ]
    assert len({tuple(line["tokens"]) for line in lines[:3]}) == 3


def test_the_teacher_writes_steered_through_its_autoencoder(
    runs: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches --teacher that runs the student, or a strength that does not reach the teacher."""
    argv = [str(runs / "cocomix"), "--prompt=the cat", "--max_new_tokens=6", "--teacher"]
    (free,) = run_json(capsys, *argv)
    tokenizer = load_tokenizer(tiny_world / "data")
    (expected,) = generate(
        load_model(tiny_world / "teacher"),
        [tokenizer.encode("the cat")],
        Sampling(),
        max_new_tokens=6,
        stop_id=tokenizer.eot_id,
    )
    assert free["tokens"] == expected.ids
    lines = run_json(capsys, *argv, "--steer=3=-60:60:60", "--steer_mode=set")
    assert len({tuple(line["tokens"]) for line in lines}) == 3


def test_bf16_and_batches_are_accepted(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a dtype that one of the parts does not take."""
    argv = [str(runs / "cocomix"), "--prompt=the", "--max_new_tokens=4", "--precision=bf16"]
    assert len(run_json(capsys, *argv, "--steer=3=2", "--num_samples=3", "--batch_size=2")) == 3
    assert len(run_json(capsys, *argv, "--steer=3=2", "--teacher")) == 1


ERRORS = [
    (["missing"], "missing: no such run directory or model folder"),
    (["begun"], "begun: has no weights yet, neither model/ nor a checkpoint"),
    (["sae"], "sae: objective.name=sae trains no language model"),
    (["cocomix", "--prompt="], "--prompt must not be empty"),
    (["cocomix", "--temperature=0"], "temperature=0.0 must be above 0"),
    (["cocomix", "--top_p=2"], "top_p=2.0 must be above 0 and at most 1"),
    (["cocomix", "--max_new_tokens=0"], "--max_new_tokens 0 must be at least 1"),
    (["cocomix", "--max_new_tokens=99"], "max_new_tokens=99 must be at most"),
    (["cocomix", "--num_samples=0"], "--num_samples 0 must be at least 1"),
    (["cocomix", f"--steer={NUM_LATENTS}=1"], f"concept id must be from 0 to {NUM_LATENTS - 1}"),
    (["cocomix", f"--steer={NUM_LATENTS}=1", "--teacher"], "concept id must be from 0 to"),
    (["cocomix", "--steer=abc"], "--steer abc must be ID=VALUE"),
    (["ntp", "--steer=1=2"], "--steer needs a model with concepts"),
    (["ntp", "--teacher"], "--teacher needs the directory of a run with a concepts section"),
    (["cocomix/model"], "no tokenizer.json there: give --tokenizer"),
    (["cocomix", "--tokenizer=nowhere"], "nowhere: no tokenizer.json"),
]


@pytest.mark.parametrize(("argv", "message"), ERRORS)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, and a run that goes on with something else than was asked for."""
    assert main([str(runs / argv[0]), "--prompt=the", *argv[1:]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.dist
@pytest.mark.parametrize("changes", [{}, {"parallel__tp": 2}], ids=["fsdp", "tp"])
def test_a_run_is_read_from_its_newest_good_checkpoint(
    changes: dict[str, Any], tiny_world: Path, tmp_path: Path
) -> None:
    """Catches weights of a sharded checkpoint that come back in another order or from a damaged one."""
    config = tiny_config(tiny_world, tmp_path / "run", train__steps=8, **changes)
    train_on_ranks(config, 2)
    published = open_trained(tmp_path / "run")
    assert published.step == 8
    shutil.rmtree(tmp_path / "run" / "model")
    read = open_trained(tmp_path / "run")
    assert (read.step, read.source) == (8, "checkpoint of step 8 of 8")
    assert all(map(torch.equal, published.model.state_dict().values(), read.model.state_dict().values()))
    newest = tmp_path / "run" / "checkpoints" / "step_00000008"
    damaged = max(newest.glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = sorted(path.name for path in newest.parent.rglob("*"))
    assert open_trained(tmp_path / "run").step == 4
    assert sorted(path.name for path in newest.parent.rglob("*")) == before


@pytest.mark.dist
def test_a_run_that_goes_on_is_read_from_its_newer_checkpoint(tiny_world: Path, tmp_path: Path) -> None:
    """Catches weights of a run's first end that pass for those of its last step."""
    run = tmp_path / "run"
    train_on_ranks(tiny_config(tiny_world, run, "ntp", train__steps=4), 1)
    first = open_trained(run)
    assert (first.step, first.source) == (4, str(run / "model"))
    longer = tiny_config(tiny_world, run, "ntp", train__steps=8)
    (run / "config.yaml").write_text(dump_config(longer))
    begun = open_trained(run)  # no checkpoint of the second part yet
    assert (begun.step, begun.source) == (4, f"{run / 'model'} of step 4 of 8")
    old = shutil.copytree(run / "model", tmp_path / "old")
    train_on_ranks(longer, 1)
    last = open_trained(run)
    assert (last.step, last.source) == (8, str(run / "model"))
    shutil.rmtree(run / "model")
    shutil.copytree(old, run / "model")  # as it is before the second part is published
    going = open_trained(run)
    assert (going.step, going.source) == (8, "checkpoint of step 8 of 8, newer than model/ of step 4")
    states = [trained.model.state_dict() for trained in (going, last, first)]
    assert all(map(torch.equal, states[0].values(), states[1].values()))
    assert not all(map(torch.equal, states[0].values(), states[2].values()))


def train_on_ranks(config: RunConfig, num_ranks: int) -> None:
    def one_rank(world: World) -> str:
        with StopRequest() as stop:
            return train(config, world, stop)

    assert set(run_ranks(one_rank, num_ranks, timeout_s=120)) == {"finished"}
