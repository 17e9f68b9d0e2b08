"""Students of the paper's sizes with a teacher and an autoencoder, all with random weights, on one device.

Built from the files in ``configs/`` by the code that trains, without data, checkpoints and torchtitan, which
one GPU needs for none of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from data.batch import Batch
from launch.planning.teacher import Teacher
from parallel.apply import apply_parallel, materialize
from parallel.engine import FsdpEngine
from parallel.mesh import Mesh
from parallel.world import World, start_world, stop_world
from trainer.concepts.extractor import TargetExtractor
from trainer.concepts.sae import TopKSae
from trainer.config import ConceptsConfig, ModelConfig, RunConfig
from trainer.config_io import load_config
from trainer.flops import FlopsPerToken, SaeShape, flops_per_token
from trainer.metrics.sums import ConceptUsage, StepMetrics
from trainer.model.cocomix import CoCoMix
from trainer.model.gpt2 import GPT2
from trainer.objective import CoCoMixLoss, NextToken, Objective
from trainer.optim import build_optimizer
from trainer.step import train_step

CONFIGS = Path(__file__).parents[1] / "configs"
Size = Literal["69m", "386m", "1b"]
Kind = Literal["ntp", "cocomix"]

_SMALL = (
    "--model.d_model=64",
    "--model.n_layer=3",
    "--model.n_head=2",
    "--model.vocab_size=500",
    "--data.seq_len=32",
)
_SMALL_CONCEPTS = (
    "--concepts.insert_layer=1",
    "--concepts.sae_layer=1",
    "--concepts.num_concepts=500",
)
_SMALL_TEACHER = Teacher(d_model=32, n_layer=3, n_head=2, vocab_size=500, n_positions=32)


def load_student(size: Size, kind: Kind, *, dry_run: bool, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration of a size; a tiny one of the same kind for a dry run."""
    name = size if kind == "cocomix" else f"{size}_ntp"
    small = (*_SMALL, *(_SMALL_CONCEPTS if kind == "cocomix" else ())) if dry_run else ()
    return load_config(RunConfig, CONFIGS / f"{name}.yaml", [*small, *overrides])


def teacher_sizes(*, dry_run: bool) -> Teacher:
    """GPT-2 124M."""
    return _SMALL_TEACHER if dry_run else Teacher()


@contextmanager
def one_process(device: Literal["auto", "cpu", "cuda"] = "cpu", threads: int = 1) -> Iterator[World]:
    """A world of one rank. By default it has one thread: threads that wait for each other cost CPU time."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield start_world(device, 600.0)
    finally:
        stop_world()
        torch.set_num_threads(before)


@dataclass(slots=True)
class Student:
    """A student that can be trained."""

    config: RunConfig
    device: torch.device
    mesh: Mesh
    engine: FsdpEngine
    objective: Objective
    metrics: StepMetrics
    usage: ConceptUsage | None
    flops: FlopsPerToken

    @property
    def vocab_size(self) -> int:
        """V."""
        assert self.config.model is not None
        return self.config.model.vocab_size

    def random_batch(self, num_rows: int, seed: int) -> Batch:
        """Random tokens (num_rows, T+1) on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (num_rows, self.config.data.seq_len + 1)
        tokens = torch.randint(0, self.vocab_size, shape, generator=generator, device=self.device)
        return Batch(tokens.int(), num_rows)

    def step(self, batch: Batch, microbatch_size: int, *, detail: bool = False) -> Tensor:
        """One optimizer step as in training; returns the gradient norm, on the device."""
        return train_step(
            self.engine,
            self.objective,
            self.mesh,
            batch,
            step=0,
            microbatch_size=microbatch_size,
            tokens_per_step=batch.num_rows * self.config.data.seq_len,
            lr=self.config.optim.lr,
            metrics=self.metrics,
            usage=self.usage,
            detail=detail,
        )


def build_student(config: RunConfig, device: torch.device, teacher: Teacher) -> Student:
    """Build a student on a device; the process group must exist."""
    assert config.model is not None
    concepts = config.concepts if config.objective.name == "cocomix" else None
    with torch.device("meta"):
        model = GPT2(config.model) if concepts is None else CoCoMix(config.model, concepts)
    mesh = _one_rank(device)
    apply_parallel(model, model.plan, mesh, config.parallel, config.train.precision)
    generator = torch.Generator(device).manual_seed(config.run.seed)
    materialize(model, device, partial(_random_value, generator=generator))
    optimizer = build_optimizer(model, config.optim)
    engine = FsdpEngine(model, optimizer, mesh, config.optim.clip_norm, clip=_clip_grad_norm_)
    objective = _objective(config, teacher, device, generator)
    flops = flops_per_token(
        config.model,
        concepts,
        config.data.seq_len,
        None if concepts is None else teacher.shape,
        None if concepts is None else SaeShape(concepts.num_concepts, concepts.top_k),
    )
    usage = None if concepts is None else ConceptUsage(concepts.num_concepts, device)
    metrics = StepMetrics(objective.means, device)
    return Student(config, device, mesh, engine, objective, metrics, usage, flops)


def _one_rank(device: torch.device) -> Mesh:
    return Mesh(
        dp_rank=0,
        dp_size=1,
        tp_rank=0,
        tp_size=1,
        fsdp=init_device_mesh(device.type, (1,), mesh_dim_names=("fsdp",)),
        dp_group=None,
        tp=None,
        ranks_per_node=1,
    )


def _clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _random_value(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """As the trainer's first weights are distributed, but drawn on the device, which is quick."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
    value = torch.empty(shape, dtype=dtype, device=generator.device)
    return value.normal_(0.0, 0.02, generator=generator)


def _objective(
    config: RunConfig, teacher: Teacher, device: torch.device, generator: torch.Generator
) -> Objective:
    concepts = config.concepts
    if config.objective.name == "ntp" or concepts is None:
        return NextToken()
    extractor = build_extractor(concepts, teacher, device, generator)
    ahead_on = device if concepts.ahead else None
    return CoCoMixLoss(extractor, config.objective, config.train.steps, ahead_on=ahead_on)


def build_extractor(
    concepts: ConceptsConfig, teacher: Teacher, device: torch.device, generator: torch.Generator
) -> TargetExtractor:
    """Teacher and autoencoder with random weights, in the precision of ``concepts``."""
    sizes = ModelConfig(
        d_model=teacher.d_model,
        n_layer=teacher.n_layer,
        n_head=teacher.n_head,
        vocab_size=teacher.vocab_size,
        n_positions=teacher.n_positions,
    )
    with torch.device("meta"):
        frozen = GPT2(sizes)
    sae = TopKSae(teacher.d_model, concepts.num_concepts, concepts.top_k, device="meta")
    for module in (frozen, sae):
        module.to_empty(device=device).requires_grad_(False)
        for name, parameter in module.named_parameters():
            parameter.copy_(_random_value(name, parameter.shape, parameter.dtype, generator))
    precision = torch.bfloat16 if concepts.precision == "bf16" else torch.float32
    return TargetExtractor(frozen.to(precision), sae, concepts)
