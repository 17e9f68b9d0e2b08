"""Tokens to targets through the published files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from parallel.tensor import TensorGroup
from tests.trainer.model.tiny import tiny_gpt2
from tests.trainer.tiny_run import tiny_config
from trainer.concepts.attribution import attribution, residual_and_gradient
from trainer.concepts.extractor import (
    MAX_PACKED_ID,
    TargetExtractor,
    check_vocabulary,
    load_teacher,
    pack_ids,
    unpack_ids,
)
from trainer.config import ConceptsConfig
from trainer.kernels.reference import IGNORED_LABEL, MASKED_TARGET
from trainer.model.formats import save_model

CPU = torch.device("cpu")


def _config(tiny_world: Path, **changes: object) -> ConceptsConfig:
    named = {f"concepts__{key}": value for key, value in changes.items()}
    config = tiny_config(tiny_world, tiny_world / "unused", **named)
    assert config.concepts is not None
    return config.concepts


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 290, (3, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def test_targets_do_not_depend_on_the_rows_beside_them(tiny_world: Path) -> None:
    """Catches a batch-wide normalisation: microbatch size must not change what is learned."""
    extractor = TargetExtractor.load(_config(tiny_world), CPU)
    input_ids, labels = _batch()
    together = extractor(input_ids, labels)
    alone = torch.cat([extractor(input_ids[i : i + 1], labels[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    assert together.shape == (3, 16, 3)
    assert together.dtype == torch.int64


def test_targets_are_the_best_positive_attributions(tiny_world: Path) -> None:
    """Catches an extractor that skips a step of the definition or masks the wrong entries."""
    extractor = TargetExtractor.load(_config(tiny_world), CPU)
    input_ids, labels = _batch()
    labels = labels.clone()
    labels[:, -1] = IGNORED_LABEL
    targets = extractor(input_ids, labels)
    residual = residual_and_gradient(extractor.teacher, input_ids, labels, 0)
    values, ids = extractor.sae.encode(residual.x)
    scores = attribution(residual.grad, values, ids, extractor.sae.decoder)
    dense = torch.full((3, 16, 37), -torch.inf).scatter_(-1, ids, scores)
    best = dense.topk(3, dim=-1)
    assert torch.equal(targets, best.indices.masked_fill(best.values <= 0, MASKED_TARGET))
    assert (targets[:, -1] == MASKED_TARGET).all()


def test_noise_labels_can_be_kept_as_the_authors_do(tiny_world: Path) -> None:
    """Catches an option without effect."""
    input_ids, labels = _batch()
    labels = labels.clone()
    labels[:, -1] = IGNORED_LABEL
    extractor = TargetExtractor.load(_config(tiny_world, mask_non_positive=False), CPU)
    assert (extractor(input_ids, labels) >= 0).all()


def test_extraction_leaves_no_trace_on_the_teacher(tiny_world: Path) -> None:
    """Catches gradients or a graph kept alive by the frozen teacher."""
    extractor = TargetExtractor.load(_config(tiny_world), CPU)
    targets = extractor(*_batch())
    assert not targets.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in extractor.teacher.parameters())


def test_bf16_teacher_mostly_agrees_with_fp32(tiny_world: Path) -> None:
    """Catches a dtype error in the bf16 path; selections near a tie may differ."""
    input_ids, labels = _batch()
    exact = TargetExtractor.load(_config(tiny_world), CPU)(input_ids, labels)
    fast = TargetExtractor.load(_config(tiny_world, precision="bf16"), CPU)(input_ids, labels)
    shared = (exact.unsqueeze(-1) == fast.unsqueeze(-2)).any(-1).float().mean()
    assert shared > 0.85


def test_unfit_teachers_are_refused(tiny_world: Path, tmp_path: Path) -> None:
    """Catches a teacher that reads tokens it has no embedding for, or an SAE of another width."""
    teacher = load_teacher(str(tiny_world / "teacher"), 0, key="concepts.sae_layer")
    with pytest.raises(ValueError, match=r"token ids up to 299 .* vocabulary of 290"):
        check_vocabulary(teacher, 300, 16, "teacher")
    with pytest.raises(ValueError, match=r"data.seq_len=17 must be at most 16"):
        check_vocabulary(teacher, 290, 17, "teacher")
    other = tiny_gpt2(d_model=16, vocab_size=290)
    save_model(tmp_path / "wide", other.state_dict(), other.config, None)
    with pytest.raises(ValueError, match="16"):
        TargetExtractor.load(_config(tiny_world, teacher=str(tmp_path / "wide")), CPU)


def test_packed_ids_survive_up_to_their_bound() -> None:
    """Catches ids above 32,767 that come back negative, and a mask that becomes an id."""
    ids = torch.tensor([[0, 32767, 32768, MAX_PACKED_ID, MASKED_TARGET]])
    assert torch.equal(unpack_ids(pack_ids(ids)), ids)
    assert pack_ids(ids).numel() == 2 * ids.numel()


def test_a_dictionary_too_large_for_two_bytes_is_refused_under_tensor_parallelism(tiny_world: Path) -> None:
    """Catches ids that wrap around silently on their way between ranks."""
    loaded = TargetExtractor.load(_config(tiny_world), CPU)
    config = dataclasses.replace(loaded.config, num_concepts=MAX_PACKED_ID + 2)
    group = TensorGroup()
    TargetExtractor(loaded.teacher, loaded.sae, config, group)
    group.size = 2
    with pytest.raises(ValueError, match=r"num_concepts=65536 must be at most 65535 with parallel.tp=2"):
        TargetExtractor(loaded.teacher, loaded.sae, config, group)
