"""The oracle against the golden numbers of the authors' code, and the path that trains against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import agreement
from benchmarks.agreement import Disagreement
from benchmarks.dense_step import dense_extractor
from benchmarks.reference_dense import (
    DenseCoCoMix,
    DenseGPT2,
    Targets,
    cocomix_loss,
    concept_loss,
    next_token_loss,
)
from data.batch import Batch
from tests.trainer.model.tiny import tiny_cocomix, tiny_gpt2
from trainer.concepts.extractor import TargetExtractor
from trainer.concepts.sae import TopKSae
from trainer.config import ObjectiveConfig
from trainer.model.cocomix import CoCoMix
from trainer.model.formats import Layout, to_hf
from trainer.objective import CoCoMixLoss, split_tokens
from trainer.verify import read_golden

GOLDEN = Path(__file__).parents[1] / "golden"


def dense_student(model: CoCoMix) -> DenseCoCoMix:
    weights = {
        name: weight.clone().requires_grad_()
        for name, weight in to_hf(model.state_dict(), Layout.of(model)).items()
    }
    sizes = model.config
    trunk = DenseGPT2(weights, sizes.n_layer, sizes.n_head, sizes.layer_norm_eps)
    return DenseCoCoMix(trunk, model.insert_layer, model.mixer.top_k)


def test_the_oracle_computes_what_the_authors_do() -> None:
    """Catches an oracle that is wrong: every comparison with it would be one of two errors."""
    golden = read_golden(GOLDEN)
    expected = golden.expected
    dense = dense_extractor(TargetExtractor(golden.teacher, golden.sae, golden.concepts))
    targets = dense(golden.input_ids, golden.labels)
    near: dict[str, Any] = {"atol": 2e-5, "rtol": 0}
    torch.testing.assert_close(targets.residual, expected["teacher.resid_hf"], **near)
    torch.testing.assert_close(targets.loss / golden.num_labels, expected["teacher.loss"], **near)
    torch.testing.assert_close(targets.gradient / golden.num_labels, expected["teacher.resid_grad"], **near)
    torch.testing.assert_close(targets.latents, expected["sae.latents"], **near)
    torch.testing.assert_close(targets.attribution / golden.num_labels, expected["attribution"], **near)
    real = expected["target_attribution"] > 0
    assert torch.equal(targets.ids[real], expected["targets"][real])

    student = dense_student(golden.student)
    out = student(golden.input_ids)
    torch.testing.assert_close(out.logits, expected["student.logits"], **near)
    torch.testing.assert_close(out.concept_logits, expected["student.concept_logits"], **near)
    ntp = next_token_loss(out.logits, golden.labels) / golden.num_labels
    concept = concept_loss(out.concept_logits, expected["targets"]) / golden.input_ids.numel()
    torch.testing.assert_close(ntp, expected["student.loss_ntp"], **near)
    torch.testing.assert_close(concept, expected["student.loss_concept"], **near)
    (ntp + golden.concept_weight * concept).backward()
    compared = 0
    for name, weight in student.trunk.weights.items():
        if f"grad.{name}" in expected:
            wanted = expected[f"grad.{name}"]
            assert (weight.grad - wanted).norm() <= 1e-4 * wanted.norm(), name
            compared += 1
    assert compared == 8


def extractor_for(student: CoCoMix) -> TargetExtractor:
    teacher = tiny_gpt2(seed=5, n_layer=4, d_model=24).requires_grad_(False)
    sae = TopKSae(24, student.mixer.num_concepts, student.mixer.top_k).requires_grad_(False)
    generator = torch.Generator().manual_seed(9)
    for weight in sae.parameters():
        weight.normal_(0, 0.3, generator=generator)
    return TargetExtractor(teacher, sae, student.insertion)  # type: ignore[arg-type]


@pytest.mark.parametrize("insert_layer", [1, 2])
def test_the_path_that_trains_equals_the_oracle(insert_layer: int) -> None:
    """Catches any difference in target ids, and one beyond 1e-5 of its norm in any parameter's gradient."""
    student = tiny_cocomix(insert_layer=insert_layer, seed=insert_layer)
    extractor = extractor_for(student)
    tokens = torch.randint(61, (3, 21), generator=torch.Generator().manual_seed(3))
    batch = Batch(tokens.int(), len(tokens))
    input_ids, labels = split_tokens(batch)[:2]
    found = dense_extractor(extractor)(input_ids, labels)
    assert torch.equal(extractor(input_ids, labels), found.ids)
    assert (found.ids >= 0).any(-1).float().mean() > 0.5, "nothing would be compared"

    config = ObjectiveConfig(name="cocomix", concept_weight=0.3)
    terms = CoCoMixLoss(extractor, config, total_steps=1)(student, batch, step=0, detail=False)
    terms.loss.backward()
    dense = dense_student(student)
    loss = cocomix_loss(dense, input_ids, labels, found.ids, 0.3)
    loss.backward()
    assert terms.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    ours = to_hf(gradients, Layout.of(student))
    assert ours.keys() == dense.trunk.weights.keys()
    for name, weight in dense.trunk.weights.items():
        assert (ours[name] - weight.grad).norm() <= 1e-5 * weight.grad.norm(), name


def dense_targets(ids: list[int], attribution: list[float]) -> Targets:
    row = torch.tensor(attribution).view(1, 1, -1)
    return Targets(torch.tensor(ids).view(1, 1, -1), row, row, row, row, row.sum())


def ids(*values: int) -> Tensor:
    return torch.tensor(values).view(1, 1, -1)


def test_only_a_tie_excuses_another_target() -> None:
    """Catches a comparison that lets a wrong id pass, or refuses the order of equal attributions."""
    dense = dense_targets([2, 0], [1.0, 0.5, 1.0 + 1e-7, 0.0])
    assert agreement.check_targets(ids(2, 0), dense) == 1.0
    assert agreement.check_targets(ids(0, 2), dense) == 0.0
    for wrong in (ids(2, 1), ids(2, -1), ids(3, 0)):
        with pytest.raises(Disagreement, match="1 of 2 target ids"):
            agreement.check_targets(wrong, dense)
    agreement.check_close("loss", 1.0, 1.0 + 1e-7, 1e-6)
    for value in (1.1, float("nan")):
        with pytest.raises(Disagreement, match="the loss is"):
            agreement.check_close("the loss", value, 1.0, 1e-6)
