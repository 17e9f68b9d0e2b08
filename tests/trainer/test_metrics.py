"""What a run reports: right sums over ranks, no record lost or doubled, valid JSON, TensorBoard opens."""

from __future__ import annotations

import json
import logging
import math
import os
import pty
import re
import resource
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.world import World
from tests.ranks import run_ranks
from trainer.config import LogConfig
from trainer.metrics.device import device_peak_flops, measure_matmul_flops, memory_peak_bytes
from trainer.metrics.json_lines import JsonLines, read_json_lines
from trainer.metrics.logger import MetricsLogger
from trainer.metrics.sums import DENSITY_LIMITS, ConceptUsage, Mean, StepMetrics

CPU = torch.device("cpu")
NTP_MEANS = (Mean("loss_ntp", "ntp_nats", "tokens"), Mean("loss_total", "total_nats", "tokens"))
COCOMIX_MEANS = (
    *NTP_MEANS,
    Mean("loss_concept", "concept_nats", "tokens"),
    Mean("concept_recall_at_A", "target_hits", "targets"),
    Mean("concept_mean_rank", "target_ranks", "targets"),
)
TOKENS_PER_STEP = 10
SETTINGS: dict[str, Any] = {
    "is_main": True,
    "resume_step": 0,
    "total_steps": 100,
    "tokens_per_step": TOKENS_PER_STEP,
    "flops_per_token": 7,
    "peak_flops": None,
}


@contextmanager
def running(run_dir: Path, *, tensorboard: bool = False, **settings: Any) -> Iterator[MetricsLogger]:
    log = MetricsLogger(run_dir, LogConfig(every=1, tensorboard=tensorboard), **SETTINGS | settings)
    log.start()
    yield log
    log.close()


def submit(log: MetricsLogger, step: int, **values: Tensor) -> None:
    device_values = values or {"loss_ntp": torch.tensor(1.0 / step)}
    log.submit(step, step * TOKENS_PER_STEP, device_values, {"lr": 0.1})


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, each of which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in records(run_dir)]


def all_reduce(operation: dist.ReduceOp.RedOpType) -> Any:
    def reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, operation)
        return tensor

    return reduce


@pytest.mark.dist
def test_means_and_shares_over_ranks() -> None:
    """Means of means (ranks with unequal counts), or shares that count one rank's concepts only."""

    def step(world: World) -> dict[str, float]:
        metrics = StepMetrics(COCOMIX_MEANS, CPU)
        for microbatch in (1, 2):
            tokens = torch.tensor(10 * microbatch + world.rank)
            metrics.add(tokens=tokens, ntp_nats=tokens * (world.rank + 2.0), total_nats=0, concept_nats=1.5)
            metrics.add(targets=4 * world.rank, target_hits=3 * world.rank, target_ranks=0.0)
        usage = ConceptUsage(8, CPU)
        usage.add(torch.tensor([[world.rank]]), torch.tensor([[2, 3 + world.rank]]))
        found = usage.reduce(all_reduce(dist.ReduceOp.SUM))
        means = metrics.reduce(all_reduce(dist.ReduceOp.SUM)) | found.shares
        assert found.histograms["concepts/density_targeted"].tolist() == [6, *[0] * 22, 2, 0]  # 2 in half
        assert found.histograms["concepts/density_used"].tolist() == [5, *[0] * 22, 2, 1]  # 1 in all tokens
        return {name: value.item() for name, value in means.items()}

    results = run_ranks(step, 2)
    assert results[0] == results[1]
    assert results[0]["loss_ntp"] == pytest.approx((30 * 2 + 32 * 3) / 62)
    assert results[0]["loss_concept"] == pytest.approx(6.0 / 62)
    assert results[0]["concept_recall_at_A"] == 0.75
    assert results[0]["concept_share_targeted"] == 2 / 8
    assert results[0]["concept_share_used"] == 3 / 8


def test_accumulator_keeps_no_graph_and_starts_anew() -> None:
    """A graph that is held over microbatches, a reset that reaches a submitted value, a mistyped slot."""
    metrics = StepMetrics(NTP_MEANS, CPU)
    weight = torch.tensor(3.0, requires_grad=True)
    metrics.add(tokens=2, ntp_nats=weight * 2, total_nats=weight)
    means = metrics.reduce(lambda sums: sums)
    metrics.reset()
    assert not means["loss_ntp"].requires_grad
    assert means["loss_ntp"].item() == 3.0
    assert means["loss_ntp"].dtype == torch.float64
    assert metrics.reduce(lambda sums: sums)["loss_ntp"].isnan()
    with pytest.raises(ValueError, match="loss is not a slot"):
        metrics.add(loss=1.0)


