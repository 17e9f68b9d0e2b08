"""Everything that a student can mix in, and every place for it, against loops over tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.trainer.model.tiny import randomize, tiny_concepts, tiny_config, tiny_gpt2
from trainer.config import ConceptsConfig, Insertion, PauseConfig, RegressionInsertion
from trainer.config_io import from_dict, to_dict
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.ablations import PauseGPT2, RegressionGPT2
from trainer.model.cocomix import CoCoMix, MixingGPT2
from trainer.model.decoding import Decoder
from trainer.model.formats import load_model, save_model
from trainer.model.student import build_student

WIDTH, STATE, CONCEPTS, TOP_K = 16, 10, 53, 5


def concepts(**changes: object) -> ConceptsConfig:
    return from_dict(ConceptsConfig, {**to_dict(tiny_concepts()), **changes}, "changed")


INSERTIONS: dict[str, Insertion] = {
    "concepts, every 2": concepts(every=2),
    "concepts, every 3": concepts(every=3, insert_layer=2),
    "concepts, added": concepts(mix="add"),
    "concepts, predicted only": concepts(mix="none"),
    "pause": PauseConfig(insert_layer=1),
    "pause, every 4": PauseConfig(insert_layer=0, every=4),
    "regression": RegressionInsertion(insert_layer=1, width=STATE),
    "regression, every 2": RegressionInsertion(insert_layer=1, width=STATE, every=2),
    "regression, added": RegressionInsertion(insert_layer=1, width=STATE, mix="add"),
    "regression, predicted only": RegressionInsertion(insert_layer=1, width=STATE, mix="none"),
}


def student(name: str) -> MixingGPT2:
    model = build_student(tiny_config(), INSERTIONS[name])
    assert isinstance(model, MixingGPT2)
    randomize(model, seed=0)
    return model


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


# The definitions, one token after the other


def normalized(model: CoCoMix | RegressionGPT2, h: Tensor) -> Tensor:
    """u of one token's h (D)."""
    return (h - h.mean()) / (h.std() + 1e-5) - model.mixer.pre_bias


def concept_logits(model: CoCoMix, h: Tensor) -> Tensor:
    """c of one token's h (D)."""
    weight, bias = model.mixer.predict.weight[:CONCEPTS], model.mixer.predict.bias[:CONCEPTS]
    return weight @ normalized(model, h) + bias


def state(model: RegressionGPT2, h: Tensor) -> Tensor:
    """The prediction of one token's h (D)."""
    return model.mixer.to_state.weight @ normalized(model, h) + model.mixer.to_state.bias


def vector(model: MixingGPT2, h: Tensor) -> Tensor:
    """q of one token's h (D)."""
    if isinstance(model, PauseGPT2):
        return model.pause.weight[0]
    if isinstance(model, CoCoMix):
        logits = concept_logits(model, h)
        best = logits.argsort(descending=True)[:TOP_K]
        mixed = sum(logits[m] * model.mixer.compress_weight[m] for m in best) + model.mixer.compress_bias
    else:
        assert isinstance(model, RegressionGPT2)
        assert model.mixer.from_state is not None
        mixed = model.mixer.from_state.weight @ state(model, h) + model.mixer.from_state.bias
    return (mixed + model.mixer.pre_bias) * h.std() + h.mean()


def below(model: MixingGPT2, input_ids: Tensor) -> Tensor:
    return model.run_blocks(model.embed(input_ids), 0, model.insert_layer)


def naive_logits(model: MixingGPT2, insertion: Insertion, input_ids: Tensor) -> Tensor:
    """Logits of one row (1, T) from a stream put together one by one; every block updates all of it."""
    mix = "interleave" if isinstance(insertion, PauseConfig) else insertion.mix
    stream: list[Tensor] = []
    newest: list[int] = []
    for t, h in enumerate(below(model, input_ids)[0]):
        stream.append(h + vector(model, h) if mix == "add" else h)
        if mix == "interleave" and (t + 1) % insertion.every == 0:
            stream.append(vector(model, h))
        newest.append(len(stream) - 1)
    x = model.run_blocks(torch.stack(stream)[None], model.insert_layer, model.config.n_layer)
    return F.linear(model.ln_f(x[:, newest]), model.wte.weight)[..., :61]


@pytest.mark.parametrize("length", [12, 13, 2])
@pytest.mark.parametrize("name", INSERTIONS)
def test_logits_and_gradients_equal_the_definition(name: str, length: int) -> None:
    """Catches a vector at the wrong token, a wrong place to read, a lost tail, a gradient that is cut."""
    model, input_ids = student(name), tokens(1, length)
    ours, theirs = model(input_ids).logits, naive_logits(model, INSERTIONS[name], input_ids)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((ours * pull).sum(), used, allow_unused=True)
    expected = torch.autograd.grad((theirs * pull).sum(), used, allow_unused=True)
    for parameter, own, other in zip(model.named_parameters(), grads, expected, strict=True):
        own, other = (torch.zeros(()) if grad is None else grad for grad in (own, other))
        assert (own - other).norm() <= 1e-4 * other.norm() + 1e-6, parameter[0]


@pytest.mark.parametrize("name", INSERTIONS)
def test_changing_a_token_changes_no_logit_before_it(name: str) -> None:
    """Catches a stream in which a position sees a later token or a later vector."""
    model, input_ids = student(name), tokens(1, 11)
    with torch.no_grad():
        before = model(input_ids).logits
        for t in range(11):
            changed = input_ids.clone()
            changed[0, t] = (changed[0, t] + 1) % 61
            after = model(changed).logits
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("name", ["concepts, predicted only", "regression, predicted only"])
def test_prediction_alone_leaves_the_model_as_it_is(name: str) -> None:
    """Catches a vector that reaches the stream although nothing is to be mixed in."""
    model, plain = student(name), tiny_gpt2()
    own = dict(model.named_parameters())
    plain.load_state_dict({key: own[key] for key in plain.state_dict()})
    assert not any("compress" in key or "from_state" in key for key in own)
    input_ids = tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, plain(input_ids).logits)


