"""Real faults on a real SLURM: jobs end COMPLETED by themselves, with the losses of an undisturbed run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.records import RunFiles, read_heartbeats
from launch.slurm import Job
from tests.launch.minislurm import MiniSlurm, why_unavailable
from tests.launch.runs import (
    ROOT,
    SAVE_EVERY,
    RunMaker,
    events,
    processes_of,
    rank_pid,
    read_losses,
    wait_for,
    wait_for_events,
    wait_for_step,
)

pytestmark = [pytest.mark.slurm, pytest.mark.dist, pytest.mark.slow]

SCRIPT = ROOT / "launch" / "cocomix_1b.slurm"


class JobMaker:
    """Submits the repository's own script with a tiny configuration."""

    def __init__(self, cluster: MiniSlurm, runs: RunMaker, folder: Path) -> None:
        self.cluster, self.runs, self._folder = cluster, runs, folder

    def submit(self, name: str, *sbatch: str, arguments: tuple[str, ...] = ()) -> TinyJob:
        """Submit a job of two nodes with one rank each, unless ``sbatch`` says otherwise."""
        config = self.runs.write(self._folder / name)
        number = self.cluster.submit(
            ROOT,
            *("--nodes=2", "--mem=100", "--cpus-per-task=1", f"--output={config.parent}/job-%a.log"),
            *sbatch,
            str(SCRIPT),
            *(f"--config={config}", "--nproc_per_node=1", "--preflight=off", "--restart_delay_s=0"),
            *arguments,
        )
        return TinyJob(self.cluster, number, config)


class TinyJob:
    """A submitted job."""

    def __init__(self, cluster: MiniSlurm, number: str, config: Path) -> None:
        self.cluster, self.number, self.config = cluster, number, config
        self.run_dir = config.parent / "run"

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events(self.run_dir, kind)

    def wait_for_launch(self, count: int, step: int) -> None:
        """Wait until ranks were started for the ``count``-th time and have come to a step."""
        wait_for_events(self.run_dir, "launch", count)
        wait_for_step(self.run_dir, step)

    def complete(self) -> None:
        """Wait for the end, which must be a good one."""
        state = self.cluster.wait_for_state(self.number, "COMPLETED", "FAILED", "CANCELLED", timeout_s=150)
        assert state == "COMPLETED", self.log

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.config.parent.glob("job-*.log")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        # launch/env.sh activates this environment; a cluster's users say it the same way.
        patch.setenv("VENV", str(Path(sys.executable).parents[1]))
        with MiniSlurm(tmp_path_factory.mktemp("slurm") / "cluster", num_nodes=3) as started:
            yield started


@pytest.fixture
def jobs(cluster: MiniSlurm, runs: RunMaker, tmp_path: Path) -> Iterator[JobMaker]:
    yield JobMaker(cluster, runs, tmp_path)
    cluster.run("scancel", "--full", "--signal=KILL", "--user=root")
    cluster.run("scancel", "--user=root")
    cluster.wait(lambda: not cluster.run("squeue", "--noheader"), 30, "an empty queue")


def test_requeue_and_preemption(jobs: JobMaker, undisturbed: dict[int, float]) -> None:
    """Catches a job that a requeue or a preemption ends, and steps that are lost on the way."""
    job = jobs.submit("run")
    job.wait_for_launch(1, 30)
    jobs.cluster.run("scontrol", "requeue", job.number)
    jobs.cluster.start_requeued(job.number, 1)

    job.wait_for_launch(2, 60)
    everything = ("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null")
    urgent = jobs.cluster.submit(job.config.parent, *everything, "--wrap=true")
    jobs.cluster.wait_for_state(urgent, "COMPLETED")
    jobs.cluster.start_requeued(job.number, 2)

    job.complete()
    assert read_losses(job.run_dir) == undisturbed
    first, second, third = (event["checkpoint"] for event in job.events("launch"))
    assert first == 0
    assert second >= SAVE_EVERY  # SLURM gives a requeued job's step no time to save
    assert third >= 60
    assert job.events("failure") == []
    assert processes_of(job.config) == []


def test_time_limit(jobs: JobMaker, undisturbed: dict[int, float]) -> None:
    """Catches a job that its time limit ends: SIGUSR1 must save and requeue it."""
    # SLURM looks at time limits every 30 s: the signal comes 25 to 55 s after the start.
    job = jobs.submit("run", "--time=2", "--signal=B:USR1@65")
    job.wait_for_launch(1, 30)
    ranks = [rank_pid(job.config, rank) for rank in (0, 1)]
    # Held, because this little run would be finished before SLURM looks at its time limit.
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    wait_for_events(job.run_dir, "signal", 1)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    jobs.cluster.start_requeued(job.number, 1)
    job.complete()
    assert {event["name"] for event in job.events("signal")} == {"SIGUSR1"}
    assert read_losses(job.run_dir) == undisturbed


