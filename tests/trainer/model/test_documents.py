"""Packed documents against the same documents one by one: everything that a window's loss depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.model.tiny import randomize, tiny_concepts, tiny_config, tiny_gpt2
from trainer.concepts.attribution import residual_and_gradient
from trainer.config import Insertion, PauseConfig, RegressionInsertion
from trainer.kernels.reference import IGNORED_LABEL
from trainer.model.documents import Documents, attention_mask, split_windows
from trainer.model.gpt2 import GPT2, ModelOutput
from trainer.model.student import build_student

END = 7
LENGTHS = ((5, 9, 3, 7), (1, 14, 1, 8), (24,), (12, 12))
"""Of the documents in each row; the last one of a row is cut by the window, or ends there."""
TOLERANCE = 1e-5


def windows(lengths: tuple[tuple[int, ...], ...] = LENGTHS, seed: int = 0) -> Tensor:
    """Rows (B, T+1) of documents of these lengths, which end with END but for the last one of odd rows."""
    tokens = torch.randint(8, 61, (len(lengths), 25), generator=torch.Generator().manual_seed(seed))
    for row, counts in enumerate(lengths):
        ends = torch.tensor(counts).cumsum(0)
        tokens[row, (ends if row % 2 == 0 else ends[:-1]) - 1] = END
    return tokens


class Alone(NamedTuple):
    """A document by itself, and where it is in the windows."""

    tokens: Tensor
    """(1, n) int64."""
    labels: Tensor
    """(1, n)."""
    row: int
    place: slice


def one_by_one(tokens: Tensor) -> Iterator[Alone]:
    """The documents of windows (B, T+1), found by a plain loop; an END has no next token."""
    for row, ids in enumerate(tokens.tolist()):
        start = 0
        for column in range(len(ids) - 1):
            if ids[column] == END or column == len(ids) - 2:
                place = slice(start, column + 1)
                labels = [
                    IGNORED_LABEL if token == END else following
                    for token, following in zip(ids[place], ids[start + 1 :], strict=False)
                ]
                yield Alone(tokens[row : row + 1, place], torch.tensor([labels]), row, place)
                start = column + 1


INSERTIONS: dict[str, Insertion | None] = {
    "plain": None,
    "cocomix": tiny_concepts(),
    "cocomix at the bottom": tiny_concepts(insert_layer=0),
    "cocomix in the last block": tiny_concepts(insert_layer=2),
    "cocomix, added": replace(tiny_concepts(), mix="add"),
    "cocomix, not mixed in": replace(tiny_concepts(), mix="none"),
    "pause": PauseConfig(insert_layer=1),
    "regression": RegressionInsertion(insert_layer=1, width=10),
}


def student(insertion: Insertion | None) -> GPT2:
    model = build_student(tiny_config(), insertion)
    randomize(model, seed=5)
    return model


def targets_of(insertion: Insertion | None, tokens: Tensor) -> Tensor | None:
    """Something to predict at each of the tokens (B, n), the same wherever they stand."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(insertion, RegressionInsertion):
        return torch.randn(61, 10, generator=generator)[tokens]
    if insertion is None or isinstance(insertion, PauseConfig):
        return None
    return torch.randint(0, 53, (61, 3), generator=generator)[tokens]


def streams_of(model: GPT2, call: Callable[[], ModelOutput]) -> tuple[ModelOutput, list[Tensor]]:
    """What a call returns, and the residual stream after each block."""
    streams: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, out: streams.append(out.detach()))
        for block in model.blocks
    ]
    out = call()
    for handle in handles:
        handle.remove()
    return out, streams


def run(model: GPT2, tokens: Tensor, labels: Tensor, targets: Tensor | None, documents: Documents | None):
    more = () if targets is None else (targets,)
    return streams_of(model, lambda: model(tokens, labels, *more, documents=documents))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", INSERTIONS)
