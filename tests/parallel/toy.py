"""A small causal language model with the traits that sharding can get wrong, and a run of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.apply import Precision, apply_parallel, materialize
from parallel.collectives import sum_over_ranks
from parallel.config import ParallelConfig
from parallel.engine import FsdpEngine
from parallel.mesh import Mesh, build_mesh
from parallel.plan import ParallelPlan
from parallel.world import World
from parallel.zero import ZeroEngine

VOCAB, WIDTH, LAYERS, HEADS, TOKENS, ROWS = 17, 6, 2, 2, 5, 12
"""No shard count of 2, 3 or 4 divides both 17 and 6, and the scale's 2 rows leave ranks without any."""

CLIP_NORM = 0.2

PLAN = ParallelPlan(fsdp_units=tuple(f"blocks.{index}" for index in range(LAYERS)))


class ToyBlock(nn.Module):
    """Pre-norm causal attention and MLP; ``dtypes`` records what came in and went out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.dtypes: list[tuple[torch.dtype, torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D), residual stream."""
        normed = self.norm(x.to(self.norm.weight.dtype))
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(normed).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        out = x + self.mlp(torch.tanh(mixed))
        self.dtypes.append((x.dtype, out.dtype))
        return out


class ToyModel(nn.Module):
    """Weights of its own in the root (a dict, tied head), blocks as units, both kinds of buffers."""

    mask: Tensor
    scale_steps: Tensor

    def __init__(self, residual_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                "embedding": nn.Parameter(torch.empty(VOCAB, WIDTH)),
                "scale": nn.Parameter(torch.empty(2)),
            }
        )
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(LAYERS))
        self.register_buffer("scale_steps", torch.empty(3))
        self.register_buffer("mask", torch.empty(2), persistent=False)
        self.residual_dtype = residual_dtype

    def reset_buffers(self) -> None:
        """Fill what no checkpoint holds."""
        self.mask.fill_(1.0)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss of input_ids, labels: (B, T)."""
        x = F.embedding(input_ids, self.weights["embedding"])
        x = x.to(self.residual_dtype or x.dtype)
        for block in self.blocks:
            x = block(x)
        scale = self.weights["scale"].float() * self.mask
        logits = (x.to(self.weights["embedding"].dtype) @ self.weights["embedding"].T).float() * scale.sum()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def init_weight(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A weight that depends on its name and shape alone."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return 0.3 * torch.randn(shape, generator=generator, dtype=dtype)


def tokens_of(step: int) -> Tensor:
    """The global batch (ROWS, T+1) of one step."""
    return torch.randint(0, VOCAB, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(step))


@dataclass
class ToyRun:
    """A model and its engine on the ranks of ``world``."""

    world: World
    config: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Precision = "fp32"
    clip_norm: float = CLIP_NORM
    betas: tuple[float, float] = (0.9, 0.95)
    init: Callable[[str, torch.Size, torch.dtype], Tensor] = init_weight
    residual_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.mesh: Mesh = build_mesh(self.config, self.world)
        with torch.device("meta"):
            self.model = ToyModel(self.residual_dtype)
        self.engine: FsdpEngine | ZeroEngine
        if self.config.engine == "deepspeed":
            self.engine = ZeroEngine(
                self.model,
                self.build_optimizer,
                self.init,
                self.mesh,
                self.config,
                precision=self.precision,
                clip_norm=self.clip_norm,
                device=self.world.device,
            )
        else:
            apply_parallel(self.model, PLAN, self.mesh, self.config, self.precision)
            materialize(self.model, self.world.device, self.init, offload=self.config.offload_parameters)
            self.engine = FsdpEngine(self.model, self.build_optimizer(self.model), self.mesh, self.clip_norm)

    def build_optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """Fused AdamW; matrices are decayed."""
        return torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=self.betas,
            fused=True,
        )

    def microbatches(self, step: int) -> tuple[Tensor, ...]:
        """This rank's rows of one step in pieces of 2; the last one may be short."""
        return tokens_of(step).chunk(self.mesh.dp_size)[self.mesh.dp_rank].split(2)

    def accumulate(self, step: int) -> Tensor:
        """Forward and backward of one step; returns the global loss, mean over tokens in nats."""
        rows = self.microbatches(step)
        total = torch.zeros(())
        for index, tokens in enumerate(rows):
            loss = self.engine.model(tokens[:, :-1], tokens[:, 1:]) / (ROWS * TOKENS)
            self.engine.backward(loss, last_microbatch=index == len(rows) - 1)
            total += loss.detach()
        return sum_over_ranks(total, self.mesh)

    def train(self, first: int, last: int, lr: float = 1e-2) -> list[tuple[float, float]]:
        """Steps ``first`` to ``last - 1``; returns (loss, gradient norm) of each."""
        return [(self.accumulate(step).item(), self.engine.step(lr).item()) for step in range(first, last)]

    def validate(self) -> float:
        """A forward without backward, which leaves the root's weights gathered."""
        with torch.no_grad():
            tokens = tokens_of(999)
            loss: Tensor = self.engine.model(tokens[:, :-1], tokens[:, 1:])
        return loss.item()

    def save(self, folder: Path) -> None:
        """Write the engine's state."""
        dcp.save(self.engine.state_dict(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        state = self.engine.state_dict()
        dcp.load(state, checkpoint_id=folder)
        self.engine.load_state_dict(state)

    def whole(self) -> dict[str, Tensor]:
        """All weights and all of the optimizer's state as whole tensors, on rank 0."""
        whole = {f"model.{name}": tensor for name, tensor in self.engine.gather().items()}
        for name, state in self.engine.state_dict()["optimizer"].items():
            for key, value in state.items():
                whole[f"optimizer.{name}.{key}"] = _whole(value)
        return whole if self.world.is_main else {}


def _whole(value: Any) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Same names and the same bits."""
    assert first.keys() == second.keys() and first
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different, f"differ: {different}"
