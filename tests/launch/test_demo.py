"""The demo: its plan, its stages end to end, and stopping it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.demo import DEFAULT_OUT, main, plan
from launch.processes import descendants, is_alive
from launch.stages import Stage, StageError, is_finished
from trainer.config import RunConfig
from trainer.config_io import dump_config
from trainer.metrics.json_lines import read_json_lines

ROOT = Path(__file__).parents[2]
TINY = (
    "--train.steps=6",
    "--validation.every_steps=3",
    "--validation.share=0.02",
    "--checkpoint.every_steps=0",
    "--log.every=1",
    "--log.tensorboard=false",
    "--log.peak_tflops=1",
    "--log.sample_tokens=4",
)
NAMES = [
    *("data", "teacher", "sae", "cocomix", "ntp", "comparison"),
    *("evaluation of cocomix", "evaluation of ntp", "concepts"),
]


def stages_by_name(out: Path, *extra: str) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan(out, 2, extra)}


def config_of(stage: Stage) -> RunConfig:
    assert stage.config is not None
    return stage.config


def test_default_commands_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a demo that shows commands which nobody would type, and configs whose paths have moved."""
    monkeypatch.chdir(ROOT)
    stages = stages_by_name(DEFAULT_OUT)
    assert list(stages) == NAMES
    assert " ".join(stages["teacher"].command) == "-m trainer.main --config configs/demo_teacher.yaml"
    assert " ".join(stages["cocomix"].command) == (
        "-m torch.distributed.run --standalone --nproc_per_node=2 -m trainer.main --config configs/demo.yaml"
    )


def test_all_paths_follow_out(tmp_path: Path) -> None:
    """Catches a stage that reads or writes the default folder although another one was given."""
    stages = stages_by_name(tmp_path / "x", "--data.dir=elsewhere")
    for stage in stages.values():
        assert stage.product.is_relative_to(tmp_path / "x")
        assert not any(str(DEFAULT_OUT) in argument for argument in stage.command)
        if stage.config is not None:
            assert str(DEFAULT_OUT) not in dump_config(stage.config)
            assert stage.config.data.dir == str(tmp_path / "x" / "data")


def test_students_see_the_same_tokens(tmp_path: Path) -> None:
    """Catches a comparison of students that differ in data, length or optimizer."""
    stages = stages_by_name(tmp_path)
    cocomix, ntp = config_of(stages["cocomix"]), config_of(stages["ntp"])
    for section in ("data", "train", "optim", "validation"):
        assert getattr(cocomix, section) == getattr(ntp, section), section
    assert cocomix.train.steps // cocomix.validation.every_steps >= 10


def finish(stage: Stage, age_s: float = 0.0) -> None:
    """Make a stage look finished, ``age_s`` seconds ago."""
    stage.product.parent.mkdir(parents=True, exist_ok=True)
    stage.product.write_text("")
    when = time.time() - age_s
    os.utime(stage.product, (when, when))
    if stage.config is not None:
        (Path(stage.config.run.dir) / "config.yaml").write_text(dump_config(stage.config))


def test_a_finished_stage_is_skipped_unless_it_is_another_one(tmp_path: Path) -> None:
    """Catches an edited configuration, or a teacher trained anew, behind which old results stand."""
    stages = stages_by_name(tmp_path)
    assert not any(is_finished(stage) for stage in stages.values())
    for age, stage in enumerate(reversed(stages.values())):
        finish(stage, 10.0 * age)
    assert all(is_finished(stage) for stage in stages.values())
    for change in ("--train.steps=7", "--optim.lr=0.5"):
        with pytest.raises(StageError, match=f"is finished with {change[2:].split('=')[0]}="):
            is_finished(stages_by_name(tmp_path, change)["teacher"])
    assert is_finished(stages_by_name(tmp_path, "--log.every=3")["teacher"])
    finish(stages["teacher"])
    with pytest.raises(StageError, match=r"sae: was made before .*teacher"):
        is_finished(stages["sae"])
    assert is_finished(stages["ntp"])


