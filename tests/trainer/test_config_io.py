"""The config loader: what it accepts, what it refuses, and that each refusal names the culprit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import yaml

from trainer.config_io import ConfigError, dump_config, from_dict, load_config, to_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    lr: float
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "wsd"] = "cosine"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be above 0")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} must be at most lr={self.lr}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Concepts:
    top_k: int
    level: Literal[0, 1] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    every: int = 10
    prompts: tuple[str, ...] = ()
    tensorboard: bool = True
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    name: str
    optim: Optim
    steps: int = 1
    concepts: Concepts | None = None
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        if self.steps == 7 and self.concepts is not None:
            raise ValueError(f"steps=7 does not go with concepts.top_k={self.concepts.top_k}")


TEXT = """\
name: first
optim:
  lr: 6e-4
concepts:
  top_k: 4
"""

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load ``text`` as ``x.yaml`` with overrides."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *overrides: str) -> Config:
        Path("x.yaml").write_text(text, encoding="utf-8")
        return load_config(Config, "x.yaml", overrides)

    return run


def refusal(load: Load, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_lines(lines: str) -> str:
    return TEXT + lines


def test_file_and_defaults(load: Load) -> None:
    """Catches defaults or nested sections that get lost."""
    expected = Config(name="first", optim=Optim(lr=6e-4), concepts=Concepts(top_k=4))
    assert load(TEXT) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4),
        ("1E3", 1000.0),
        ("-1.5e+2", None),
        ("1", 1.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("1_000", 1000.0),
    ],
)
def test_floats(load: Load, text: str, value: float | None) -> None:
    """Catches YAML 1.1's reading of 6e-4 as a string, and whole numbers refused for a float."""
    source = TEXT.replace("6e-4", text)
    if value is None:
        assert refusal(load, source) == "x.yaml: optim.lr=-150.0 must be above 0"
    else:
        lr = load(source).optim.lr
        assert lr == value
        assert type(lr) is float


@pytest.mark.parametrize(
    "word",
    ["yes", "no", "on", "off", "y", "12:30:45", "2024-01-01", "010", "0x1f", "1.2.3", "=", "<<", "6e", "e5"],
)
def test_plain_words_stay_strings(load: Load, word: str) -> None:
    """Catches YAML 1.1's booleans, sexagesimal and octal numbers and dates in a string's place."""
    assert load(TEXT.replace("first", word)).name == word


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("optm:\n", "x.yaml:6: unknown key optm, did you mean optim?"),
        ("log:\n  evry: 3\n", "x.yaml:7: unknown key log.evry, did you mean log.every?"),
        (
            "log:\n  zzz: 3\n",
            "x.yaml:7: unknown key log.zzz, known keys are every, prompts, tensorboard, note",
        ),
        ("log:\n  every: 3\n  every: 4\n", "x.yaml:8: duplicate key 'every', first given in line 7"),
        ("optim:\n  lr: 1\n", "x.yaml:6: duplicate key 'optim', first given in line 2"),
        ("<<: {steps: 3}\n", "x.yaml:6: unknown key <<, known keys are name, optim, steps, concepts, log"),
        ("[a]: 3\n", "x.yaml:6: a key must be one word, not a list or a mapping"),
        ("steps: 1.5\n", "x.yaml:6: steps=1.5 must be an integer"),
        ("steps: 1e3\n", "x.yaml:6: steps=1000.0 must be an integer"),
        ("steps: true\n", "x.yaml:6: steps=true must be an integer"),
        ("steps: '3'\n", "x.yaml:6: steps='3' must be an integer"),
        ("steps: 010\n", "x.yaml:6: steps='010' must be an integer"),
        ("steps: 12:30:45\n", "x.yaml:6: steps='12:30:45' must be an integer"),
        ("steps:\n", "x.yaml:6: steps=null must be an integer"),
        ("log: 3\n", "x.yaml:6: log=3 must be a section"),
        ("log:\n", "x.yaml:6: log=null must be a section"),
        ("log:\n  tensorboard: 1\n", "x.yaml:7: log.tensorboard=1 must be true or false"),
        ("log:\n  tensorboard: maybe\n", "x.yaml:7: log.tensorboard='maybe' must be true or false"),
        ("log:\n  note: 3\n", "x.yaml:7: log.note=3 must be a string (in quotes) or null"),
        (
            "log:\n  prompts: text\n",
            "x.yaml:7: log.prompts='text' must be a list of any number of items, each a string (in quotes)",
        ),
        ("log:\n  prompts:\n  - a\n  - 3\n", "x.yaml:9: log.prompts[1]=3 must be a string (in quotes)"),
    ],
)
def test_refused_lines(load: Load, lines: str, message: str) -> None:
    """Catches a mistake that is swallowed, or whose message does not lead to the line."""
    assert refusal(load, with_lines(lines)) == message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("6e-4", "true", "x.yaml:3: optim.lr=true must be a finite number"),
        ("6e-4", "fast", "x.yaml:3: optim.lr='fast' must be a finite number"),
        ("6e-4", ".nan", "x.yaml:3: optim.lr='.nan' must be a finite number"),
        ("6e-4", "1e999", "x.yaml:3: optim.lr=inf must be a finite number"),
        ("6e-4", "9" * 400, f"x.yaml:3: optim.lr={'9' * 57}... must be a finite number"),
        ("6e-4", "1\n  betas: [0.9]", "x.yaml:4: optim.betas=[0.9] has 1 items, must be a list of 2 items"),
        (
            "6e-4",
            "1\n  schedule: linear",
            "x.yaml:4: optim.schedule='linear' must be one of cosine, wsd",
        ),
        ("  top_k: 4", "  top_k: 4\n  level: true", "x.yaml:6: concepts.level=true must be one of 0, 1"),
        ("  lr: 6e-4", "  min_lr: 0", "x.yaml:2: optim.lr is missing, must be a finite number"),
        ("name: first\n", "", "x.yaml: name is missing, must be a string (in quotes)"),
        ("first", "5", "x.yaml:1: name=5 must be a string (in quotes)"),
        ("first", "&a x\nsteps: *a", "x.yaml:2: is not valid YAML: aliases (*name) are not allowed"),
        ("first", "!!python/name:os.system x", "x.yaml:1: is not valid YAML: could not determine"),
        ("first", "!!int x", "x.yaml:1: is not valid YAML: invalid literal for int()"),
        ("first", "!!bool x", "x.yaml:1: is not valid YAML: 'x'"),
        ("first", "a: b", "x.yaml:1: is not valid YAML: mapping values are not allowed here"),
        ("  lr: 6e-4", "\tlr: 6e-4", "x.yaml:3: is not valid YAML: found character '\\t'"),
        (TEXT, "", "x.yaml: must hold a mapping of sections"),
        (TEXT, "- a\n", "x.yaml: must hold a mapping of sections"),
        (TEXT, TEXT + "---\n" + TEXT, "x.yaml:6: is not valid YAML: but found another document"),
        (TEXT, "[" * 5000, "x.yaml: is not valid YAML: maximum recursion depth"),
        (TEXT, "a: \x01", "x.yaml: is not valid YAML: unacceptable character"),
    ],
)
def test_refused_files(load: Load, old: str, new: str, message: str) -> None:
    """Catches unsafe tags, non-finite numbers, broken YAML and missing keys that pass or give a traceback."""
    assert old in TEXT
    assert refusal(load, TEXT.replace(old, new)).startswith(message)


