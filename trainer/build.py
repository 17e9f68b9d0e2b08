"""From a configuration to the parts of a run. Everything that can be wrong is refused here, before step 1."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data.label_cache import LabelCache
from data.loader import TokenLoader
from data.manifest import Manifest
from data.source import open_source
from parallel.apply import apply_parallel, change_forward, materialize, tensor_group
from parallel.compile import compile_units
from parallel.engine import Engine, FsdpEngine
from parallel.mesh import Mesh, build_mesh, replica_mesh
from parallel.world import World
from parallel.zero import ZeroEngine
from trainer.concepts.cache import open_labels
from trainer.concepts.extractor import TargetExtractor, check_vocabulary, load_teacher, shard_teacher
from trainer.concepts.sae_training import SaeLearner, init_sae_parameter
from trainer.config import RunConfig
from trainer.flops import FlopsPerToken, SaeShape, TeacherShape, flops_per_token, sae_flops_per_token
from trainer.model.cocomix import CoCoMix
from trainer.model.formats import Layout
from trainer.model.gpt2 import GPT2
from trainer.model.init import initial_value
from trainer.model.padding import PADDING
from trainer.objective import CoCoMixLoss, NextToken, Objective, SaeLoss
from trainer.optim import build_optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one run on one rank."""

    world: World
    mesh: Mesh
    manifest: Manifest
    labels: LabelCache | None
    """Stored targets of all windows, where the run reads them."""
    loader: TokenLoader
    objective: Objective
    engine: Engine
    flops: FlopsPerToken


def build_parts(config: RunConfig, world: World) -> Parts:
    """Build everything a run needs; a collective over all ranks.

    Raises:
        ValueError: parts do not fit together; the message names the key.
        DataError: the shard folder is missing, damaged or unfit.
        FileNotFoundError: no teacher or SAE at its path.
    """
    mesh = build_mesh(config.parallel, world)
    _check_batch(config, mesh)
    manifest = open_source(config.data).manifest
    _check_vocabulary(config, manifest)
    _check_tensor_parallel(config)
    labels = _open_labels(config, manifest, world)
    model, objective, flops = _build_objective(config, world, mesh, manifest)
    engine = _build_engine(config, mesh, model, world.device)
    loader = TokenLoader(
        config.data,
        rows_per_step=config.train.batch_size,
        rank=mesh.dp_rank,
        world_size=mesh.dp_size,
        pin_memory=world.device.type == "cuda",
        labels=labels,
    )
    return Parts(world, mesh, manifest, labels, loader, objective, engine, flops)


def _open_labels(config: RunConfig, manifest: Manifest, world: World) -> LabelCache | None:
    """The stored targets that a run reads, or None where it computes its targets or has none."""
    concepts = config.concepts
    if config.objective.name != "cocomix" or concepts is None or concepts.source != "cache":
        return None
    labels = open_labels(concepts, config.data, manifest)
    for key, path in (("concepts.teacher", concepts.teacher), ("concepts.sae", concepts.sae)):
        if world.is_main and not Path(path).exists():
            logger.warning("%s=%s is not there: %s is taken on trust", key, path, labels.place)
    return labels


def _check_batch(config: RunConfig, mesh: Mesh) -> None:
    if config.train.batch_size % mesh.dp_size:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} must be a multiple of the "
            f"{mesh.dp_size} data-parallel ranks"
        )


def _check_tensor_parallel(config: RunConfig) -> None:
    tp = config.parallel.tp
    if PADDING % tp:
        raise ValueError(f"parallel.tp={tp} must divide {PADDING}, the padding of vocabulary and dictionary")
    if config.objective.name != "sae" and config.data.seq_len % tp:
        raise ValueError(f"parallel.tp={tp} must divide data.seq_len={config.data.seq_len}")


def _check_vocabulary(config: RunConfig, manifest: Manifest) -> None:
    vocab_size = manifest.tokenizer.vocab_size
    if config.model is not None and config.objective.name != "sae" and vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be at least {vocab_size}, "
            f"the vocabulary of the tokens in {config.data.dir}"
        )