def test_old_results_are_made_again(tmp_path: Path) -> None:
    """Catches tables and pages of runs that have been replaced."""
    stages = stages_by_name(tmp_path)
    for age, stage in enumerate(reversed(stages.values())):
        finish(stage, 10.0 * age)
    finish(stages["ntp"])
    assert not is_finished(stages["comparison"])
    assert not is_finished(stages["evaluation of ntp"])
    assert is_finished(stages["evaluation of cocomix"])
    assert is_finished(stages["concepts"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--processes", "0"], "--processes 0"),
        (["--train.step=3"], "train.steps"),
        (["--train.batch_size=x"], "train.batch_size"),
    ],
)
def test_refuses_bad_arguments(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an error that shows up in the third stage instead of before the first."""
    assert main(["--out", str(tmp_path / "x"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


# Where the runner is used alone, in a process of its own because it adopts and kills what is below it.
RUNNER = """
import os, sys
from launch.stages import Runner
with Runner() as runner:
    code = runner.run(["-c", sys.argv[1]], dict(os.environ), quiet=False)
print("returned", code, runner.stopped, flush=True)
"""


def start_runner(stage: str) -> tuple[subprocess.Popen[str], int]:
    """Run Python text as a stage; returns the runner and the number that the stage printed first."""
    command = [sys.executable, "-c", RUNNER, stage]
    runner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    return runner, int(runner.stdout.readline())


def is_gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_a_stage_leaves_nothing_behind() -> None:
    """Catches a helper process in a session of its own that outlives its stage."""
    stage = (
        "import subprocess, sys\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)"
    )
    runner, left = start_runner(stage)
    output, _ = runner.communicate(timeout=30)
    assert output == "returned 0 False\n"
    assert is_gone(left, timeout_s=0.0)


def test_a_stage_is_told_once_and_may_save() -> None:
    """Catches a second Ctrl-C that reaches a stage while it saves."""
    stage = (
        "import os, signal, time\n"
        "told = []\n"
        "signal.signal(signal.SIGINT, lambda *_: told.append(1))\n"
        "print(os.getpid(), flush=True)\n"
        "while not told: time.sleep(0.01)\n"
        "time.sleep(1)\n"
        "raise SystemExit(40 + len(told))"
    )
    runner, _ = start_runner(stage)
    for _ in range(3):
        runner.send_signal(signal.SIGINT)
        time.sleep(0.2)
    output, _ = runner.communicate(timeout=30)
    assert output == "returned 41 True\n"


def test_a_stage_ends_with_a_demo_that_is_killed() -> None:
    """Catches a training that goes on in the dark, and meets the next demo in its run directory."""
    runner, stage = start_runner("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    runner.kill()
    runner.communicate(timeout=30)
    assert is_gone(stage)


class Demo:
    """A demo in a process of its own, told to finish, or to stop once a condition holds."""

    def __init__(self, out: Path, log: Path) -> None:
        command = [sys.executable, "-m", "launch.demo", "--out", str(out), *TINY]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def stop_when(self, ready: Callable[[], bool], number: signal.Signals, timeout_s: float = 120.0) -> None:
        """Send a signal as soon as ``ready`` and see that the demo and everything below it ends."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)
        below = descendants(self.process.pid)
        assert below, self.output
        self.process.send_signal(number)
        assert self.process.wait(60) == 130, self.output
        assert not [pid for pid in below if Path(f"/proc/{pid}").exists()], self.output

    def finish(self, timeout_s: float = 200.0) -> str:
        assert self.process.wait(timeout_s) == 0, self.output
        return self.output


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Demo]]:
    """Starts the demo below ``tmp_path / "demo"``; whatever still runs at the end is killed."""
    demos: list[Demo] = []

    def start_demo() -> Demo:
        demos.append(Demo(tmp_path / "demo", tmp_path / f"log_{len(demos)}"))
        return demos[-1]

    yield start_demo
    for demo in demos:
        for pid in [*descendants(demo.process.pid), demo.process.pid]:
            if demo.process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        demo.process.wait()


def events(run_dir: Path) -> list[dict[str, Any]]:
    return read_json_lines(run_dir / "events.jsonl")


def has_records(run_dir: Path) -> Callable[[], bool]:
    return lambda: bool(read_json_lines(run_dir / "metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
def test_stops_cleanly_and_goes_on_to_the_end(tmp_path: Path, start: Callable[[], Demo]) -> None:
    """Catches orphans, a stage that loses its steps or is repeated, and a summary without its parts."""
    out = tmp_path / "demo"
    start().stop_when(has_records(out / "teacher"), signal.SIGINT)
    assert [event["kind"] for event in events(out / "teacher")][-1] == "preempt"
    second = start()
    second.stop_when(has_records(out / "cocomix"), signal.SIGTERM)
    assert "[1/9] data: finished before" in second.output
    assert "resume" in [event["kind"] for event in events(out / "teacher")]
    assert [event["kind"] for event in events(out / "cocomix")][-1] == "preempt"
    third = start().finish()
    assert third.count("finished before") == 3
    assert "resume" in [event["kind"] for event in events(out / "cocomix")]
    for text in (
        "lowest loss",
        "teacher: validation loss",
        "normalised MSE",
        "ntp on validation windows:",
        "recall@A",
        "text sampled from ntp",
        "steered in one concept",
        "=-10 | ",
        "total",
        str(out / "cocomix" / "inspect" / "index.html"),
    ):
        assert text in third
    assert "Concepts of cocomix" in (out / "cocomix" / "inspect" / "index.html").read_text()
    assert (out / "comparison" / "curves.png").stat().st_size > 10_000
    numbers = json.loads((out / "comparison" / "comparison.json").read_text())
    assert numbers["at_equal"]["tokens"]["budget"] == 6 * 8 * 256
    fourth = start().finish()
    assert fourth.count("finished before") == len(NAMES)
    assert "tensorboard --logdir" in fourth
