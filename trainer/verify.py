"""``python -m trainer.verify DIR``: recompute a golden directory through the code that trains.

A golden directory holds weights in the published formats, token ids and the numbers that a reference
implementation made from them (docs/equations.md). Every quantity gets one line with its largest
deviation; the exit code is 1 when one is out of tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data.cli import run_cli
from trainer.concepts.attribution import attribution, residual_and_gradient, select_targets
from trainer.concepts.sae import TopKSae
from trainer.concepts.sae_formats import check_fits, load_sae
from trainer.config import ConceptsConfig, ModelConfig
from trainer.kernels.reference import IGNORED_LABEL
from trainer.model.cocomix import CoCoMix
from trainer.model.formats import Layout, load_weights, read_tensors, to_hf
from trainer.model.gpt2 import GPT2

ABSOLUTE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Check:
    """One recomputed quantity: its largest deviation and how much is allowed."""

    name: str
    deviation: float
    tolerance: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the deviation is a number within the tolerance."""
        return self.deviation <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        return f"{verdict} {self.name:<52} {self.deviation:.2e} <= {self.tolerance:.0e} {self.unit}"


@dataclass(frozen=True, slots=True)
class Golden:
    """A golden directory, read and checked for shape."""

    teacher: GPT2
    sae: TopKSae
    student: CoCoMix
    concepts: ConceptsConfig
    concept_weight: float
    expected: Mapping[str, Tensor]

    @property
    def input_ids(self) -> Tensor:
        """(B, T) int64."""
        return self.expected["input_ids"]

    @property
    def labels(self) -> Tensor:
        """(B, T): the reference shifts inside T, so the last position has no next token."""
        return F.pad(self.input_ids[:, 1:], (0, 1), value=IGNORED_LABEL)

    @property
    def num_labels(self) -> int:
        """Positions that have a next token."""
        return int((self.labels != IGNORED_LABEL).sum())


