"""From a configuration to the parts of a run. Everything that can be wrong is refused here, before step 1."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data.joint import join_labels
from data.label_cache import LabelCache
from data.limits import SourceUse, planned_use
from data.loader import TokenLoader
from data.manifest import Manifest
from data.source import open_source
from parallel.apply import apply_parallel, change_forward, materialize, tensor_group
from parallel.compile import compile_units
from parallel.engine import Engine, FsdpEngine
from parallel.mesh import Mesh, build_mesh, replica_mesh
from parallel.tensor import TensorGroup
from parallel.world import World
from parallel.zero import ZeroEngine
from trainer.concepts.cache import open_labels
from trainer.concepts.extractor import TargetExtractor, check_vocabulary, load_teacher, shard_teacher
from trainer.concepts.sae import TopKSae
from trainer.concepts.sae_training import SaeLearner, init_sae_parameter
from trainer.concepts.states import DistributionExtractor, StateExtractor
from trainer.config import RegressionInsertion, RunConfig
from trainer.flops import FlopsPerToken, SaeShape, TeacherShape, flops_per_token, sae_flops_per_token
from trainer.model.formats import Layout
from trainer.model.gpt2 import GPT2
from trainer.model.init import initial_value
from trainer.model.padding import PADDING
from trainer.model.student import build_student
from trainer.objective import CoCoMixLoss, DistillationLoss, NextToken, Objective, RegressionLoss, SaeLoss
from trainer.optim import build_optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one run on one rank."""

    world: World
    mesh: Mesh
    manifest: Manifest
    planned: list[SourceUse]
    """What the whole run trains on, by source."""
    labels: dict[str, LabelCache]
    """Stored targets of all windows by source, where the run reads them; else empty."""
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
    manifests = [open_source(part).manifest for part in config.data.by_source.values()]
    manifest = manifests[0]  # tokenizer and dtype are those of every source, see below
    _check_vocabulary(config, manifest)
    _check_tensor_parallel(config)
    planned = planned_use(config.data, manifests, config.train.batch_size, config.train.steps)
    labels = _open_labels(config, manifests, world)
    model, objective, flops = _build_objective(config, world, mesh, manifest)
    engine = _build_engine(config, mesh, model, world.device)
    loader = TokenLoader(
        config.data,
        rows_per_step=config.train.batch_size,
        rank=mesh.dp_rank,
        world_size=mesh.dp_size,
        pin_memory=world.device.type == "cuda",
        labels=join_labels(list(labels.values())),
    )
    return Parts(world, mesh, manifest, planned, labels, loader, objective, engine, flops)


def _open_labels(config: RunConfig, manifests: list[Manifest], world: World) -> dict[str, LabelCache]:
    """The stored targets that a run reads; none where it computes its targets or has none."""
    concepts = config.predicted_concepts
    if concepts is None or not config.reads_labels:
        return {}
    labels = dict(zip(config.data.by_source, open_labels(concepts, config.data, manifests), strict=True))
    places = ", ".join(cache.place for cache in labels.values())
    for key, path in (("concepts.teacher", concepts.teacher), ("concepts.sae", concepts.sae)):
        if world.is_main and not Path(path).exists():
            logger.warning("%s=%s is not there: %s is taken on trust", key, path, places)
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
            f"the vocabulary of the tokens in {config.data.place}"
        )


def _build_objective(
    config: RunConfig, world: World, mesh: Mesh, manifest: Manifest
) -> tuple[nn.Module, Objective, FlopsPerToken]:
    """Model on the meta device, its objective and the FLOPs per token."""
    if config.objective.name == "sae":
        return _build_sae(config, world, mesh, manifest)
    assert config.model is not None
    with torch.device("meta"):
        student = build_student(config.model, config.insertion)
    end_id = document_end(config, manifest)
    objective, teacher, sae = _build_loss(config, world.device, tensor_group(mesh), end_id)
    if teacher is not None:
        ((key, path), *_) = config.frozen_models.items()
        check_vocabulary(teacher, manifest.tokenizer.vocab_size, config.data.seq_len, path, key=key)
        if config.parallel.compile:
            compile_units(teacher, teacher.plan)
        if config.parallel.shard_teacher:
            shard_teacher(teacher, replica_mesh(mesh, world), backward=config.differentiates_teacher)
    flops = flops_per_token(
        config.model,
        config.insertion,
        config.data.seq_len,
        None if teacher is None else _shape(teacher),
        None if sae is None else SaeShape(sae.num_latents, sae.top_k),
        concept_loss=config.objective.concept_weight > 0,
    )
    return student, objective, flops


def document_end(config: RunConfig, manifest: Manifest) -> int | None:
    """The token between documents that do not see each other, ``None`` where they do."""
    return manifest.tokenizer.eot_id if config.data.mask_documents else None


def _build_loss(
    config: RunConfig, device: torch.device, tp: TensorGroup, end_id: int | None
) -> tuple[Objective, GPT2 | None, TopKSae | None]:
    """What a language model minimises, with the frozen models that it reads."""
    objective, concepts, insertion = config.objective, config.concepts, config.insertion
    if objective.name == "kd":
        assert config.model is not None
        assert config.kd is not None
        distribution = DistributionExtractor.load(config.kd, config.model.vocab_size, device, tp)
        return DistillationLoss(distribution, end_id), distribution.teacher, None
    if concepts is None or not (config.frozen_models or config.reads_labels):
        return NextToken(end_id), None, None
    weighting = (objective, config.train.steps, concepts.every, end_id)
    if config.reads_labels:
        return CoCoMixLoss(None, *weighting), None, None
    if isinstance(insertion, RegressionInsertion):
        states = StateExtractor.load(concepts, device, tp)
        return RegressionLoss(states, *weighting), states.teacher, None
    extractor = TargetExtractor.load(concepts, device, tp, shard_sae=config.parallel.shard_sae)
    ahead_on = device if concepts.ahead else None
    return CoCoMixLoss(extractor, *weighting, ahead_on=ahead_on), extractor.teacher, extractor.sae


def _shape(teacher: GPT2) -> TeacherShape:
    sizes = teacher.config
    return TeacherShape(sizes.d_model, sizes.n_layer, sizes.vocab_size)


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
    vocab_size, path = manifest.tokenizer.vocab_size, config.sae.teacher
    check_vocabulary(teacher, vocab_size, config.data.seq_len, path, key="sae.teacher")
    flops = sae_flops_per_token(config.sae, _shape(teacher), config.data.seq_len)
    learner = SaeLearner(teacher.config.d_model, config.sae, device="meta")
    end_id = document_end(config, manifest)
    objective = SaeLoss(teacher, config.sae.layer, config.tokens_per_step, tensor_group(mesh), end_id)
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