def _build_objective(
    config: RunConfig, world: World, mesh: Mesh, manifest: Manifest
) -> tuple[nn.Module, Objective, FlopsPerToken]:
    """Model on the meta device, its objective and the FLOPs per token."""
    if config.objective.name == "sae":
        return _build_sae(config, world, mesh, manifest)
    assert config.model is not None
    seq_len = config.data.seq_len
    with torch.device("meta"):
        student = empty_student(config)
    if config.objective.name == "ntp":
        return student, NextToken(), flops_per_token(config.model, None, seq_len)
    assert config.concepts is not None
    with torch.device("meta"):
        student = CoCoMix(config.model, config.concepts)
    if config.concepts.source == "cache":
        flops = flops_per_token(config.model, config.concepts, seq_len)
        return student, CoCoMixLoss(None, config.objective.concept_weight), flops
    extractor = TargetExtractor.load(
        config.concepts, world.device, tensor_group(mesh), shard_sae=config.parallel.shard_sae
    )
    if config.parallel.compile:
        compile_units(extractor.teacher, extractor.teacher.plan)
    if config.parallel.shard_teacher:
        shard_teacher(extractor.teacher, replica_mesh(mesh, world), backward=True)
    sizes = extractor.teacher.config
    check_vocabulary(extractor.teacher, manifest.tokenizer.vocab_size, seq_len, config.concepts.teacher)
    flops = flops_per_token(
        config.model,
        config.concepts,
        seq_len,
        TeacherShape(sizes.d_model, sizes.n_layer, sizes.vocab_size),
        SaeShape(extractor.sae.num_latents, extractor.sae.top_k),
    )
    ahead_on = world.device if config.concepts.ahead else None
    return student, CoCoMixLoss(extractor, config.objective.concept_weight, ahead_on), flops


def empty_student(config: RunConfig) -> GPT2:
    """The language model that a run trains, without values, on the default device."""
    assert config.model is not None
    if config.objective.name == "ntp":
        return GPT2(config.model)
    assert config.concepts is not None
    return CoCoMix(config.model, config.concepts)


def _build_sae(
    config: RunConfig, world: World, mesh: Mesh, manifest: Manifest
) -> tuple[nn.Module, Objective, FlopsPerToken]:
    assert config.sae is not None
    teacher = load_teacher(config.sae.teacher, config.sae.layer, key="sae.layer")
    teacher.to(world.device, torch.float32)
    if config.parallel.compile:
        compile_units(teacher, teacher.plan)
    if config.parallel.shard_teacher:
        shard_teacher(teacher, replica_mesh(mesh, world), backward=False)
    check_vocabulary(teacher, manifest.tokenizer.vocab_size, config.data.seq_len, config.sae.teacher)
    sizes = teacher.config
    flops = sae_flops_per_token(
        config.sae, TeacherShape(sizes.d_model, sizes.n_layer, sizes.vocab_size), config.data.seq_len
    )
    learner = SaeLearner(sizes.d_model, config.sae, device="meta")
    objective = SaeLoss(teacher, config.sae.layer, config.tokens_per_step, tensor_group(mesh))
    return learner, objective, flops


def _build_engine(config: RunConfig, mesh: Mesh, model: nn.Module, device: torch.device) -> Engine:
    assert isinstance(model, GPT2 | SaeLearner)
    init = _initial_values(config, model)
    if config.parallel.engine == "deepspeed":
        change_forward(model, model.plan, config.parallel)
        return ZeroEngine(
            model,
            partial(build_optimizer, config=config.optim),
            init,
            mesh,
            config.parallel,
            precision=config.train.precision,
            clip_norm=config.optim.clip_norm,
            device=device,
        )
    apply_parallel(model, model.plan, mesh, config.parallel, config.train.precision)
    materialize(model, device, init, offload=config.parallel.offload_parameters)
    return FsdpEngine(model, build_optimizer(model, config.optim), mesh, config.optim.clip_norm)


def _initial_values(
    config: RunConfig, model: GPT2 | SaeLearner
) -> Callable[[str, torch.Size, torch.dtype], Tensor]:
    """Initial weights by name: the same for every engine and layout."""
    if isinstance(model, SaeLearner):
        return partial(init_sae_parameter, seed=config.run.seed, num_latents=model.sae.num_latents)
    assert config.model is not None
    return partial(
        initial_value,
        seed=config.run.seed,
        n_layer=config.model.n_layer,
        real_rows=Layout.of(model).real_rows,
    )
