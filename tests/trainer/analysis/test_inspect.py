"""The concept page: its numbers against plain loops, and the page itself in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import validation_batches
from data.tokenizer import train_bpe
from tests.trainer.analysis.browser import CHROMIUM, Browser
from tests.trainer.analysis.test_generate import write_run
from tests.trainer.tiny_run import NUM_LATENTS
from trainer.analysis.inspect import main
from trainer.analysis.inspect_collect import NO_TOKEN, TOKENS_BEFORE, ConceptRecord, collect, promoted_tokens
from trainer.analysis.inspect_page import Pieces, norm_histogram, render, small_norm_share
from trainer.analysis.trained import open_teacher, open_trained
from trainer.concepts.extractor import TargetExtractor
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.cocomix import CoCoMix

HOSTILE = (
    "</script><script>document.title='hacked'</script>",
    "<img src=x onerror=\"document.title='hacked'\">",
    "<!--<script>",
    "\u2028\u2029\"'`${1}\\",
    "{{data}}",
    "&lt;b&gt;",
)


@pytest.fixture(scope="module")
def runs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspected")
    for objective in ("cocomix", "ntp"):
        write_run(tiny_world, root / objective, objective)
    write_run(tiny_world, root / "every_second", concepts__every=2)
    return root


def embedded(page: Path) -> dict[str, Any]:
    text = page.read_text()
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    body: dict[str, Any] = json.loads(found[1])
    return body


@pytest.mark.parametrize(("name", "every"), [("cocomix", 1), ("every_second", 2)])
def test_statistics_against_plain_loops(name: str, every: int, runs: Path) -> None:
    """Catches labels off by one, windows counted twice, contexts of another token, wrong agreement."""
    trained = open_trained(runs / name)
    model = trained.model
    assert isinstance(model, CoCoMix)
    assert trained.config is not None
    assert trained.config.concepts is not None
    teacher, sae, layer = open_teacher(trained)
    extractor = TargetExtractor(teacher, sae, trained.config.concepts)

    def batches(rows: int) -> Any:
        return validation_batches(trained.config.data, share=1.0, rows=rows, rank=0, world_size=1)

    found = collect(model, batches(3), torch.device("cpu"), extractor, num_contexts=2)
    active = {"student": [0] * NUM_LATENTS, "teacher": [0] * NUM_LATENTS}
    best: dict[str, list[list[float]]] = {name: [[] for _ in range(NUM_LATENTS)] for name in active}
    targeted, recalled, count = [0] * NUM_LATENTS, [0] * NUM_LATENTS, 0
    for batch in batches(1):
        tokens = batch.tokens.long()
        ids = tokens[:, :-1]
        count += ids.numel()
        with torch.no_grad():
            logits = model.concept_logits(ids)[0].topk(trained.config.concepts.top_k)
            values, latents = sae.encode(teacher.residual_after(ids, layer)[:, every - 1 :: every])
        sides = {"student": (logits.values, logits.indices), "teacher": (values[0], latents[0])}
        for name, (strengths, concepts) in sides.items():
            window: dict[int, float] = {}
            for row, where in zip(strengths.tolist(), concepts.tolist(), strict=True):
                for value, concept in zip(row, where, strict=True):
                    if name == "student" or value > 0:
                        active[name][concept] += 1
                        window[concept] = max(window.get(concept, value), value)
            for concept, value in window.items():
                best[name][concept].append(value)
        targets = extractor(ids, tokens[:, 1:])[0].tolist()
        for wanted, kept in zip(targets, logits.indices.tolist(), strict=True):
            for target in wanted:
                if target != MASKED_TARGET:
                    targeted[target] += 1
                    recalled[target] += target in kept[:3]
    assert (found.num_tokens, found.num_places) == (count, count // every)
    assert found.targeted.tolist() == targeted
    assert found.recalled.tolist() == recalled
    assert found.teacher is not None
    for name, record in (("student", found.student), ("teacher", found.teacher)):
        assert record.active.tolist() == active[name]
        for concept in range(NUM_LATENTS):
            shown = record.contexts(concept).strengths[:, TOKENS_BEFORE].tolist()
            assert shown == pytest.approx(sorted(best[name][concept], reverse=True)[:2], rel=1e-4)


def test_a_concept_for_every_second_token(runs: Path) -> None:
    """Catches concepts that stand beside the token before theirs, and a text that ends before its first."""
    assert main([str(runs / "every_second"), "--text", "the cat sat on a mat", "--text", "t"]) == 0
    body = embedded(runs / "every_second" / "inspect" / "index.html")
    assert body["every"] == 2
    trained = open_trained(runs / "every_second")
    assert isinstance(trained.model, CoCoMix)
    tokens = trained.tokenizer.encode("the cat sat on a mat")
    assert len(tokens) >= 4
    with torch.no_grad():
        best = trained.model.concept_logits(torch.tensor([tokens]))[0].topk(5).indices.tolist()
    text, short, *_ = body["texts"]
    assert text["ids"] == [best[index // 2] if index % 2 else [] for index in range(len(tokens))]
    assert [bool(row) for row in text["targets"]] == [index % 2 == 1 for index in range(len(tokens) - 1)]
    assert short["ids"] == short["logits"] == [[]]
    for concept in body["concepts"]:
        for context in concept["student"]["contexts"]:
            levels, focus = context["levels"], context["focus"]
            assert all(digit == "0" for digit in levels[focus + 1 :: 2] + levels[(focus + 1) % 2 : focus : 2])
    assert sum(concept["student"]["density"] for concept in body["concepts"]) == pytest.approx(5)


def test_contexts_are_cut_at_the_window() -> None:
    """Catches tokens of a neighbour window, strengths that stand beside their token, repeats of a window."""
    record = ConceptRecord(4, 2)
    tokens = torch.arange(100, 106)
    ids = torch.tensor([[0, 1], [2, 1], [2, 0], [1, 0], [3, 2], [3, 1]])
    values = torch.tensor([[5.0, 1.0], [1.0, 2.0], [4.0, 9.0], [3.0, 0.0], [1.0, 0.5], [1.0, 7.0]])
    record.add(tokens, values, ids, positive_only=True)
    record.add(tokens + 100, values / 2, ids, positive_only=True)
    record.add(tokens + 200, values / 4, ids, positive_only=True)
    assert record.active.tolist() == [6, 12, 9, 6]
    found = record.contexts(0)
    assert found.strengths[:, TOKENS_BEFORE].tolist() == [9.0, 4.5]
    there = found.tokens[0] != NO_TOKEN
    assert found.tokens[0][there].tolist() == tokens.tolist()
    assert found.strengths[0][there].nan_to_num(-1).tolist() == [5.0, -1.0, 9.0, -1.0, -1.0, -1.0]
    assert found.tokens[0, TOKENS_BEFORE] == 102


def test_promoted_tokens_are_those_of_the_lens(runs: Path) -> None:
    """Catches rows behind the vocabulary, a norm that is left out, chunks in the wrong order."""
    model = open_trained(runs / "cocomix").model
    torch.nn.init.normal_(model.ln_f.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.zeros_(model.ln_f.bias)
    rows = torch.randn(5, model.config.d_model, generator=torch.Generator().manual_seed(0))
    found = promoted_tokens(model, rows, 280, 4, chunk_rows=2)
    with torch.no_grad():
        logits = model.ln_f(rows) @ model.wte.weight[:280].T
    assert found.most.tolist() == logits.topk(4).indices.tolist()
    assert found.least.tolist() == (-logits).topk(4).indices.tolist()


def test_characters_over_several_tokens_are_shown_once() -> None:
    """Catches replacement characters where a text is not of the tokenizer's language."""
    tokenizer = train_bpe(["aaaa"], 257)
    pieces = Pieces(tokenizer)
    text = "a中é b\u2028"
    numbers = pieces.of_tokens(tokenizer.encode(text))
    assert len(numbers) == len(tokenizer.encode(text))
    assert "".join(pieces.texts[number] for number in numbers) == text


