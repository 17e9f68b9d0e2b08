"""Recomputed activations: the same numbers, less memory, and only the work that is meant to run again."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
import trainer.kernels.matmul
from launch.planning.measure import Meter
from parallel.collectives import sum_over_ranks
from parallel.recompute import recompute
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.model.tiny import randomize
from tests.trainer.tiny_run import tiny_config
from trainer.build import build_parts
from trainer.config import ConceptsConfig, ModelConfig, RunConfig
from trainer.metrics.sums import StepMetrics
from trainer.model.cocomix import CoCoMix
from trainer.model.gpt2 import GPT2
from trainer.step import train_step

Recompute = Literal["none", "selective", "full"]
MODES: tuple[Recompute, ...] = ("none", "selective", "full")

SIZES = ModelConfig(d_model=32, n_layer=4, n_head=2, vocab_size=50, n_positions=32)
CONCEPTS = ConceptsConfig(
    teacher="", sae="", sae_layer=0, insert_layer=2, num_concepts=20, top_k=3, num_targets=2
)
ROWS, TOKENS = 3, 16


def student(objective: str) -> GPT2:
    model = GPT2(SIZES) if objective == "ntp" else CoCoMix(SIZES, CONCEPTS)
    randomize(model, seed=1)
    return model


def forward(model: GPT2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, SIZES.vocab_size, (ROWS, TOKENS + 1), generator=generator)
    inputs = (tokens[:, :-1], tokens[:, 1:])
    if not isinstance(model, CoCoMix):
        return model(*inputs).loss_ntp
    targets = torch.randint(0, CONCEPTS.num_concepts, (ROWS, TOKENS, 2), generator=generator)
    out = model(*inputs, targets)
    return out.loss_ntp + out.loss_concept


@pytest.mark.parametrize("how", MODES[1:])
@pytest.mark.parametrize("objective", ["ntp", "cocomix"])
def test_losses_and_gradients_keep_every_bit(objective: str, how: Recompute) -> None:
    """Catches activations of another forward, a last block that reads other positions, a lost gradient."""
    models = [student(objective), student(objective)]
    recompute(models[1], models[1].plan, how)
    losses = [forward(model) for model in models]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(*losses)
    own, plain = (dict(model.named_parameters()) for model in reversed(models))
    assert own.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(_grad(own[name]), _grad(plain[name]))] == []


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def kept_streams(how: Recompute, read: slice | None) -> float:
    """What one block keeps beside its input, in units of that input."""
    model = student("ntp")
    recompute(model, model.plan, how)
    with Meter() as meter:
        x = torch.randn(ROWS, TOKENS, SIZES.d_model).requires_grad_()
        model.blocks[0](x, read)  # the weights are known from here on
        before = meter.alive
        out = model.blocks[0](x, read)
        kept = meter.alive - before - out.nbytes
    return kept / x.nbytes


def test_less_is_kept() -> None:
    """Catches activations that stay alive although they are recomputed, or results that nobody reads.

    Everything: two norms, queries, keys, values, their mixture, the residual between the sublayers and the
    inner width twice; selective: neither norms nor gelu. The rest are statistics.
    """
    everything, selective, full = (kept_streams(how, None) for how in MODES)
    assert (int(everything), int(selective), full) == (2 + 3 + 1 + 1 + 2 * 4, 3 + 1 + 1 + 4, 0)
    # Half of the positions have queries and an MLP.
    everything, selective, full = (kept_streams(how, slice(1, None, 2)) for how in MODES)
    assert (int(2 * selective), full) == (2 * 2 + 1 + 1 + 1 + 4, 0)
    assert everything > selective + 2.5


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def backward_work(objective: str, how: Recompute) -> tuple[int, int]:
    """FLOPs of products, and forward passes of attention, in one backward."""
    model = student(objective)
    recompute(model, model.plan, how)
    loss = forward(model)
    # The FLOP counter does not know a CPU's attention.
    with FlopCounterMode(display=False) as counter, Calls() as calls:
        loss.backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops(), calls.count["aten::_scaled_dot_product_flash_attention_for_cpu"]


def test_only_what_is_meant_to_runs_again() -> None:
    """Catches products that selective repeats, and a full recomputation beyond the last activation."""
    blocks, square = SIZES.n_layer, 2 * ROWS * TOKENS * SIZES.d_model**2
    for objective, repeated in (
        # Queries, keys, values, projection and the MLP's first product.
        ("ntp", blocks * (3 + 1 + 4)),
        # Two blocks below, one over twice the positions, and the last one: keys and values at all of them.
        ("cocomix", 2 * (3 + 1 + 4) + 2 * (3 + 1 + 4) + 2 * 2 + (1 + 1 + 4)),
    ):
        flops, attentions = backward_work(objective, "none")
        assert attentions == 0
        assert backward_work(objective, "selective") == (flops, 0)
        assert backward_work(objective, "full") == (flops + repeated * square, blocks)


def test_products_by_onednn_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches products that selective repeats where an operation asks for its inputs after it has run."""
    monkeypatch.setattr(trainer.kernels.matmul, "_SMALLEST", 0)
    counts, gradients = [], []
    for how in MODES:
        model = student("cocomix")
        recompute(model, model.plan, how)
        loss = forward(model)
        with Calls() as calls:
            loss.backward()  # type: ignore[no-untyped-call]
        counts.append(calls.count["mkldnn::_linear_pointwise"])
        gradients.append([_grad(parameter) for parameter in model.parameters()])
    assert counts[0] == counts[1] > 0
    assert counts[2] == counts[0] + 3 * 4 + 5  # all products of three blocks and of the last one
    assert all(map(torch.equal, gradients[1], gradients[0]))
    assert all(map(torch.equal, gradients[2], gradients[0]))