def test_unreadable_files(tmp_path: Path) -> None:
    """Catches a traceback for a missing file, a folder or bytes that are not UTF-8."""
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff\n")
    for path, reason in [(tmp_path / "no.yaml", "No such file"), (tmp_path, "directory"), (binary, "UTF-8")]:
        with pytest.raises(ConfigError, match=reason) as caught:
            load_config(Config, path)
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("lr: 0", "x.yaml: optim.lr=0.0 must be above 0"),
        ("lr: 1\n  min_lr: 2", "x.yaml: optim.min_lr=2.0 must be at most lr=1.0"),
        ("lr: 1\nsteps: 7", "x.yaml: steps=7 does not go with concepts.top_k=4"),
    ],
)
def test_checks_of_a_section(load: Load, lines: str, message: str) -> None:
    """Catches a dataclass's own check that comes through without file or section."""
    assert refusal(load, TEXT.replace("lr: 6e-4", lines)) == message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--steps=3"], {"steps": 3}),
        (["--steps", "-3"], {"steps": -3}),
        (["--steps=3", "--steps=4"], {"steps": 4}),
        (["--name=2024"], {"name": "2024"}),
        (["--name", "a: 'b' # c"], {"name": "a: 'b' # c"}),
        (["--name="], {"name": ""}),
        (["--name=a=b"], {"name": "a=b"}),
        (["--optim.lr=1e-3", "--optim.schedule=wsd"], {"optim": Optim(lr=1e-3, schedule="wsd")}),
        (["--optim.betas=[0, 1]"], {"optim": Optim(lr=6e-4, betas=(0.0, 1.0))}),
        (["--concepts=null"], {"concepts": None}),
        (["--concepts={top_k: 9}", "--concepts.level=1"], {"concepts": Concepts(top_k=9, level=1)}),
        (["--log.tensorboard=no"], {"log": Log(tensorboard=False)}),
        (["--log.prompts=['yes', on]"], {"log": Log(prompts=("yes", "on"))}),
        (["--log.note=null"], {}),
        (["--log={every: 2}"], {"log": Log(every=2)}),
    ],
)
def test_overrides(load: Load, overrides: list[str], expected: dict[str, Any]) -> None:
    """Catches an override that is lost, is read as another type, or cannot reach a default section."""
    assert load(TEXT, *overrides) == replace(load(TEXT), **expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optm.lr=1"], "--optm.lr=1: unknown key optm, did you mean optim?"),
        (["--optim.lrr", "1"], "--optim.lrr=1: unknown key optim.lrr, did you mean optim.lr?"),
        (["--steps=many"], "--steps=many: steps='many' must be an integer"),
        (["--steps="], "--steps=: steps=null must be an integer"),
        (["--steps.x=1"], "--steps.x=1: steps is a value, not a section"),
        (["--optim=3"], "--optim=3: optim=3 must be a section"),
        (["--optim={lr: 0}"], "--optim={lr: 0}: optim.lr=0.0 must be above 0"),
        (["--optim={lr: 1, lr: 2}"], "--optim={lr: 1, lr: 2}: duplicate key 'lr'"),
        (["--optim.lr=0"], "--optim.lr=0: optim.lr=0.0 must be above 0"),
        (["--optim.schedule=x"], "--optim.schedule=x: optim.schedule='x' must be one of cosine, wsd"),
        (["--optim.betas=[1"], "--optim.betas=[1: is not valid YAML: "),
        (["--steps=7"], "--steps=7: steps=7 does not go with concepts.top_k=4"),
        (["--concepts.top_k=5", "--steps=7"], "--steps=7 --concepts.top_k=5: steps=7 does not go"),
        (["--optim.min_lr=1", "--log.every=3"], "--optim.min_lr=1: optim.min_lr=1.0 must be at most lr="),
        (["steps=3"], "argument 'steps=3' is not of the form --section.key=value"),
        (["--"], "argument '--' is not of the form --section.key=value"),
        (["--=3"], "argument '--=3' is not of the form --section.key=value"),
        (["--steps"], "--steps: a value is missing, write --steps=value"),
        (["--steps", "--name=x"], "--steps: a value is missing, write --steps=value"),
        (
            ["--concepts=null", "--concepts.top_k=3"],
            "--concepts.top_k=3: section concepts is absent in x.yaml, add the whole section there",
        ),
    ],
)
def test_refused_overrides(load: Load, overrides: list[str], message: str) -> None:
    """Catches an override error that blames the file, or an override that is ignored."""
    assert refusal(load, TEXT, *overrides).startswith(message)