def test_a_student_reads_packed_documents_as_if_each_were_alone(name: str) -> None:
    """Catches attention across a boundary, at token or concept positions, positions that go on, a label that
    is asked for across it, and gradients of any of them."""
    insertion = INSERTIONS[name]
    model, tokens = student(insertion), windows()
    inputs = split_windows(tokens, END)
    assert inputs.documents is not None
    out, streams = run(model, *inputs[:2], targets_of(insertion, inputs.input_ids), inputs.documents)
    losses = [loss for loss in (out.loss_ntp, out.loss_concept) if loss is not None]
    sum(losses).backward()
    packed = gradients(model)
    logits = model(inputs.input_ids, documents=inputs.documents).logits

    totals = [0.0 for _ in losses]
    count = 0
    for document in one_by_one(tokens):
        ids = document.tokens
        alone, own = run(model, ids, document.labels, targets_of(insertion, ids), None)
        parts = [loss for loss in (alone.loss_ntp, alone.loss_concept) if loss is not None]
        sum(parts).backward()
        totals = [total + float(part.detach()) for total, part in zip(totals, parts, strict=True)]
        found = logits[document.row : document.row + 1, document.place]
        torch.testing.assert_close(found, model(ids).logits, atol=TOLERANCE, rtol=0)
        for stream, expected in zip(streams, own, strict=True):
            width = stream.shape[1] // 24  # positions per token
            place = slice(document.place.start * width, document.place.stop * width)
            torch.testing.assert_close(stream[document.row, place], expected[0], atol=TOLERANCE, rtol=0)
        count += 1
    assert count == 4 + 4 + 1 + 2
    for loss, total in zip(losses, totals, strict=True):
        assert float(loss.detach()) == pytest.approx(total, rel=TOLERANCE)
    for key, expected in gradients(model).items():
        difference = float((packed[key] - expected).norm() / expected.norm().clamp_min(1e-6))
        assert difference < TOLERANCE, key


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("kind", ["cocomix", "pause"])
def test_vectors_after_some_tokens(kind: str, every: int) -> None:
    """Catches a vector in the document of another token: documents that begin where the pattern does equal
    themselves alone."""
    insertion = PauseConfig(insert_layer=1) if kind == "pause" else tiny_concepts()
    model = student(replace(insertion, every=every))
    tokens = windows(((6, 12, 6), (12, 12)))
    inputs = split_windows(tokens, END)
    logits = model(inputs.input_ids, documents=inputs.documents).logits
    for document in one_by_one(tokens):
        found = logits[document.row : document.row + 1, document.place]
        torch.testing.assert_close(found, model(document.tokens).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [*INSERTIONS, "cocomix, every 3"])
def test_a_document_does_not_depend_on_its_neighbours(name: str) -> None:
    """Catches any path from one document into another, later or earlier."""
    insertion = INSERTIONS.get(name, replace(tiny_concepts(), every=3))
    model, tokens = student(insertion), windows()
    inputs = split_windows(tokens, END)
    before = model(inputs.input_ids, documents=inputs.documents).logits
    tokens = tokens.clone()
    tokens[0, 6] = 8 + (tokens[0, 6] - 7) % 53  # in the second of four documents
    changed = split_windows(tokens, END)
    after = model(changed.input_ids, documents=changed.documents).logits
    assert torch.equal(after[0, :6], before[0, :6])
    assert not torch.equal(after[0, 6:14], before[0, 6:14])
    assert torch.equal(after[0, 14:], before[0, 14:])
    unmasked = model(changed.input_ids).logits - model(inputs.input_ids).logits
    assert unmasked[0, 14:].abs().max() > 1e-3, "without documents they do depend on it"


def test_the_teacher_s_residual_and_gradient() -> None:
    """Catches a mask in one half of the teacher only."""
    teacher, tokens = tiny_gpt2(seed=3).requires_grad_(False), windows()
    inputs = split_windows(tokens, END)
    packed = residual_and_gradient(teacher, *inputs[:2], 1, inputs.documents)
    for document in one_by_one(tokens):
        alone = residual_and_gradient(teacher, document.tokens, document.labels, 1)
        for found, expected in zip(packed[:2], alone[:2], strict=True):
            part = found[document.row, document.place]
            torch.testing.assert_close(part, expected[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_where_documents_begin() -> None:
    """Catches an end-of-text token that opens a document, and sums that reach beyond one."""
    input_ids = torch.tensor([[1, 2, 7, 3, 7, 7, 4, 5], [7, 1, 2, 3, 4, 5, 6, 7]])
    documents = Documents.ended_by(input_ids, END)
    assert documents.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert documents.ids.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1]]
    assert documents.totals(input_ids).tolist() == [[10, 10, 10, 10, 10, 7, 9, 9], [7, *[28] * 7]]
    assert documents.totals(torch.full((2, 8), 2**62)).tolist()[1][0] == 2**62, "sums wrap around"


def test_the_mask_by_a_plain_loop() -> None:
    """Catches a position that sees what follows it, or another document."""
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    mask = attention_mask(ids, torch.bfloat16)
    assert (mask.shape, mask.dtype) == ((2, 1, 6, 6), torch.bfloat16)
    for row in range(2):
        for query in range(6):
            for key in range(6):
                sees = key <= query and ids[row, key] == ids[row, query]
                assert float(mask[row, 0, query, key]) == (0.0 if sees else float("-inf"))