@pytest.mark.parametrize("name", [name for name in INSERTIONS if name.startswith("concepts")])
def test_concept_loss_is_that_of_the_tokens_with_a_concept(name: str) -> None:
    """Catches targets that meet the logits of another token, and a loss that is no mean over A."""
    model, insertion = student(name), INSERTIONS[name]
    assert isinstance(model, CoCoMix)
    ids = tokens(2, 13)
    places = [t for t in range(12) if (t + 1) % insertion.every == 0]
    targets = torch.randint(-1, CONCEPTS, (2, len(places), 3), generator=torch.Generator().manual_seed(3))
    out = model(ids[:, :-1], ids[:, 1:], targets)
    expected = torch.zeros(())
    for row in range(2):
        h = below(model, ids[row : row + 1, :-1])[0]
        for place, t in enumerate(places):
            log_probs = concept_logits(model, h[t]).log_softmax(-1)
            for target in targets[row, place].tolist():
                expected = expected - (log_probs[target] / 3 if target != MASKED_TARGET else 0)
    assert out.loss_concept is not None
    torch.testing.assert_close(out.loss_concept, expected)
    assert out.concepts is not None
    assert out.concepts.ids.shape == (2, len(places), TOP_K)


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("every", [1, 3])
def test_regression_loss_is_the_mean_distance_to_the_state(
    every: int, distance: Literal["l1", "l2", "cosine"]
) -> None:
    """Catches a sum instead of a mean over the width, a wrong token's state, and rows that do not count."""
    model = RegressionGPT2(
        tiny_config(), RegressionInsertion(insert_layer=1, width=STATE, every=every, distance=distance)
    )
    randomize(model, seed=0)
    ids = tokens(3, 13)
    places = range(every - 1, 12, every)
    states = torch.randn(3, len(places), STATE, generator=torch.Generator().manual_seed(3))
    states[2] = torch.nan
    expected = 0.0
    for row in range(2):
        h = below(model, ids[row : row + 1, :-1])[0]
        for place, t in enumerate(places):
            ours, theirs = state(model, h[t]), states[row, place]
            difference = [(a - b).item() for a, b in zip(ours, theirs, strict=True)]
            dot = sum((a * b).item() for a, b in zip(ours, theirs, strict=True))
            expected += {
                "l1": sum(abs(d) for d in difference) / STATE,
                "l2": sum(d * d for d in difference) / STATE,
                "cosine": 1 - dot / (ours.norm() * theirs.norm()).item(),
            }[distance]
    out = model(ids[:, :-1], ids[:, 1:], states)
    assert out.loss_concept.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", INSERTIONS)
def test_folder_round_trip(name: str, tmp_path: Path) -> None:
    """Catches a student that is published without saying what it is."""
    model = student(name).eval()
    save_model(tmp_path, model.state_dict(), model.config, INSERTIONS[name])
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(tokens(1, 7)).logits, model(tokens(1, 7)).logits)


@pytest.mark.parametrize("name", INSERTIONS)
def test_decoding_equals_the_whole_context(name: str) -> None:
    """Catches a vector that goes to the wrong token of a padded row, or one that is not there and is seen."""
    model, decoder = student(name).eval(), Decoder(student(name).eval(), 14)
    rows = [row[:length].tolist() for row, length in zip(tokens(4, 8), (8, 3, 5, 1), strict=True)]

    def check(logits: Tensor) -> None:
        for row, own in zip(rows, logits, strict=True):
            torch.testing.assert_close(own, model(torch.tensor([row])).logits[0, -1], atol=2e-5, rtol=1e-5)

    with torch.no_grad():
        check(decoder.start(rows))
        for new in tokens(4, 10)[:, :4].split(1, dim=1):
            rows = [[*row, int(token)] for row, token in zip(rows, new, strict=True)]
            check(decoder.extend(new))
        decoder.select(torch.tensor([3, 1]))
        rows = [[*rows[3], 7, 8], [*rows[1], 7, 8]]
        check(decoder.extend(torch.tensor([[7, 8], [7, 8]])))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"pause": {"insert_layer": 3}}, r"pause.insert_layer=3 must be below n_layer=3"),
        ({"pause": {"insert_layer": 1, "every": 0}}, r"every=0 must be at least 1"),
        ({"pause": 3}, r"pause must hold"),
        ({"pause": {"insert_layer": 1}, "cocomix": {}}, r"cocomix and pause cannot be inserted together"),
        ({"cocomix": {"num_concepts": 5, "insert_layer": 1}}, r"top_k"),
        ({"cocomix": {"num_concepts": 5, "top_k": 2, "insert_layer": 1, "mix": "stir"}}, r"mix"),
        ({"regression": {"insert_layer": 1}}, r"width"),
    ],
)
def test_a_wrong_description_is_refused_in_one_line(
    part: dict[str, object], message: str, tmp_path: Path
) -> None:
    """Catches a traceback, or a student that is silently built as something else."""
    plain = tiny_gpt2()
    save_model(tmp_path, plain.state_dict(), plain.config, None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **part}))
    with pytest.raises(ValueError, match=message) as refused:
        load_model(tmp_path)
    assert "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)