def test_override_into_an_absent_section(load: Load) -> None:
    """Catches half a section that is made up from one override."""
    text = TEXT[: TEXT.index("concepts")]
    message = "--concepts.top_k=3: section concepts is absent in x.yaml, add the whole section there"
    assert refusal(load, text, "--concepts.top_k=3") == message


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "6e-4",
        "12:30:45",
        "2024-01-01",
        "010",
        "null",
        "~",
        "",
        "3",
        "a: b # c",
        "two\nlines",
        "é\u2028",
        "<<",
    ],
)
def test_dump_loads_back_equal(load: Load, text: str) -> None:
    """Catches a string that a dump leaves unquoted, here and for a reader of YAML 1.1."""
    log = Log(prompts=(text,), note=None, tensorboard=False)
    config = Config(name=text, optim=Optim(lr=1e-8, betas=(1 / 3, 0.1)), log=log)
    dumped = dump_config(config)
    assert load(dumped) == config
    assert yaml.safe_load(dumped) == to_dict(config)
    assert from_dict(Config, to_dict(config), "memory") == config


def test_from_dict_names_its_source() -> None:
    """Catches a stored configuration of another version that is read silently."""
    stored = to_dict(Config(name="a", optim=Optim(lr=1.0)))
    stored["optim"]["momentum"] = 0.9
    with pytest.raises(ConfigError, match=r"^step_1: unknown key optim\.momentum"):
        from_dict(Config, stored, "step_1")
    with pytest.raises(ConfigError, match=r"^step_1: must hold a mapping of sections"):
        from_dict(Config, cast(Any, []), "step_1")


def test_unsupported_field_type_is_a_programming_error() -> None:
    """Catches a new field whose type would be accepted unchecked."""

    @dataclass(frozen=True)
    class Odd:
        value: complex

    with pytest.raises(TypeError, match="complex"):
        from_dict(Odd, {"value": 1}, "x")


def test_environment_is_not_read(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches expansion of variables: a run would then depend on more than its file."""
    monkeypatch.setenv("STEPS", "3")
    assert load(TEXT.replace("first", "$STEPS/${STEPS}/~")).name == "$STEPS/${STEPS}/~"


def test_loading_needs_no_torch() -> None:
    """Catches an import that makes launch scripts and the checkpoint store wait for torch."""
    code = "import sys, trainer.config, trainer.config_io; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
