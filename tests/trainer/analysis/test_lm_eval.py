"""Downstream tasks through the real harness, on small local tasks of each output type."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

import parallel.titan  # noqa: F401  (takes seconds: imported once, before ranks are forked)
from parallel.world import World
from tests.ranks import run_ranks
from tests.trainer.analysis.test_generate import write_run
from tests.trainer.tiny_run import tiny_config
from trainer.analysis.harness import run_tasks
from trainer.analysis.lm_eval import main, write_greedily
from trainer.analysis.scoring import Request, Score, Scorer, token_statistics
from trainer.analysis.trained import TrainedModel, open_trained
from trainer.build import build_parts
from trainer.main import train
from trainer.metrics.json_lines import read_json_lines
from trainer.stop import StopRequest

REST = " the cat sat on a mat and saw a dog run over the hills and far away"
EXAMPLES = [
    {"q": "the cat sat on a", "right": " mat", "options": [" mat", " dog ran", " hill"], "label": 0},
    {"q": "a dog run over the", "right": " hills and", "options": [" cat", " hills", " far"], "label": 1},
    {"q": "and far", "right": " away", "options": [" sat", " on", " away"], "label": 2},
    {"q": "the", "right": " dog", "options": [" dog", " cat", " away far"], "label": 0},
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{options}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
""",
    "tiny_word": """
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: "{{right}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity}
  - {metric: acc}
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}{{right}}REST"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
    "tiny_answer": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{right}}"
generation_kwargs: {until: ["a"], max_gen_toks: 4}
metric_list:
  - {metric: exact_match}
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each output type, and their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "examples.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    for name, text in TASKS.items():
        place = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{place}{text}".replace("REST", REST))
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No request leaves this machine, and no cache of the user is touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module", params=["cocomix", "ntp"])
def run(request: pytest.FixtureRequest, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tiny_world, tmp_path_factory.mktemp("runs") / request.param, request.param)


def log_likelihood(trained: TrainedModel, context: list[int], continuation: list[int]) -> Score:
    """One request alone, without padding or batches."""
    ids = [*context, *continuation][-(trained.model.config.n_positions + 1) :]
    with torch.no_grad():
        logits = trained.model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    wanted = torch.tensor(continuation)
    predicted = logits[-len(continuation) :]
    total = predicted.gather(1, wanted.unsqueeze(1)).sum()
    return Score(float(total), bool((predicted.argmax(1) == wanted).all()))


def test_scores_do_not_depend_on_the_batch(run: Path) -> None:
    """Catches padding that is seen, windows cut at the wrong end, and results in another order."""
    trained = open_trained(run)
    generator = random.Random(0)
    vocab, positions = trained.model.config.vocab_size, trained.model.config.n_positions
    requests = []
    for length in [1, 2, 3, positions - 1, positions, 2 * positions, 5, 7, 1]:
        ids = [generator.randrange(vocab) for _ in range(length + generator.randint(1, positions // 2))]
        requests.append(Request(ids[:length], ids[length:]))
    greedy = trained.model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax().item()
    requests.append(Request([1, 2, 3], [int(greedy)]))
    wanted = [log_likelihood(trained, list(item.context), list(item.continuation)) for item in requests]
    assert wanted[-1].is_greedy
    for batch_tokens in (1, 2 * positions, 10**6):
        scorer = Scorer(trained.model, positions, torch.device("cpu"), batch_tokens)
        for score, expected in zip(scorer(requests), wanted, strict=True):
            assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
            assert score.is_greedy == expected.is_greedy


def test_bad_requests_are_refused(run: Path) -> None:
    """Catches likelihoods of nothing, and of a continuation that was cut."""
    trained = open_trained(run)
    scorer = Scorer(trained.model, 16, torch.device("cpu"))
    with pytest.raises(ValueError, match="at least one token of context"):
        scorer([Request([], [1])])
    with pytest.raises(ValueError, match="continuation of 17 tokens is longer"):
        scorer([Request([1], [1] * 17)])


def test_token_statistics_against_probabilities() -> None:
    """Catches a confidence that is a logit, and a label shifted by one."""
    logits, labels = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    probability = logits.softmax(-1)
    statistics = token_statistics(logits, labels)
    for row in range(2):
        for t in range(5):
            assert statistics.nats[row, t].exp() * probability[row, t, labels[row, t]] == pytest.approx(1)
            assert statistics.confidence[row, t] == pytest.approx(float(probability[row, t].max()))
            assert bool(statistics.hit[row, t]) == (int(probability[row, t].argmax()) == int(labels[row, t]))


def test_each_output_type_against_the_model(
    run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches values that the harness gets from anything but this model's probabilities."""
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert main([str(run), "--tasks", ",".join(TASKS), "--include_path", str(tasks)]) == 0
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])
    trained = open_trained(run)
    found = json.loads((run / "evaluation" / "tasks_00000012.json").read_text())
    metrics = found["metrics"]
    encode = trained.tokenizer.encode

    def score(context: str, continuation: str) -> Score:
        whole, start = encode(context + continuation), len(encode(context))
        return log_likelihood(trained, whole[:start], whole[start:])

    right, normed, nats, greedy, text_nats, characters, exact = 0, 0, 0.0, 0, 0.0, 0, 0
    for example in EXAMPLES:
        scores = [score(example["q"], option).log_likelihood for option in example["options"]]
        lengths = [len(option) for option in example["options"]]
        right += int(np.argmax(scores)) == example["label"]
        normed += int(np.argmax(np.array(scores) / lengths)) == example["label"]
        word = score(example["q"], example["right"])
        nats, greedy = nats - word.log_likelihood, greedy + word.is_greedy
        text = f"{example['q']}{example['right']}{REST}"
        text_nats -= rolling(trained, encode(text))
        characters += len(text.encode())
        ids = write_greedily(trained.model, trained.tokenizer.eot_id, [encode(example["q"])], 4)[0]
        exact += trained.tokenizer.decode(ids).split("a")[0] == example["right"]
    count = len(EXAMPLES)
    assert metrics["tiny_choice"]["acc"] == right / count
    assert metrics["tiny_choice"]["acc_norm"] == normed / count
    assert metrics["tiny_word"]["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert metrics["tiny_word"]["acc"] == greedy / count
    assert metrics["tiny_text"]["bits_per_byte"] == pytest.approx(
        text_nats / characters / math.log(2), rel=1e-5
    )
    assert metrics["tiny_answer"]["exact_match"] == exact / count
    assert found["num_examples"] == dict.fromkeys(TASKS, count)
    assert found["step"] == 12
    printed = capsys.readouterr().out
    assert all(name in printed for name in TASKS)
    assert (run / "evaluation" / "tasks_00000012.md").read_text() == printed
    assert list((run / "tb" / "evaluation").glob("events*"))


def rolling(trained: TrainedModel, ids: list[int]) -> float:
    """Log-likelihood of a text, each token once: full windows, each begun with the token before it."""
    size = trained.model.config.n_positions
    total = 0.0
    for first in range(0, len(ids), size):
        part = ids[first : first + size]
        if first + size > len(ids) and first:  # the harness's last window reaches back as far as it can
            before = ids[len(ids) - size - 1 : first]
            total += log_likelihood(trained, before, part).log_likelihood
        else:
            before = [trained.tokenizer.eot_id] if first == 0 else ids[first - 1 : first]
            total += log_likelihood(trained, before, part).log_likelihood
    return total


@pytest.mark.dist
@pytest.mark.parametrize("layout", [{"parallel__dp_shard": 2}, {"parallel__tp": 2}])
def test_sharded_models_score_the_same(tiny_world: Path, tmp_path: Path, layout: dict[str, int]) -> None:
    """Catches ranks that wait for each other when the batches do not divide, and results of one rank."""
    config = tiny_config(tiny_world, tmp_path / "run", "cocomix", **layout)
    generator = random.Random(1)
    requests = [
        Request(*([generator.randrange(290) for _ in range(generator.randint(1, 9))] for _ in range(2)))
        for _ in range(7)
    ]

    def score(world: World) -> list[Score]:
        ranks = 1 if world.size == 1 else 2
        changed = config if ranks == 2 else tiny_config(tiny_world, tmp_path / "one", "cocomix")
        parts = build_parts(changed, world)
        parts.engine.model.eval()
        scorer = Scorer(parts.engine.model, 16, world.device, 24, parts.mesh)
        scores = scorer(requests)
        parts.loader.close()
        return scores

    (alone,) = run_ranks(score, 1)
    first, second = run_ranks(score, 2)
    assert first == second
    for ours, theirs in zip(first, alone, strict=True):
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-4)
        assert ours.is_greedy == theirs.is_greedy