# Microbatches of 2 and 1 rows on each data-parallel rank.
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "fsdp2": (2, 6, {}),
    "hsdp2x2": (4, 12, {"parallel__dp_replicate": 2}),
    "fsdp2xtp2": (4, 6, {"parallel__tp": 2}),
}


def train(
    config: RunConfig, world: World, steps: int
) -> tuple[list[dict[str, float]], dict[str, int], dict[str, Tensor]]:
    """Sums and gradient norm of some steps, collectives of the last one, and the weights after it."""
    torch.set_num_threads(1)
    parts = build_parts(config, world)
    metrics = StepMetrics(parts.objective.means, world.device)
    history = []
    for _ in range(steps):
        with Calls() as calls:
            norm = train_step(
                parts.engine,
                parts.objective,
                parts.mesh,
                next(parts.loader),
                step=0,
                microbatch_size=config.train.microbatch_size,
                tokens_per_step=config.tokens_per_step,
                lr=1e-2,
                metrics=metrics,
                usage=None,
                detail=True,
            )
        means = metrics.reduce(partial(sum_over_ranks, mesh=parts.mesh))
        history.append({name: value.item() for name, value in {**means, "norm": norm}.items()})
    counts = {op: count for op, count in calls.count.items() if "c10d" in op and "wait" not in op}
    weights = parts.engine.gather()
    parts.engine.close()
    return history, counts, weights


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_recomputes_the_same_run(layout: str, tiny_world: Path, tmp_path: Path) -> None:
    """Catches weights that are freed when a block is recomputed, and collectives that ranks do not share."""
    num_ranks, batch_size, changes = LAYOUTS[layout]

    def all_modes(world: World) -> list[Any]:
        return [
            train(
                tiny_config(
                    tiny_world,
                    tmp_path / "run",
                    train__batch_size=batch_size,
                    parallel__recompute=how,
                    parallel__reshard_after_forward="always",
                    **changes,
                ),
                world,
                steps=3,
            )
            for how in MODES
        ]

    results = run_ranks(all_modes, num_ranks, timeout_s=120)
    for (history, counts, weights), *others in results:
        for how, other in zip(MODES[1:], others, strict=True):
            assert other[0] == history
            assert all(torch.equal(other[2][name], weights[name]) for name in weights)
            again = {op: other[1][op] - count for op, count in counts.items() if other[1][op] != count}
            # Three blocks in two microbatches: attention gathers and sums, the MLP gathers.
            repeated = {"all_gather_into_tensor": 2 * 3 * 2, "reduce_scatter_tensor": 2 * 3}
            expected = repeated if how == "full" and "tp" in layout else {}
            assert {op.rpartition("::")[2]: count for op, count in again.items()} == expected


@pytest.mark.dist
@pytest.mark.usefixtures("deepspeed_before_forks")
def test_zero_recomputes_the_same_run(tiny_world: Path, tmp_path: Path) -> None:
    """Catches weights that stage 3 has partitioned again when a block is recomputed."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    zero = {"parallel__engine": "deepspeed", "parallel__zero_stage": 3}

    def all_modes(world: World) -> list[Any]:
        configs = (
            tiny_config(tiny_world, tmp_path / "run", parallel__recompute=how, **zero) for how in MODES
        )
        return [train(config, world, steps=2)[::2] for config in configs]

    for plain, *others in run_ranks(all_modes, 2):
        for other in others:
            assert other[0] == plain[0]
            assert all(torch.equal(other[1][name], plain[1][name]) for name in plain[1])


def test_an_autoencoder_has_nothing_to_recompute(tiny_world: Path, tmp_path: Path) -> None:
    """Catches a switch that is silently ignored."""
    for key, value in (("recompute", "full"), ("prefetch", 1), ("reshard_after_forward", "always")):
        with pytest.raises(ValueError, match=f"parallel.{key}={value} must be .* objective.name=sae"):
            tiny_config(tiny_world, tmp_path / "run", "sae", **{f"parallel__{key}": value})