def test_histogram_of_norms() -> None:
    """Catches a limit or bars in the wrong place."""
    norms = torch.tensor([0.0, 0.005, 0.02, 1.5])
    assert small_norm_share(norms) == 0.5
    chart = norm_histogram(norms)
    assert chart.count('class="small"') == chart.count('class="bar"') == 2
    assert "50.0% below 0.01" in chart


def test_what_is_refused(
    runs: Path, tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches tracebacks, pages that are half there, and a teacher that goes missing in silence."""
    orphan = shutil.copytree(runs / "cocomix", tmp_path / "orphan")
    config = (orphan / "config.yaml").read_text()
    (orphan / "config.yaml").write_text(config.replace(str(tiny_world / "teacher"), str(tmp_path / "gone")))
    for run, argv, message in (
        (runs / "ntp", [], "predicts no concepts"),
        (orphan, [], "--no_teacher leaves it out"),
        (orphan, ["--no_teacher", "--text", "word " * 40], "must be from 1 to 16"),
        (orphan, ["--no_teacher", "--concepts", "3,37"], "--concepts 37 must be from 0 to 36"),
        (orphan, ["--contexts", "0"], "--contexts 0"),
        (orphan / "model", ["--no_teacher", "--tokenizer", str(tiny_world / "data")], "--out must name"),
    ):
        assert main([str(run), *argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (orphan / "inspect").exists()
    assert main([str(orphan), "--no_teacher", "--concepts", "5,3", "--steer_concepts", "0"]) == 0
    body = embedded(orphan / "inspect" / "index.html")
    assert [concept["id"] for concept in body["concepts"]] == [5, 3]
    assert not body["teacher"]
    assert "teacher" not in body["concepts"][0]
    page = tmp_path / "exported.html"
    folder = ["--no_teacher", "--tokenizer", str(tiny_world / "data"), "--data", str(tiny_world / "data")]
    assert main([str(orphan / "model"), *folder, "--out", str(page)]) == 0
    assert embedded(page)["num_concepts"] == NUM_LATENTS


# In the browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_page_of_a_run_in_the_browser(runs: Path, browser: Browser) -> None:
    """Catches scripts that fail, requests to anywhere, keys that do nothing, wrong highlights."""
    assert main([str(runs / "cocomix"), "--text", "the cat sat"]) == 0
    page = runs / "cocomix" / "inspect" / "index.html"
    body = embedded(page)
    samples = (page.parent / "steering.txt").read_text()
    assert samples.count("prompt: ") == len(body["steering"]) == 4
    for item in body["steering"]:
        assert f"{item['id']}=-10 | " in samples
    browser.events.clear()
    browser.open(page)
    assert browser.run("document.querySelectorAll('#list .row').length") > 5
    browser.run("document.querySelector('#sort').focus()")
    browser.run("document.activeElement.blur()")
    browser.press("/")
    assert browser.run("document.activeElement.id") == "search"
    browser.press("ArrowDown", "ArrowDown", "ArrowUp", "Enter")
    assert browser.run("document.activeElement.id") == "detail"
    densest = sorted(
        body["concepts"], key=lambda item: -max(item[side]["density"] for side in ("student", "teacher"))
    )
    assert browser.run("document.querySelector('#detail h2').textContent") == f"Concept {densest[1]['id']}"
    chosen = densest[3]
    browser.press("/", *str(chosen["id"]), "Enter")
    assert browser.run("document.querySelector('#detail h2').textContent") == f"Concept {chosen['id']}"
    marks = sum(digit != "0" for item in chosen["teacher"]["contexts"] for digit in item["levels"])
    assert browser.run("document.querySelectorAll('#detail .teacher mark').length") == marks > 0
    browser.run("document.querySelector('nav [data-view=texts]').click()")
    browser.run("document.querySelector('#tokens').focus()")
    browser.press("ArrowRight", "ArrowRight", "ArrowLeft")
    ids = browser.run(
        "[...document.querySelectorAll('#here tr td:first-child')].map((cell) => +cell.textContent)"
    )
    assert ids == body["texts"][0]["ids"][1]
    shown = browser.run(
        "[...document.querySelectorAll('#tokens [role=option]')].map((n) => n.textContent).join('')"
    )
    assert shown == "the cat sat"
    browser.run("document.querySelector('nav [data-view=steering]').click()")
    assert browser.run("document.querySelectorAll('#steering table').length") == len(body["steering"]) == 4
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]


def large_page(concepts: int) -> dict[str, Any]:
    """Data of a page with many concepts, all of whose tokens are hostile."""
    pieces = [*HOSTILE, *(f" word{number}" for number in range(5000))]
    contexts = [
        {
            "pieces": [(start + 7 * k) % len(pieces) for k in range(32)],
            "levels": "05" * 16,
            "focus": 19,
            "value": 1.5,
        }
        for start in range(6)
    ]
    side = {"density": 0.1, "promotes": [0, 1, 2, 3, 4, 5], "suppresses": [5, 4], "contexts": contexts}
    return {
        "source": HOSTILE[0],
        "tokens": 1000,
        "every": 1,
        "num_concepts": concepts,
        "teacher": True,
        "agreement": 0.5,
        "num_targets": 4,
        "small_norm": 0.01,
        "small_share": 0.058,
        "concepts": [
            {"id": number, "norm": 0.5, "student": side, "teacher": side, "targeted": 4, "recalled": 1}
            for number in range(concepts)
        ],
        "texts": [
            {"label": HOSTILE[1], "pieces": [0, 1, 2, 3], "ids": [[1, 2]] * 4, "logits": [[1.0, 0.5]] * 4}
        ],
        "steering": [{"id": 1, "prompt": HOSTILE[1], "samples": [[-10.0, HOSTILE[0]], [1.0, HOSTILE[3]]]}],
        "pieces": pieces,
    }


def test_hostile_tokens_stay_text_and_many_concepts_load_fast(browser: Browser, tmp_path: Path) -> None:
    """Catches tokens that become markup or end the script, and a page that draws every concept at once."""
    page = tmp_path / "page.html"
    page.write_text(render(HOSTILE[0], large_page(2000), norm_histogram(torch.ones(4))))
    browser.events.clear()
    assert browser.open(page) < 2.0
    assert browser.run("document.title") == HOSTILE[0]
    assert browser.run("document.querySelector('h1').textContent") == HOSTILE[0]
    assert browser.run("data.pieces.slice(0, 6)") == list(HOSTILE)
    chips = browser.run(
        "[...document.querySelectorAll('.student .chips li')].slice(0, 3).map((n) => n.textContent)"
    )
    assert chips == list(HOSTILE[:3])
    assert (
        browser.run("document.querySelectorAll('img, b script, #detail script, #steering script').length")
        == 0
    )
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.querySelectorAll('.row').length") < 60
    browser.press("/", *"1999", "Enter")
    assert browser.run("document.querySelector('#detail h2').textContent") == "Concept 1999"
    assert browser.complaints() == []
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.bad = 1'}))"
    )
    assert browser.run("window.bad") is None, "the security policy must stop scripts that are not the page's"