@pytest.fixture(scope="module")
def ntp_run(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tiny_world, tmp_path_factory.mktemp("one") / "ntp", "ntp")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "no_such_task"], "task=no_such_task is unknown"),
        (["--include_path", "missing"], "missing: no such folder of tasks"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(
    ntp_run: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    """Catches tracebacks of the harness."""
    assert main([str(ntp_run), *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_data_that_cannot_be_had(ntp_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback where there is no network."""
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: loglikelihood\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{q}}"\nmetric_list:\n  - {metric: acc}\n'
    )
    assert main([str(ntp_run), "--tasks", "far", "--include_path", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the data of task far cannot be had: ")


def test_limit_and_examples_in_the_prompt(ntp_run: Path, tasks: Path) -> None:
    """Catches options that do not arrive."""
    trained = open_trained(ntp_run)
    asked: list[int] = []

    class Counting(Scorer):
        def __call__(self, requests: Any, progress: Any = None) -> list[Score]:
            asked.extend(len(item.context) for item in requests)
            return super().__call__(requests, progress)

    scorer = Counting(trained.model, 16, torch.device("cpu"))
    results = run_tasks(
        scorer, trained.tokenizer, lambda prompts, _: prompts, ["tiny_w*"], include_path=tasks, limit=2
    )
    assert results is not None
    assert results.num_examples == {"tiny_word": 2}
    assert len(asked) == 2


@pytest.mark.dist
def test_tasks_in_training(tiny_world: Path, tasks: Path, tmp_path: Path) -> None:
    """Catches an evaluation that changes the training, and values that are not those of the weights."""
    names = {"tasks__names": tuple(TASKS), "tasks__every_steps": 6, "tasks__include_path": str(tasks)}
    layout = {"parallel__dp_shard": 2}
    plain = tiny_config(tiny_world, tmp_path / "plain", **layout)
    evaluated = tiny_config(tiny_world, tmp_path / "evaluated", **layout, **names)
    for config in (plain, evaluated):
        run_ranks(lambda world, config=config: train(config, world, StopRequest()), 2)
    values = [
        [
            (record["loss_ntp"], record.get("val_loss_ntp"))
            for record in read_json_lines(path / "metrics.jsonl")
        ]
        for path in (tmp_path / "plain", tmp_path / "evaluated")
    ]
    assert values[0] == values[1]
    folder = tmp_path / "evaluated" / "evaluation"
    assert [path.name for path in sorted(folder.glob("*.json"))] == [
        "tasks_00000006.json",
        "tasks_00000012.json",
    ]
    in_training = json.loads((folder / "tasks_00000012.json").read_text())["metrics"]
    assert main([str(tmp_path / "evaluated"), "--tasks", ",".join(TASKS), "--include_path", str(tasks)]) == 0
    after = json.loads((folder / "tasks_00000012.json").read_text())["metrics"]
    for task, metrics in in_training.items():
        for name, value in metrics.items():
            assert after[task][name] == pytest.approx(value, rel=1e-4), (task, name)