def test_controller_and_node_die(jobs: JobMaker, undisturbed: dict[int, float]) -> None:
    """Catches a job that does not live through a new controller, or through the loss of a node."""
    job = jobs.submit("run")
    job.wait_for_launch(1, 30)
    jobs.cluster.kill_controller()
    time.sleep(1.0)
    jobs.cluster.start_controller()
    jobs.cluster.wait(lambda: jobs.cluster.job(job.number), 20, "the controller")
    lost = jobs.cluster.run(
        "scontrol", "show", "hostnames", jobs.cluster.job(job.number)["NodeList"]
    ).split()[-1]
    jobs.cluster.power_off(lost)
    try:
        jobs.cluster.start_requeued(job.number, 1)
        job.complete()
    finally:
        jobs.cluster.power_on(lost)
        jobs.cluster.wait(lambda: "down" not in jobs.cluster.run("sinfo", "-h", "-o", "%T"), 30, lost)
    assert lost not in job.events("launch")[-1]["hosts"]
    assert read_losses(job.run_dir) == undisturbed


def test_bad_node_is_excluded(jobs: JobMaker, undisturbed: dict[int, float]) -> None:
    """Catches a run that stays for ever on a node that kills its ranks."""
    job = jobs.submit("run")
    for launch in (1, 2):
        job.wait_for_launch(launch, SAVE_EVERY * launch + 5)
        bad = read_heartbeats(RunFiles(job.run_dir))[1].host
        os.kill(rank_pid(job.config, 1), signal.SIGKILL)
        wait_for_events(job.run_dir, "failure", launch)
    jobs.cluster.start_requeued(job.number, 1)
    job.complete()
    assert [event["host"] for event in job.events("exclude")] == [bad]
    assert bad not in job.events("launch")[-1]["hosts"]
    assert read_losses(job.run_dir) == undisturbed


def test_array_and_singleton(jobs: JobMaker) -> None:
    """Catches array tasks that share a run directory, and chained jobs that disturb a run."""
    short = ("--train.steps=30", "--run.seed={task}")
    array = jobs.submit("array", "--nodes=1", "--array=3,5", arguments=short)
    chain = [
        jobs.submit("chain", "--nodes=1", "--dependency=singleton", arguments=("--train.steps=30",))
        for _ in range(2)
    ]
    for job in (array, *chain):
        job.complete()
    losses = [read_losses(array.config.parent / f"run_task_{task}") for task in (3, 5)]
    assert [len(loss) for loss in losses] == [30, 30]
    assert losses[0] != losses[1]
    assert len(chain[0].events("launch")) == 1
    assert "has finished already" in chain[0].log


def test_second_job_and_cancelled_job(jobs: JobMaker) -> None:
    """Catches two jobs in one run directory, and a cancelled job that queues itself again."""
    job = jobs.submit("run", arguments=("--preflight=full",))
    job.wait_for_launch(1, 10)
    assert "2 ranks (cpu): 4 MiB in" in job.log
    second = jobs.submit("run", "--nodes=1", f"--output={job.config.parent}/second.log")
    second.cluster.wait_for_state(second.number, "FAILED", timeout_s=10)
    refusal = (job.config.parent / "second.log").read_text()
    assert f"is in use by SLURM job {job.number}, process" in refusal
    assert refusal.count("\n") == 1
    times = second.cluster.job(second.number)
    assert times["RunTime"] <= "00:00:05"

    jobs.cluster.run("scancel", job.number)
    wait_for(lambda: not processes_of(job.config), 30, "the end of all processes")
    assert jobs.cluster.wait_for_state(job.number, "CANCELLED")
    time.sleep(1.0)
    assert jobs.cluster.job(job.number)["JobState"] == "CANCELLED"
    assert job.events("requeue") == []


def test_mixed_node_names(cluster: MiniSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches node lists that are not one plain range."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    names = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu-a[03,07-08],n1,rack2-node[1-2]"}
    job = Job.from_environment(names)
    assert job is not None
    assert job.hosts() == ("gpu-a03", "gpu-a07", "gpu-a08", "n1", "rack2-node1", "rack2-node2")
