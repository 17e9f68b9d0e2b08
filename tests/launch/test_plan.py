"""Plans against the real step on fake tensors, against the trainer's refusals, and by hand."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from launch import plan as command
from launch.planning import layout, memory, targets, traffic
from launch.planning.advice import advise, largest_microbatch
from launch.planning.check import Comparison, compare
from launch.planning.forecast import Assumptions, Plan, make_plan
from launch.planning.layout import Cluster
from launch.planning.measure import Measured, measure
from launch.planning.traffic import Transfer, sent
from parallel.apply import _split_tensors
from parallel.mesh import _dp_shard
from parallel.tensor import TensorGroup
from trainer.build import _check_batch, _check_tensor_parallel
from trainer.config import RunConfig
from trainer.config_io import load_config
from trainer.model.gpt2 import GPT2

CONFIGS = Path(__file__).parents[2] / "configs"
SHALLOW = ("--model.n_layer=6",)
SPLIT = ("--parallel.tp=2", "--parallel.shard_teacher=true", "--parallel.shard_sae=true")
SMALL = (*SHALLOW, *SPLIT, "--train.batch_size=192", "--train.microbatch_size=2")


def plan_of(name: str, *overrides: str, ranks: int = 64, **assumed: Any) -> Plan:
    config = load_config(RunConfig, CONFIGS / f"{name}.yaml", overrides)
    nodes = max(1, ranks // 8)
    return make_plan(config, Cluster(nodes, ranks // nodes), Assumptions(**assumed))


Measure = Callable[[Plan], Measured]


@pytest.fixture(scope="module")
def measured() -> Iterator[Measure]:
    """The real step in a process of its own: torch's caches of DTensor layouts keep the fake meshes."""
    limit = partial(torch.set_num_threads, 1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), limit) as pool:
        yield lambda plan: pool.submit(measure, plan).result()


def errors(found: list[Comparison], within: float = 0.005) -> list[str]:
    """What differs by more than it may; phases by more than ``within``."""
    return [
        f"{line.what}: {line.planned} planned, {line.measured} measured"
        for line in found
        if abs(line.error) > (min(within, line.tolerance) if line.what.startswith("peak") else 0)
    ]


# Against the real step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (8, ("--parallel.tp=4", "--train.batch_size=8")),
        (64, ("--parallel.tp=2", "--train.batch_size=128")),
        (1024, ("--parallel.tp=1",)),
    ],
    ids=["8 ranks, tp 4", "64 ranks, tp 2", "1024 ranks, tp 1"],
)
def test_the_paper_s_largest_model(ranks: int, overrides: tuple[str, ...], measured: Measure) -> None:
    """Catches any formula that is off for the 1.38B model: state, peaks or collectives."""
    plan = plan_of("1b", *overrides, ranks=ranks)
    assert errors(compare(plan, measured(plan))) == []