def test_masked_targets_are_not_used_concepts() -> None:
    """Noise labels that count as concepts in use, and shares that never fall again."""
    usage = ConceptUsage(4, CPU)
    mask = torch.tensor([[True, False]])
    usage.add(torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([[0]]), mask)
    assert {name: value.item() for name, value in usage.reduce(lambda counts: counts).shares.items()} == {
        "concept_share_targeted": 0.25,
        "concept_share_used": 0.25,
    }
    assert usage.reduce(lambda counts: counts).shares["concept_share_used"].item() == 0.0


def test_concepts_are_counted_by_how_often_they_occur() -> None:
    """Catches counts per microbatch in place of all tokens, bins that are off by one, lost concepts."""
    generator = torch.Generator().manual_seed(0)
    usage = ConceptUsage(50, CPU)
    kept = torch.stack([torch.randperm(20, generator=generator)[:3] ** 2 // 8 for _ in range(400)])
    for part in kept.split(150):
        usage.add(part[:, :0], part)
    found = usage.reduce(lambda counts: counts).histograms["concepts/density_used"].tolist()
    density = torch.bincount(kept.flatten(), minlength=50).double() / 400
    lower = -math.inf
    for limit, count in zip(DENSITY_LIMITS, found, strict=True):
        assert count == int(((density > 10**lower) & (density <= 10**limit)).sum()) + (
            int((density == 0).sum()) if lower == -math.inf else 0
        )
        lower = limit
    assert sum(found) == 50


def test_records_are_written_one_step_late(tmp_path: Path) -> None:
    """A fetch that waits for the step just queued; values that change after they were handed over."""
    with running(tmp_path) as log:
        value = torch.tensor(2.0)
        submit(log, 1, loss_ntp=value)
        value.zero_()
        assert records(tmp_path) == []
        submit(log, 2)
        assert [(r["step"], r["loss_ntp"], r["lr"]) for r in records(tmp_path)] == [(1, 2.0, 0.1)]
        log.flush()
        log.flush()
        assert steps(tmp_path) == [1, 2]
    assert steps(tmp_path) == [1, 2]


def test_floats_survive_bitwise_and_json_stays_valid(tmp_path: Path) -> None:
    """Rounded losses that hide a difference; a NaN that no JSON parser but Python's reads."""
    loss = torch.tensor(0.1) / 3
    with running(tmp_path) as log:
        submit(log, 1, loss_ntp=loss, grad_norm=torch.tensor(math.inf), loss_concept=torch.tensor(math.nan))
        log.event("fault", error=ValueError("x"), path=Path("a"), norms=[1.0, math.inf])
    (record,) = records(tmp_path)
    assert torch.tensor(record["loss_ntp"], dtype=torch.float64) == loss.double()
    assert record["grad_norm"] is None
    assert record["loss_concept"] is None
    assert read_json_lines(tmp_path / "events.jsonl")[0]["norms"] == [1.0, None]


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 9, "tokens": 9', b'{"step": 9, "text": "\xc3', b"\x00" * 40]
)
def test_resume_drops_later_and_torn_records(tmp_path: Path, torn: bytes) -> None:
    """Steps twice in the curve after a crash, or a torn line in the middle of the file for ever."""
    with running(tmp_path) as log:
        for step in range(1, 9):
            submit(log, step)
        log.event("save", step=5)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(torn)
    with running(tmp_path, resume_step=5) as log:
        assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == before[:5]
        log.event("resume", step=5)
        submit(log, 6)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [event["kind"] for event in read_json_lines(tmp_path / "events.jsonl")] == ["save", "resume"]
    assert (tmp_path / "events.jsonl").read_bytes().count(b"\n") == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_checkpoint_holds_every_record_and_the_clock(tmp_path: Path) -> None:
    """A process killed right after a checkpoint loses its pending record, or the time spent so far."""
    with running(tmp_path) as log:
        submit(log, 1)
        time.sleep(0.05)
        state = json.loads(json.dumps(log.state_dict()))
        assert steps(tmp_path) == [1]
    resumed = MetricsLogger(tmp_path, LogConfig(tensorboard=False), **SETTINGS | {"resume_step": 1})
    resumed.load_state_dict(state)
    time.sleep(0.4)
    resumed.start()
    time.sleep(0.05)
    submit(resumed, 2)
    resumed.close()
    record = records(tmp_path)[-1]
    assert 0.05 <= state["seconds"] <= record["seconds"] - 0.05
    assert record["seconds"] < state["seconds"] + 0.4
    assert record["tokens_per_s"] == pytest.approx(TOKENS_PER_STEP / (record["seconds"] - state["seconds"]))


def test_throughput_counts_training_time_only(tmp_path: Path) -> None:
    """Validation in the throughput, or a utilisation that forgets the FLOPs or the other ranks' tokens."""
    with running(tmp_path, peak_flops=1000.0) as log:
        submit(log, 1)
        time.sleep(0.02)
        with log.paused():
            time.sleep(0.4)
        submit(log, 5)
    first, second = records(tmp_path)
    seconds = second["seconds"] - first["seconds"]
    assert 0.02 <= seconds < 0.4
    assert second["tokens_per_s"] == pytest.approx(4 * TOKENS_PER_STEP / seconds)
    assert second["mfu"] == pytest.approx(7 * second["tokens_per_s"] / 1000.0)
    assert second["flops"] == 5 * TOKENS_PER_STEP * 7
    assert second["memory_peak_bytes"] > 1e7


def test_validation_joins_its_step(tmp_path: Path) -> None:
    """Validation on the line of another step, or a second line for one step."""
    with running(tmp_path) as log:
        submit(log, 1)
        log.validation(1, {"loss_ntp": 0.5})
        submit(log, 2)
        log.flush()
        log.validation(2, {"loss_ntp": 0.25})
        log.validation(3, {"loss_ntp": 0.125})
        submit(log, 4)
    with running(tmp_path, resume_step=4) as log:
        log.validation(4, {"loss_ntp": 0.0625})
    found = records(tmp_path)
    assert [(r["step"], r.get("val_loss_ntp")) for r in found] == [
        (1, 0.5),
        (2, 0.25),
        (3, 0.125),
        (4, 0.0625),
    ]
    assert [r.get("loss_ntp") for r in found] == [1.0, 0.5, None, 0.25]
    assert found[2]["tokens"] == 3 * TOKENS_PER_STEP


def test_due_steps_include_the_last(tmp_path: Path) -> None:
    """A run whose last step leaves no record."""
    log = MetricsLogger(tmp_path, LogConfig(every=4), **SETTINGS | {"is_main": False, "total_steps": 10})
    assert [step for step in range(1, 11) if log.due(step)] == [4, 8, 10]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    """Two ranks writing one file."""
    with running(tmp_path, is_main=False, tensorboard=True) as log:
        submit(log, 1)
        log.validation(1, {"loss_ntp": 1.0})
        log.event("start")
        log.config_text("a: 1")
        log.samples(1, {"a": "b"})
        log.hparams({}, {})
        with log.paused():
            pass
        assert log.state_dict()["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


@contextmanager
def tensorboard_server(log_dir: Path) -> Iterator[str]:
    """The real server on a free loopback port; yields its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--load_fast", "false"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", "0"], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert server.stderr is not None
        found = (re.search(r"at (http://\S+)", line) for line in server.stderr)
        yield next(match[1] for match in found if match)
    finally:
        server.kill()
        server.communicate()


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def await_tags(address: str, plugin: str, run: str = ".") -> Any:
    """Tags of a run; the server reads its files in the background."""
    deadline = time.monotonic() + 20
    while run not in (tags := ask(f"{address}data/plugin/{plugin}/tags")) and time.monotonic() < deadline:
        time.sleep(0.1)
    return tags[run]


def ask_bins(address: str, tag: str) -> list[tuple[float, float, float]]:
    """Left and right edge and count of each bin of a run's newest histogram."""
    query = urllib.parse.urlencode({"run": ".", "tag": tag})
    points: list[Any] = ask(f"{address}data/plugin/histograms/histograms?{query}")
    return [(left, right, count) for left, right, count in points[-1][2]]


# The little run of these tests has no such values.
UNUSED_CHARTS = {
    "share of the dictionary",
    "mean rank",
    "model FLOPs utilisation",
    "seconds waiting for data",
}


def write_and_resume(run_dir: Path) -> None:
    concepts = {"loss_concept": torch.tensor(9.0), "concept_recall_at_A": torch.tensor(0.5)}
    with running(run_dir, tensorboard=True) as log:
        log.config_text("optim:\n  lr: 0.1\n")
        for step in (1, 2, 3):
            submit(log, step, loss_ntp=torch.tensor(float(step)), **concepts)
    with running(run_dir, tensorboard=True, resume_step=2) as log:
        submit(log, 3, loss_ntp=torch.tensor(30.0), grad_norm=torch.tensor(1.0))
        log.validation(3, {"loss_ntp": 2.0, "loss_ntp/web": 1.5})
        usage = ConceptUsage(8, CPU)
        usage.add(torch.tensor([[1], [1]]), torch.tensor([[1, 2], [1, 3]]))
        found = usage.reduce(lambda counts: counts)
        log.submit(4, 40, found.shares, {}, found.histograms)
        log.samples(3, {"def": " f():\n    pass"})
        log.flush()
        log.hparams({"optim": {"lr": 0.1, "betas": (0.9, 0.95)}, "sae": None}, {"val_loss_ntp": 2.0})


def test_tensorboard_serves_the_run(tmp_path: Path) -> None:
    """Curves that double back after a resume, hyper-parameters that the dashboard cannot read."""
    write_and_resume(tmp_path)
    with tensorboard_server(tmp_path / "tb") as address:
        tags = await_tags(address, "scalars")
        groups = (
            "loss/ntp loss/concept perplexity concepts/recall_at_A optim/lr optim/grad_norm memory/peak_bytes"
        )
        wanted = f"{groups} throughput/tokens_per_s validation/loss_ntp validation/perplexity"
        wanted += " validation/loss_ntp/web"
        assert set(wanted.split()) <= set(tags)
        assert not {"other/step", "other/tokens", "other/seconds", "other/flops"} & set(tags)
        points = ask(f"{address}data/plugin/scalars/scalars?run=.&tag=loss%2Fntp")
        assert [(step, value) for _, step, value in points] == [(1, 1.0), (2, 2.0), (3, 30.0)]
        layout = ask(f"{address}data/plugin/custom_scalars/layout")
        assert [category["title"] for category in layout["category"]] == (
            ["Loss", "Concepts", "Throughput", "Memory", "Health"]
        )
        for chart in (chart for category in layout["category"] for chart in category["chart"]):
            shown = [tag for tag in tags if any(re.search(item, tag) for item in chart["multiline"]["tag"])]
            assert shown or chart["title"] in UNUSED_CHARTS
            (line, *_) = chart["multiline"]["tag"]
            query = urllib.parse.urlencode({"run": ".", "tag": line})
            curves = ask(f"{address}data/plugin/custom_scalars/scalars?{query}")
            assert curves["regex_valid"]
            assert set(curves["tag_to_events"]) <= set(shown)
        bins = ask_bins(address, "concepts/density_used")
        assert [round(count) for _, _, count in bins if count > 0.5] == [5, 2, 1]
        assert sum(count for _, right, count in bins if right <= -5.9) == pytest.approx(5)
        assert {"config/text_summary", "samples/0/text_summary"} <= set(await_tags(address, "text"))
        experiment = ask(f"{address}data/plugin/hparams/experiment", {"experimentName": ""})
        assert {info["name"] for info in experiment["hparamInfos"]} == {"optim.lr", "optim.betas", "sae"}
        sessions = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 5}
        (group,) = ask(f"{address}data/plugin/hparams/session_groups", sessions)["sessionGroups"]
        assert group["hparams"]["optim.lr"] == 0.1
        assert group["metricValues"][0]["value"] == 2.0


CHATTY_RUN = """
import logging, pathlib, sys, warnings
import torch
from trainer.config import LogConfig
from trainer.metrics.console import setup_logging
from trainer.metrics.logger import MetricsLogger

run_dir, rank = pathlib.Path(sys.argv[1]), int(sys.argv[2])
setup_logging(run_dir, rank)
setup_logging(run_dir, rank)
log = MetricsLogger(run_dir, LogConfig(tensorboard=False), is_main=rank == 0, resume_step=0, total_steps=3,
                    tokens_per_step=10, flops_per_token=7, peak_flops=None)
log.start()
for step in (1, 2, 3):
    log.submit(step, 10 * step, {"loss_ntp": torch.tensor(1.5)}, {})
    if step == 2:
        logging.getLogger("data").warning("slow storage")
log.flush()
warnings.warn("old option")
"""


def chatty_run(run_dir: Path, rank: int, output: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHATTY_RUN, str(run_dir), str(rank)]
    subprocess.run(command, stdout=output, stderr=output, env=environment, check=True, timeout=60)


def test_pipe_gets_plain_lines(tmp_path: Path) -> None:
    """Control characters or rewritten lines in a batch job's log, or every line twice."""
    with (tmp_path / "out").open("wb") as file:
        chatty_run(tmp_path, 0, file.fileno())
    text = (tmp_path / "out").read_text()
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert re.search(r"step 1/3  loss 1\.5000  .* tok/s  eta \d", lines[0])
    assert sum("loss 1.5000" in line for line in lines) == 3
    assert sum("slow storage" in line for line in lines) == 1
    assert sum("old option" in line for line in lines) >= 1
    assert (tmp_path / "logs" / "rank_0.log").read_text() == text


def test_terminal_gets_one_updating_line(tmp_path: Path) -> None:
    """A terminal that scrolls for every step, or a warning that is overwritten by the progress line."""
    terminal, output = pty.openpty()
    chatty_run(tmp_path, 0, output)
    os.close(output)
    text = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert text.count("\r\x1b[Kstep ") == 3
    rows = text.split("\r\n")
    assert "slow storage" in rows[0].split("\x1b[K")[-1]
    assert rows[1].startswith("step 1/3  loss 1.5000")
    assert text.endswith("\r\n")


def test_other_ranks_log_to_their_file_only(tmp_path: Path) -> None:
    """Every line N times on the console of an N-rank job."""
    with (tmp_path / "out").open("wb") as file:
        chatty_run(tmp_path, 1, file.fileno())
    assert (tmp_path / "out").read_text() == ""
    assert "WARNING data: slow storage" in (tmp_path / "logs" / "rank_1.log").read_text()


def test_progress_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A record whose progress line fails on a missing or null value."""
    with caplog.at_level(logging.INFO, "trainer.metrics"), running(tmp_path) as log:
        log.validation(3, {"loss_ntp": 0.5})
    assert caplog.messages == ["step 3/100  val 0.5000"]


def test_peaks() -> None:
    """A ceiling that takes seconds to measure, or one that ignores the configured peak."""
    start = time.perf_counter()
    assert 1e8 < measure_matmul_flops(CPU, torch.float32) < 1e14
    assert time.perf_counter() - start < 1.0
    assert device_peak_flops(CPU, "bf16", peak_tflops=2.0) == 2e12
    before = memory_peak_bytes(CPU)
    block = torch.ones(16_000_000)
    assert memory_peak_bytes(CPU) >= before
    assert memory_peak_bytes(CPU) >= block.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_host_synchronisation_on_cuda(tmp_path: Path) -> None:
    """A hidden `.item()` between the microbatch and the record, or a value read before it has arrived."""
    device = torch.device("cuda")
    metrics, usage = StepMetrics(NTP_MEANS, device), ConceptUsage(8, device)
    ids, losses = torch.arange(4, device=device), torch.arange(1.0, 4.0, device=device)
    with running(tmp_path) as log:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in (1, 2, 3):
                metrics.add(tokens=2, ntp_nats=losses[step - 1], total_nats=0)
                usage.add(ids, ids, ids > 1)
                used = usage.reduce(lambda counts: counts)
                means = metrics.reduce(lambda sums: sums) | used.shares
                log.submit(step, step, means, {}, used.histograms)
                metrics.reset()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [(r["loss_ntp"], r["concept_share_targeted"], r["concept_share_used"]) for r in records(tmp_path)]
    assert found == [(0.5, 0.25, 0.5), (1.0, 0.25, 0.5), (1.5, 0.25, 0.5)]


def test_lines_that_find_no_room_wait_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a full disk that ends the run, or a line that it tore for good."""
    path = tmp_path / "records.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        lines.write({"step": 2})
        lines.write({"step": 3})
        assert [line["step"] for line in read_json_lines(path)] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines.write({"step": 4})
    lines.close()
    assert [line["step"] for line in read_json_lines(path)] == [1, 2, 3, 4]
    assert [record.message for record in caplog.records if "cannot be written" in record.message]