def _size(config: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in config:
        raise ValueError(f"{path}: {key} is missing")
    return config[key]


def _model_config(config: Mapping[str, Any], part: Mapping[str, Any], path: Path) -> ModelConfig:
    if config.get("activation", "gelu_new") != "gelu_new":
        raise ValueError(f"{path}: activation={config['activation']} must be gelu_new")
    both = {**config, **part}
    sizes = ("d_model", "n_layer", "n_head", "vocab_size", "n_positions")
    return ModelConfig(
        **{key: _size(both, key, path) for key in sizes},
        layer_norm_eps=both.get("layer_norm_epsilon", 1e-5),
        tied_head=both.get("tied_lm_head", True),
    )


def read_golden(folder: Path) -> Golden:
    """Read config.json, weights and expected numbers; raises ``ValueError`` or ``FileNotFoundError``."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    concepts = ConceptsConfig(
        teacher="",
        sae="",
        sae_layer=_size(config, "sae_layer_index", path),
        insert_layer=_size(config, "insert_layer_index", path),
        num_concepts=_size(config, "concept_dim", path),
        top_k=_size(config, "concept_num", path),
        num_targets=_size(config, "k_attr", path),
    )
    teacher = GPT2(_model_config(config, _size(config, "teacher", path), path)).requires_grad_(False)
    student = CoCoMix(_model_config(config, {}, path), concepts)
    for model, name in ((teacher, "teacher"), (student, "student")):
        weights = folder / f"{name}.safetensors"
        load_weights(model, read_tensors(weights), str(weights))
    sae = load_sae(folder / "sae.pt")
    check_fits(sae, teacher.config.d_model, concepts.num_concepts)
    expected = read_tensors(folder / "expected.safetensors")
    for name in ("input_ids", "targets", "target_attribution"):
        if name not in expected:
            raise ValueError(f"{folder / 'expected.safetensors'}: {name} is missing")
    weight = _size(config, "lam_concept", path)
    return Golden(teacher, sae, student, concepts, weight, expected)


def _dense(values: Tensor, ids: Tensor, num_columns: int) -> Tensor:
    return values.new_zeros(*ids.shape[:-1], num_columns).scatter_(-1, ids, values)


def teacher_quantities(golden: Golden) -> dict[str, Tensor]:
    """Everything up to the targets: loss, residual, its gradient, latents, attribution, target ids."""
    layer, num_concepts = golden.concepts.sae_layer, golden.concepts.num_concepts
    residual = residual_and_gradient(golden.teacher, golden.input_ids, golden.labels, layer)
    grad = residual.grad / golden.num_labels
    values, ids = golden.sae.encode(residual.x)
    scores = attribution(grad, values, ids, golden.sae.decoder)
    return {
        "teacher.loss": residual.loss / golden.num_labels,
        "teacher.resid_hf": residual.x,
        "teacher.resid_centered": residual.x - residual.x.mean(-1, keepdim=True),
        "teacher.resid_grad": grad,
        "sae.latents": _dense(values, ids, num_concepts),
        "attribution": _dense(scores, ids, num_concepts),
        "targets": select_targets(scores, ids, golden.concepts.num_targets),
    }


def student_quantities(golden: Golden) -> dict[str, Tensor]:
    """Logits, losses and gradients of the student, with the reference's targets as they are."""
    student, expected = golden.student, golden.expected
    with torch.no_grad():
        logits = student(golden.input_ids).logits
        concept_logits = student.concept_logits(golden.input_ids)
    out = student(golden.input_ids, golden.labels, expected["targets"])
    loss_ntp = out.loss_ntp / golden.num_labels
    loss_concept = out.loss_concept / golden.input_ids.numel()
    total = loss_ntp + golden.concept_weight * loss_concept
    total.backward()
    grads = to_hf(
        {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, Layout.of(student)
    )
    return {
        "student.logits": logits,
        "student.concept_logits": concept_logits,
        "student.loss_ntp": loss_ntp.detach(),
        "student.loss_concept": loss_concept.detach(),
        "student.loss_total": total.detach(),
        **{f"grad.{name}": grad for name, grad in grads.items()},
    }


def _compare(name: str, actual: Tensor, expected: Tensor) -> Check:
    if actual.shape != expected.shape:
        raise ValueError(f"{name}: shape {tuple(actual.shape)}, the golden file has {tuple(expected.shape)}")
    difference = (actual.double() - expected.double()).abs()
    if name.startswith("grad."):
        norm = expected.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
        return Check(name, (difference.norm() / norm).item(), GRADIENT_TOLERANCE, "of its norm")
    return Check(name, difference.max().item(), ABSOLUTE_TOLERANCE, "absolute")


def _compare_targets(actual: Tensor, expected: Mapping[str, Tensor]) -> Check:
    """Tokens whose targets differ as a set; where attribution is not positive nothing is promised."""
    positive = expected["target_attribution"] > 0
    wrong = 0
    for ours, theirs, real in zip(
        actual.flatten(0, 1).tolist(),
        expected["targets"].flatten(0, 1).tolist(),
        positive.flatten(0, 1).tolist(),
        strict=True,
    ):
        promised = {concept for concept, counts in zip(theirs, real, strict=True) if counts}
        wrong += {concept for concept in ours if concept >= 0} != promised
    return Check("targets", float(wrong), 0.0, "tokens with another set of ids")


def run_checks(golden: Golden) -> Iterator[Check]:
    """One check per expected quantity, in a fixed order."""
    actual = {**teacher_quantities(golden), **student_quantities(golden)}
    for name in sorted(golden.expected):
        if name in ("input_ids", "target_attribution"):
            continue
        if name not in actual:
            raise ValueError(f"{name}: the golden file asks for a quantity that is not computed here")
        if name == "targets":
            yield _compare_targets(actual[name], golden.expected)
            ranked = actual["attribution"].gather(-1, golden.expected["targets"])
            yield _compare("target_attribution", ranked, golden.expected["target_attribution"])
        else:
            yield _compare(name, actual[name], golden.expected[name])


def _main(args: argparse.Namespace) -> int:
    checks = list(run_checks(read_golden(args.folder)))
    for check in checks:
        print(check)
    passed = sum(check.passed for check in checks)
    print(f"{passed} of {len(checks)} quantities within tolerance in {args.folder}")
    return 0 if passed == len(checks) else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.verify",
        description="Recompute a golden directory through the code that trains",
    )
    parser.add_argument(
        "folder", type=Path, help="golden directory (config.json, weights, expected.safetensors)"
    )
    return run_cli(_main, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