VARIANTS = {
    "chunks of logits": ("386m", 64, (*SHALLOW, "--concepts.insert_layer=2")),
    "hybrid sharding": ("1b", 16, (*SHALLOW, "--train.batch_size=16", "--parallel.dp_replicate=2")),
    "replicas": ("1b", 8, (*SHALLOW, "--train.batch_size=8", "--parallel.dp_replicate=8")),
    "resharding": ("1b", 8, (*SHALLOW, "--train.batch_size=64", "--parallel.reshard_after_forward=always")),
    "all but the last block, ahead": (
        "1b",
        64,
        (
            *SHALLOW,
            "--train.batch_size=64",
            "--parallel.reshard_after_forward=auto",
            "--parallel.prefetch=2",
        ),
    ),
    "a copy per node": (
        "1b_ntp",
        16,
        (
            *SHALLOW,
            "--train.batch_size=16",
            "--train.microbatch_size=1",
            "--parallel.reshard_after_forward=node",
        ),
    ),
    "selective, tp": ("1b", 8, (*SHALLOW, *SPLIT, "--train.batch_size=64", "--parallel.recompute=selective")),
    "full, tp": ("1b", 8, (*SHALLOW, *SPLIT, "--train.batch_size=64", "--parallel.recompute=full")),
    "full, next token": ("1b_ntp", 8, (*SHALLOW, "--train.batch_size=64", "--parallel.recompute=full")),
    "offloaded": (
        "1b_ntp",
        8,
        (
            *SHALLOW,
            "--train.batch_size=64",
            "--parallel.offload_parameters=true",
            "--parallel.offload_optimizer=true",
        ),
    ),
    "one GPU": ("1b_ntp", 1, ("--model.n_layer=4", "--train.batch_size=4", "--train.precision=fp32")),
    "fp32": ("1b_ntp", 64, (*SHALLOW, "--train.batch_size=256", "--train.precision=fp32")),
    "next token, tp": ("1b_ntp", 8, ("--model.n_layer=4", "--train.batch_size=64", "--parallel.tp=2")),
    "split teacher": ("386m", 8, (*SHALLOW, "--train.batch_size=128", "--parallel.shard_teacher=true")),
    "split over replicas": (
        "1b",
        8,
        (*SHALLOW, *SPLIT, "--train.batch_size=12", "--parallel.dp_replicate=2"),
    ),
    "cached targets": ("1b", 8, (*SHALLOW, "--concepts.source=cache", "--train.batch_size=64")),
    "cached targets, tp": (
        "1b",
        8,
        (*SHALLOW, "--concepts.source=cache", "--train.batch_size=64", "--parallel.tp=2"),
    ),
    "documents": ("386m", 8, (*SHALLOW, "--train.batch_size=64", "--data.mask_documents=true")),
    "documents, tp": (
        "1b",
        8,
        (
            *SHALLOW,
            *SPLIT,
            "--train.batch_size=64",
            "--data.mask_documents=true",
            "--parallel.recompute=full",
        ),
    ),
    "documents, next token": ("1b_ntp", 8, (*SHALLOW, "--train.batch_size=64", "--data.mask_documents=true")),
    "rows that may be skipped": ("69m_ntp", 8, ("--data.on_damage=skip", "--train.batch_size=64")),
    "distillation": ("1b_ntp", 8, (*SHALLOW, "--objective.name=kd", "--train.batch_size=64")),
    "distillation, tp": (
        "69m_ntp",
        8,
        (
            *("--objective.name=kd", "--kd.temperature=2", "--kd.precision=fp32"),
            *("--train.batch_size=64", "--parallel.tp=2"),
        ),
    ),
    "pauses": ("1b", 8, (*SHALLOW, "--objective.name=pause", "--train.batch_size=64")),
    "pauses, tp": (
        "1b",
        8,
        (
            *(*SHALLOW, "--objective.name=pause", "--pause.every=2", "--train.batch_size=64"),
            *("--parallel.tp=2", "--parallel.recompute=full"),
        ),
    ),
    "targets by activation": (
        "1b",
        8,
        (*SHALLOW, *SPLIT, "--concepts.targets=activation", "--concepts.every=2", "--train.batch_size=64"),
    ),
    "random targets": ("1b", 8, (*SHALLOW, "--concepts.targets=random", "--train.batch_size=64")),
    "mixing alone": ("1b", 8, (*SHALLOW, "--objective.concept_weight=0", "--train.batch_size=64")),
    "mixing alone, tp": (
        "1b",
        8,
        (*SHALLOW, "--objective.concept_weight=0", "--train.batch_size=64", "--parallel.tp=2"),
    ),
    "prediction alone": ("1b", 8, (*SHALLOW, "--concepts.mix=none", "--train.batch_size=64")),
    "prediction alone, tp": (
        "1b",
        8,
        (*SHALLOW, "--concepts.mix=none", "--train.batch_size=64", "--parallel.tp=2"),
    ),
    "added": ("1b", 8, (*SHALLOW, "--concepts.mix=add", "--train.batch_size=64")),
    "added, tp": (
        "1b",
        8,
        (
            *(*SHALLOW, "--concepts.mix=add", "--train.batch_size=64"),
            *("--parallel.tp=2", "--parallel.recompute=full"),
        ),
    ),
    "every fourth token": ("1b", 8, (*SHALLOW, "--concepts.every=4", "--train.batch_size=64")),
    "every fourth token, tp": (
        "1b",
        8,
        (
            *(*SHALLOW, "--concepts.every=4", "--train.batch_size=64"),
            *("--parallel.tp=2", "--parallel.recompute=selective"),
        ),
    ),
    "every second token, recomputed": (
        "1b",
        8,
        (*SHALLOW, "--concepts.every=2", "--train.batch_size=64", "--parallel.recompute=full"),
    ),
    "documents, distillation": (
        "1b_ntp",
        8,
        (*SHALLOW, "--objective.name=kd", "--train.batch_size=64", "--data.mask_documents=true"),
    ),
    "documents, pauses": (
        "1b",
        8,
        (
            *(*SHALLOW, "--objective.name=pause", "--pause.every=4", "--train.batch_size=64"),
            *("--data.mask_documents=true", "--parallel.tp=2"),
        ),
    ),
    "documents, added": (
        "1b",
        8,
        (*SHALLOW, "--concepts.mix=add", "--train.batch_size=64", "--data.mask_documents=true"),
    ),
    "untied head": ("69m_ntp", 8, ("--model.tied_head=false", "--train.batch_size=64")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_every_switch(name: str, ranks: int, overrides: tuple[str, ...], measured: Measure) -> None:
    """Catches a formula that holds for the default layout alone."""
    plan = plan_of(name, *overrides, ranks=ranks)
    assert errors(compare(plan, measured(plan)), within=0.03) == []


MOMENTS = {
    "forward: concept head": (
        "--model.vocab_size=3000",
        "--model.n_layer=2",
        "--concepts.insert_layer=1",
        "--concepts.num_concepts=65536",
    ),
    "backward: concept head": (*SHALLOW, "--model.vocab_size=3000"),
    "backward: last block": (
        *SHALLOW,
        "--model.vocab_size=3000",
        "--concepts.insert_layer=1",
        "--concepts.num_concepts=1000",
        "--parallel.reshard_after_forward=always",
    ),
}


RECOMPUTED_MOMENTS = [
    ("selective", "forward: LM head"),
    ("selective", "backward: top block"),
    ("full", "forward: top block"),
    ("full", "backward: top block"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "moment"), RECOMPUTED_MOMENTS)
def test_what_is_recomputed(how: str, moment: str, measured: Measure) -> None:
    """Catches activations that are left out of the plan while they exist: at work, or computed again."""
    plan = plan_of(
        "1b",
        *("--model.n_layer=12", "--model.vocab_size=3000", "--concepts.num_concepts=1000"),
        *("--concepts.insert_layer=1", "--train.batch_size=256", f"--parallel.recompute={how}"),
    )
    phase = moment.partition(":")[0]
    own = [found for found in plan.moments if found.name.startswith(phase)]
    assert max(own, key=lambda found: found.tensors).name == moment
    assert errors(compare(plan, measured(plan)), within=0.02) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_moments_that_are_seldom_the_peak(moment: str, measured: Measure) -> None:
    """Catches an error in a moment that the real models' peaks hide; sizes are bent until it is the peak."""
    plan = plan_of("1b", *MOMENTS[moment], "--train.batch_size=256")
    phase = moment.partition(":")[0]
    own = [found for found in plan.moments if found.name.startswith(phase)]
    assert max(own, key=lambda found: found.tensors).name == moment
    assert errors(compare(plan, measured(plan)), within=0.03) == []


@pytest.mark.slow
@pytest.mark.parametrize("split", [(), SPLIT], ids=["whole", "split"])
def test_the_autoencoder_s_moment(split: tuple[str, ...], measured: Measure, tmp_path: Path) -> None:
    """Catches an error in it that the teacher's head hides: with a small vocabulary it is the peak."""
    sizes = {"n_embd": 768, "n_layer": 2, "n_head": 12, "vocab_size": 1000, "n_positions": 1024}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    teacher = (f"--concepts.teacher={tmp_path}", "--concepts.sae_layer=0")
    plan = plan_of("1b", *SHALLOW, *teacher, *split, "--train.batch_size=64", ranks=8)
    own = [found for found in plan.moments if found.name.startswith("targets")]
    assert max(own, key=lambda found: found.tensors).name == "targets: the autoencoder"
    assert errors(compare(plan, measured(plan))) == []


@pytest.fixture(scope="module")
def small(measured: Measure) -> Measured:
    return measured(plan_of("1b", *SMALL))


def _plus_one(function: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    return lambda *args: (function(*args)[0] + 1, function(*args)[1])


def _scaled(factor: float, function: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, **kwargs: int(factor * function(*args, **kwargs))


def _without_the_last(function: Callable[..., Iterator[Transfer]]) -> Callable[..., list[Transfer]]:
    return lambda *args: list(function(*args))[:-1]


PLANTED: dict[str, tuple[object, str, Callable[[Any], Any]]] = {
    "peak: forward: inner width": (memory, "mlp_kept", partial(_scaled, 0.9)),
    "peak: forward: queries": (memory, "attention_kept", partial(_scaled, 0.8)),
    "peak: forward: last block": (memory, "last_attention_kept", partial(_scaled, 0.5)),
    "peak: forward: chunk": (memory, "_logits", partial(_scaled, 0.8)),
    "peak: backward: gathered": (memory, "kept_in_backward", partial(_scaled, 0.5)),
    "optimizer: one moment": (memory, "COPIES_OF_ADAM", lambda _: 1),
    "parameters: a bias": (layout, "block_parameters", lambda whole: lambda width: whole(width)[1:]),
    "peak: targets: gathered": (targets, "_teacher_gathered", lambda _: lambda *args: 0),
    "peak: targets: whole dictionary": (targets, "latents_held", partial(_scaled, 2)),
    "tp all-gather: one more": (traffic, "_sublayers", _plus_one),
    "dp_shard reduce-scatter: bf16": (traffic, "FP32", lambda _: 2),
    "replica all-gather: shards": (traffic, "_teacher_weights", _without_the_last),
    "tp all-reduce: ids in 4 bytes": (traffic, "INT64", lambda _: 4),
    "dp_shard all-reduce: a slot": (traffic, "METRIC_SLOTS", lambda _: {"cocomix": 6}),
}


def test_the_unchanged_plan_agrees(small: Measured) -> None:
    """The ground for the planted errors: without one there is nothing to find."""
    plan = plan_of("1b", *SMALL)
    assert errors(compare(plan, small)) == []


@pytest.mark.parametrize("error", PLANTED)
def test_finds_a_planted_error(error: str, small: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison that agrees with everything."""
    where, name, change = PLANTED[error]
    monkeypatch.setattr(where, name, change(getattr(where, name)))
    found = errors(compare(plan_of("1b", *SMALL), small))
    assert any(line.startswith(error.split(":")[0]) for line in found), found


# Against the trainer's refusals


def trainer_refusal(config: RunConfig, ranks: int) -> str:
    """What the trainer's own checks say, in its order."""
    assert config.model is not None
    with pytest.raises(ValueError) as raised:  # noqa: PT011, PT012  (whichever check comes first)
        dp_shard = _dp_shard(config.parallel, ranks)
        mesh = SimpleNamespace(dp_size=config.parallel.dp_replicate * dp_shard)
        _check_batch(config, cast(Any, mesh))
        _check_tensor_parallel(config)
        with torch.device("meta"):
            model = GPT2(replace(config.model, n_layer=1))
        tp = cast(Any, SimpleNamespace(size=lambda: config.parallel.tp))
        _split_tensors(model, model.plan, tp, TensorGroup())
    return str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ("--parallel.dp_shard=3",),
        ("--parallel.tp=3",),
        ("--parallel.dp_replicate=5",),
        ("--train.batch_size=1000",),
        ("--parallel.tp=64", "--data.seq_len=1000"),
        ("--parallel.tp=32",),
        ("--model.n_head=1", "--parallel.tp=2"),
    ],
)
def test_refuses_what_the_trainer_refuses(
    overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a plan for a run that would not start, or that is refused in other words."""
    path = CONFIGS / "1b.yaml"
    expected = trainer_refusal(load_config(RunConfig, path, overrides), ranks=64)
    assert command.main(["--config", str(path), "--nodes", "8", *overrides]) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--gpu", "H999"), "--gpu=H999"),
        (("--mfu", "1.5"), "--mfu=1.5"),
        (("--inter_gbps", "0"), "--inter_gbps=0"),
        (("--nodes", "0"), "--nodes=0"),
        (("--parallel.tpp=2",), "did you mean parallel.tp?"),
        (("--concepts.sae_layer=11",), "concepts.sae_layer=11 must be from 0 to 10"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or a division by zero, where one line should name the switch."""
    assert command.main(["--config", str(CONFIGS / "1b.yaml"), *arguments]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_an_objective_without_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan of the wrong model: an autoencoder's run has no student, a regression other maps."""
    for arguments, expected in (
        (["demo_sae.yaml"], "objective.name=sae cannot be planned: it trains no student"),
        (["1b.yaml", "--objective.regression=l2"], "objective.regression=l2 cannot be planned: no formula"),
        (["demo_ntp.yaml", "--objective.name=kd"], "model.vocab_size=4096 must be 50257"),
    ):
        assert command.main(["--config", str(CONFIGS / arguments[0]), *arguments[1:]]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line


def test_advice_fits_the_objective() -> None:
    """Catches advice that the configuration refuses, such as a distillation's teacher that is split."""
    for name, *overrides in (
        ("1b_ntp", "--objective.name=kd", "--kd.precision=fp32"),
        ("1b", "--objective.name=pause"),
        ("1b", "--objective.concept_weight=0"),
        ("1b", "--concepts.targets=activation"),
    ):
        plan = plan_of(name, *overrides, ranks=8, gpu_memory_gb=24)
        switches = [advice.switch for advice in advise(plan)]
        assert switches
        for switch in switches:
            if not switch.startswith("--nodes"):
                plan_of(name, *overrides, *switch.split(), ranks=8)
        assert ("--kd.precision=bf16" in switches) == (name == "1b_ntp")


def test_what_an_objective_costs() -> None:
    """Catches FLOPs of models that are not run, or none of those that are."""
    plain, kd = plan_of("1b_ntp"), plan_of("1b_ntp", "--objective.name=kd")
    assert kd.flops.total - plain.flops.total == sum(
        part.total for name, part in kd.flops.parts.items() if name.startswith("teacher")
    )
    full = plan_of("1b")
    assert set(full.flops.parts) - set(plan_of("1b", "--concepts.targets=activation").flops.parts) == {
        "teacher_head",
        "attribution",
    }
    assert plan_of("1b", "--objective.concept_weight=0").teacher is None
    paused = plan_of("1b", "--objective.name=pause")
    assert paused.num_parameters == plan_of("1b_ntp", "--model.d_model=2048").num_parameters + 2048
    assert plan_of("1b", "--concepts.every=4").timing.compute_s < full.timing.compute_s


# The verdict


def test_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a verdict that is not in the exit code, or that does not say what to do."""
    path = str(CONFIGS / "1b.yaml")
    assert command.main(["--config", path, "--gpu_memory_gb", "24"]) == 3
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    for switch in (
        "parallel.tp=2",
        "train.microbatch_size=2",
        "parallel.reshard_after_forward=always",
        "parallel.recompute=selective",
        "parallel.recompute=full",
        "parallel.offload_parameters=true --parallel.offload_optimizer=true",
    ):
        assert f"--{switch}" in out
    assert command.main(["--config", path, "--gpu_memory_gb", "24", "--parallel.tp=2"]) == 0


def test_advice_is_ordered_and_true() -> None:
    """Catches advice that promises what the plan with that switch does not show."""
    plan = plan_of("1b", "--parallel.dp_replicate=2", ranks=8, gpu_memory_gb=24)
    advices = advise(plan)
    assert [advice.saved for advice in advices] == sorted((advice.saved for advice in advices), reverse=True)
    tried = {advice.switch: advice for advice in advices}
    changes = ("--train.microbatch_size=1", "--parallel.tp=4", "--parallel.dp_replicate=1")
    offload = "--parallel.offload_parameters=true --parallel.offload_optimizer=true"
    for switch in (*changes, "--parallel.shard_teacher=true", "--parallel.recompute=full", offload):
        other = plan_of("1b", "--parallel.dp_replicate=2", *switch.split(), ranks=8, gpu_memory_gb=24)
        assert (tried[switch].needed, tried[switch].fits) == (other.needed, other.fits)


def test_advice_about_targets_ahead() -> None:
    """Catches advice that the configuration refuses: ranks that share a teacher cannot compute ahead."""
    plan = plan_of("1b", "--concepts.ahead=true", ranks=8, gpu_memory_gb=24)
    switches = [advice.switch for advice in advise(plan)]
    assert "--concepts.ahead=false" in switches
    for switch in switches:
        if not switch.startswith("--nodes"):
            plan_of("1b", "--concepts.ahead=true", *switch.split(), ranks=8)
    assert any(switch.startswith("--parallel.tp=2") for switch in switches)


def test_targets_ahead_need_their_memory_beside_the_student_s() -> None:
    """Catches a plan that fits and a run that does not: both streams are at their peak at once."""
    in_order, ahead = plan_of("1b"), plan_of("1b", "--concepts.ahead=true")
    state = sum(
        in_order.moments[-1].parts[name] for name in ("parameters", "optimizer", "teacher", "SAE", "metrics")
    )
    targets = [moment.total for moment in in_order.moments[:2]]
    assert in_order.peak.name == ahead.peak.name
    assert ahead.peak.total == in_order.peak.total + max(targets) - state
    assert [moment.parts for moment in ahead.moments] == [moment.parts for moment in in_order.moments]


def test_largest_microbatch() -> None:
    """Catches a size that does not fit, or one smaller than could be."""
    plan = plan_of("1b", gpu_memory_gb=40)
    size = largest_microbatch(plan)
    assert size is not None
    assert plan_of("1b", f"--train.microbatch_size={size}", gpu_memory_gb=40).fits
    assert not plan_of("1b", f"--train.microbatch_size={2 * size}", gpu_memory_gb=40).fits


# By hand


def test_what_recomputation_costs() -> None:
    """Catches recomputed products in the MFU's numerator, or none in the step's time."""
    plain, full = (plan_of("1b_ntp", f"--parallel.recompute={how}", mfu=0.5) for how in ("none", "full"))
    assert full.flops == plain.flops
    blocks, width = plain.flops.parts["blocks"].forward, 2096
    again = blocks - 24 * 2 * 4 * width**2
    assert full.timing.compute_s / plain.timing.compute_s == pytest.approx(1 + again / plain.flops.total)
    selective = plan_of("1b_ntp", "--parallel.recompute=selective", mfu=0.5)
    assert selective.timing == plain.timing


def test_what_offloading_costs() -> None:
    """Catches offloaded bytes that still count on the GPU, and copies that take no time."""
    switches = ("--parallel.offload_parameters=true", "--parallel.offload_optimizer=true")
    sizes = ("--train.batch_size=16", "--train.microbatch_size=1", "--parallel.reshard_after_forward=always")
    plain, offloaded = (plan_of("1b_ntp", *sizes, *more, ranks=8, host_gbps=10.0) for more in ((), switches))
    state = 12 * plain.layout.shard_elements
    assert plain.peak.total - offloaded.peak.total == pytest.approx(state, rel=0.01)
    step = offloaded.moments[-1]
    assert sum(step.offloaded.values()) == pytest.approx(16 * plain.layout.shard_elements, rel=1e-4)
    # Two microbatches; blocks are gathered twice; gradients come back once.
    block, root = (unit.shard_elements(1, 8) for unit in (plain.layout.block, plain.layout.root))
    copied = 4 * (2 * (2 * 24 * block + root) + plain.layout.shard_elements)
    beside = offloaded.timing.beside_s - plain.timing.beside_s
    assert beside == pytest.approx(copied / 10e9)
    assert offloaded.timing.exposed_s > plain.timing.exposed_s


def test_who_sends_where() -> None:
    """Catches ring shares: of 8 GPUs on a node one sends outward, and a sum travels twice."""
    wide = plan_of("1b", ranks=64).layout
    out = sent(Transfer("", "dp_shard", "all-gather", 6400), wide)
    assert (out.total, out.inter_node) == pytest.approx((6300, 6300 / 8))
    assert sent(Transfer("", "dp_shard", "all-reduce", 6400), wide).total == pytest.approx(12600)
    split = plan_of("1b", "--parallel.tp=4", ranks=64).layout
    assert sent(Transfer("", "tp", "all-gather", 6400), split).inter_node == 0
    assert sent(Transfer("", "dp_shard", "all-gather", 1600), split).inter_node == pytest.approx(1500 / 2)
    broad = plan_of("1b", "--parallel.tp=16", ranks=64).layout
    exchanged = sent(Transfer("", "tp", "all-to-all", 1600), broad)
    assert (exchanged.intra_node, exchanged.inter_node) == pytest.approx((700, 800))


def test_time_and_bill() -> None:
    """Catches a unit: 6ND FLOPs at a known rate, days and GPU hours from steps."""
    plan = plan_of("1b", ranks=64, mfu=0.5, intra_gbps=1e9, inter_gbps=1e9)
    assert plan.timing.step_s == pytest.approx(plan.flops.total * 2**20 / (64 * 989e12 * 0.5), rel=1e-4)
    assert plan.gpu_hours == pytest.approx(20_000 * plan.timing.step_s * 64 / 3600)
    assert plan.tokens_per_s * plan.timing.step_s == pytest.approx(2**20)
    slow = plan_of("1b", ranks=64, mfu=0.5, intra_gbps=1e9, inter_gbps=1e-3)
    assert slow.timing.step_s == pytest.approx(slow.timing.beside_s + slow.timing.exposed_s)
    assert plan.checkpoint_bytes == pytest.approx(12 * plan.num_parameters, rel=0.001)
    assert plan.checkpoints_kept == 2 + 2 + 2


def test_reads_the_teacher_s_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan that assumes GPT-2 124M although the teacher lies there, or reads half a file."""
    sizes = {"n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50257, "n_positions": 1024}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    larger = plan_of("1b", f"--concepts.teacher={tmp_path}")
    assert larger.teacher is not None
    assert larger.teacher.elements == pytest.approx(355e6, rel=0.01)
    assert larger.timing.compute_s > plan_of("1b").timing.compute_s
    (tmp_path / "config.json").write_text('{"n_embd": 1024}')
    arguments = ["--config", str(CONFIGS / "1b.yaml"), f"--concepts.teacher={tmp_path}"]
    assert command.main(arguments) == 2
    assert "n_layer" in capsys.readouterr().err


def test_needs_no_torch() -> None:
    """Catches an import that makes a plan wait for torch."""
    code = (
        "import sys; from launch.plan import main; "
        f"code = main(['--config', {str(CONFIGS / '69m.yaml')!r}, '--gpu_hour_price', '2']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
