"""Strict YAML to frozen dataclasses, dotted overrides, and back (torch-free).

The dataclass decides what a value may be: nothing is converted except whole numbers to float
where a float is expected. Every refusal is a :class:`ConfigError` of one line that names the file
and line, or the override, and the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")

# PyYAML's own resolvers follow YAML 1.1; these follow YAML 1.2 without its octal and hex integers.
_SCALARS: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {
    None: [
        ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z")),
        ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")),
        ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)\Z")),
        (
            "tag:yaml.org,2002:float",
            re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?\Z"),
        ),
    ]
}
_KIND = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string (in quotes)"}


class ConfigError(ValueError):
    """A configuration that was refused; its text is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def load_config(cls: type[T], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> T:
    """Read a YAML file strictly into the dataclass ``cls`` and apply command-line overrides.

    Args:
        cls: dataclass of the whole file; nested dataclasses are its sections.
        path: YAML file.
        overrides: ``--section.key=value`` or ``--section.key``, ``value``; the last one of a key wins.
            A value for a string is taken as it is, any other is read as YAML; ``--section=null``
            removes an optional section.

    Returns:
        The checked configuration. The environment is never read.

    Raises:
        ConfigError: unreadable file, unknown, missing or duplicate key, wrong type, refused value.
    """
    root = _read_file(Path(path))
    for dotted, text, source in _split_overrides(overrides):
        _apply_override(cls, root, dotted, text, source)
    config: T = _build(cls, root, "")
    return config


def from_dict(cls: type[T], mapping: Mapping[str, Any], source: str) -> T:
    """Build ``cls`` from plain values under the rules of :func:`load_config`.

    Args:
        cls: dataclass of the whole mapping.
        mapping: what :func:`to_dict` returns.
        source: what error messages call the mapping, for example a checkpoint's path.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    config: T = _build(cls, _from_plain(mapping, source), "")
    return config


def to_dict(config: object) -> dict[str, Any]:
    """Turn a configuration into nested dicts, lists and scalars that JSON and YAML can hold."""
    assert dataclasses.is_dataclass(config)
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def dump_config(config: object) -> str:
    """Write a configuration as YAML, every default included; it loads back equal."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# ---- YAML ------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """A safe loader whose plain scalars are the JSON types and strings.

    YAML 1.1 reads ``6e-4`` as a string, ``12:30:45`` as 45045, ``010`` as 8, ``no`` as false and
    dates as objects. Here the first is a number and the others are strings.
    """

    yaml_implicit_resolvers = _SCALARS

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases: a file is complete and plain, and an alias may be a circle."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not allowed", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes each string that this loader or YAML 1.1 would read as something else."""

    yaml_implicit_resolvers = yaml.SafeDumper.yaml_implicit_resolvers | _SCALARS


@dataclass(slots=True)
class _Node:
    """A parsed value (scalar, ``list[_Node]`` or ``dict[str, _Node]``) that knows where it stands."""

    value: Any
    source: str
    line: int = 0
    overridden: bool = False

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


def _read_file(path: Path) -> _Node:
    try:
        root = _parse(path.read_text(encoding="utf-8"), str(path), lines=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from error
    root.line = 0
    return root


def _parse(text: str, source: str, *, lines: bool) -> _Node:
    """Parse one YAML document; an error names ``source`` and, with ``lines``, the line."""
    loader = None
    try:
        loader = _Loader(text)
        return _from_yaml(loader, loader.get_single_node(), source, lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}" if lines and mark else source
        raise ConfigError(f"{where}: is not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source}: is not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _from_yaml(loader: _Loader, node: yaml.Node | None, source: str, lines: bool) -> _Node:
    if node is None:
        return _Node(None, source)
    line = node.start_mark.line + 1 if lines else 0
    if isinstance(node, yaml.MappingNode):
        return _Node(_mapping(loader, node, source, lines), source, line)
    if isinstance(node, yaml.SequenceNode):
        return _Node([_from_yaml(loader, item, source, lines) for item in node.value], source, line)
    return _Node(_scalar(loader, node), source, line)


def _scalar(loader: _Loader, node: yaml.Node) -> object:
    """Construct one scalar; a tag such as ``!!python/name`` or a malformed ``!!int`` is a YAML error."""
    try:
        value: object = loader.construct_object(node)
    except (ValueError, KeyError) as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error
    return value


def _mapping(loader: _Loader, node: yaml.MappingNode, source: str, lines: bool) -> dict[str, _Node]:
    """Read a mapping's entries; each value stands at its key's line. Refuses duplicate keys."""
    entries: dict[str, _Node] = {}
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"{source}:{line}" if lines else source
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key must be one word, not a list or a mapping")
        key = str(key_node.value)
        if key in entries:
            raise ConfigError(f"{where}: duplicate key {key!r}, first given in line {first_line[key]}")
        entries[key] = _from_yaml(loader, value_node, source, lines)
        entries[key].line = line if lines else 0
        first_line[key] = line
    return entries


def _from_plain(value: object, source: str) -> _Node:
    if isinstance(value, Mapping):
        return _Node({str(key): _from_plain(item, source) for key, item in value.items()}, source)
    if isinstance(value, (list, tuple)):
        return _Node([_from_plain(item, source) for item in value], source)
    return _Node(value, source)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# ---- overrides -------------------------------------------------------------------------------------------


def _split_overrides(arguments: Sequence[str]) -> list[tuple[str, str, str]]:
    """Split ``--a.b=c`` and ``--a.b c`` into (dotted key, value, the argument as the user typed it)."""
    overrides = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument.startswith(("--=", "--.")) or argument == "--":
            raise ConfigError(f"argument {argument!r} is not of the form --section.key=value")
        dotted, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{argument}: a value is missing, write {argument}=value")
            text = rest.pop(0)
        overrides.append((dotted, text, f"--{dotted}={text}"))
    return overrides


def _apply_override(cls: type, root: _Node, dotted: str, text: str, source: str) -> None:
    """Set the node at ``dotted`` in place; the way there must exist or have a default section."""
    *sections, key = dotted.split(".")
    node, path = root, ""
    for section in sections:
        if not isinstance(node.value, dict):
            raise ConfigError(f"{node.where}: {path or 'the file'} must be a mapping")
        field = _field(cls, section, path, source)
        path = _join(path, section)
        cls = _section_type(field, path, source)
        node = _enter(node, field, path, source)
    hint = _field(cls, key, path, source).type
    new = _Node(text, source) if _is_text(hint) else _parse(text, source, lines=False)
    node.value[key] = _mark_overridden(new)


def _section_type(field: _Field, path: str, source: str) -> type:
    section = _without_none(field.type)
    if not dataclasses.is_dataclass(section):
        raise ConfigError(f"{source}: {path} is a value, not a section")
    assert isinstance(section, type)
    return section


def _enter(parent: _Node, field: _Field, path: str, source: str) -> _Node:
    """Return a section's node; one that the file leaves to its default starts empty."""
    if field.name not in parent.value and field.has_default and field.default is not None:
        parent.value[field.name] = _Node({}, parent.source)
    child: _Node = parent.value.get(field.name, _Node(None, parent.source))
    if child.value is None:
        raise ConfigError(
            f"{source}: section {path} is absent in {parent.source}, add the whole section there"
        )
    if not isinstance(child.value, dict):
        raise ConfigError(f"{child.where}: {path}={_show(child)} must be a section")
    return child


def _mark_overridden(node: _Node) -> _Node:
    node.overridden = True
    children = node.value.values() if isinstance(node.value, dict) else node.value
    if isinstance(node.value, (dict, list)):
        for child in children:
            _mark_overridden(child)
    return node


# ---- dataclasses -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Field:
    """A dataclass field with its resolved type and default."""

    name: str
    type: Any
    default: Any

    @property
    def has_default(self) -> bool:
        return self.default is not MISSING


def _fields(cls: type) -> dict[str, _Field]:
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        factory = field.default_factory
        default = factory() if factory is not MISSING else field.default
        found[field.name] = _Field(field.name, hints[field.name], default)
    return found


def _field(cls: type, key: str, path: str, where: str) -> _Field:
    """Look a key up; an unknown one is refused with the nearest key that exists."""
    fields = _fields(cls)
    if key in fields:
        return fields[key]
    near = difflib.get_close_matches(key, fields, n=1)
    hint = f"did you mean {_join(path, near[0])}?" if near else f"known keys are {', '.join(fields)}"
    raise ConfigError(f"{where}: unknown key {_join(path, key)}, {hint}")


def _build(cls: type, node: _Node, path: str) -> Any:
    """Build a dataclass from a mapping node; ``path`` is the section's dotted name."""
    if not isinstance(node.value, dict):
        what = f"{path}={_show(node)} must be a section" if path else "must hold a mapping of sections"
        raise ConfigError(f"{node.where}: {what}")
    for key, child in node.value.items():
        _field(cls, key, path, child.where)
    arguments = {}
    for field in _fields(cls).values():
        if field.name in node.value:
            arguments[field.name] = _convert(field.type, node.value[field.name], _join(path, field.name))
        elif not field.has_default:
            raise ConfigError(f"{node.where}: {_join(path, field.name)} is missing, {_expected(field.type)}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise _refused(str(error), cls, node, path) from error


def _refused(message: str, cls: type, node: _Node, path: str) -> ConfigError:
    """Put source and section before a ``__post_init__`` message, or the overrides of the keys it names."""
    names = re.findall(r"[A-Za-z_][\w.]*(?=[=:])", message)
    named = [found for name in names if (found := _find(node, name)) is not None and found.overridden]
    source = " ".join(dict.fromkeys(found.source for found in named)) or node.source
    starts_with_key = bool(names) and message.startswith(names[0]) and names[0] in _fields(cls)
    section = (path + ("." if starts_with_key else ": ")) if path else ""
    return ConfigError(f"{source}: {section}{message}")


def _find(node: _Node, dotted: str) -> _Node | None:
    for key in dotted.split("."):
        if not isinstance(node.value, dict) or key not in node.value:
            return None
        node = node.value[key]
    return node


def _convert(hint: Any, node: _Node, path: str) -> Any:
    """Check a node against a type hint and return the value.

    Raises:
        ConfigError: the value is not of the type.
        TypeError: a dataclass uses a type that this module does not know.
    """
    inner = _without_none(hint)
    if inner is not hint and node.value is None:
        return None
    if dataclasses.is_dataclass(inner):
        assert isinstance(inner, type)
        return _build(inner, node, path)
    if typing.get_origin(inner) is tuple:
        return _to_tuple(inner, node, path)
    check = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}.get(inner)
    value = check(node.value) if check else _to_choice(inner, node.value)
    if value is None:
        raise ConfigError(f"{node.where}: {path}={_show(node)} {_expected(hint)}")
    return value


def _to_bool(value: object) -> bool | None:
    # YAML 1.1's words arrive as strings; they mean a bool only where one is expected.
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None


def _to_int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _to_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _to_str(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _to_choice(hint: Any, value: object) -> Any:
    if typing.get_origin(hint) is not Literal:
        raise TypeError(f"{hint} is not a type that a configuration can hold")
    # True == 1 in Python, so equality alone would let a bool pass for a number.
    matches = [choice for choice in typing.get_args(hint) if choice == value and type(choice) is type(value)]
    return matches[0] if matches else None


def _to_tuple(hint: Any, node: _Node, path: str) -> tuple[Any, ...]:
    items = typing.get_args(hint)
    if not isinstance(node.value, list):
        raise ConfigError(f"{node.where}: {path}={_show(node)} {_expected(hint)}")
    if items[-1] is Ellipsis:
        items = (items[0],) * len(node.value)
    if len(items) != len(node.value):
        raise ConfigError(
            f"{node.where}: {path}={_show(node)} has {len(node.value)} items, {_expected(hint)}"
        )
    return tuple(
        _convert(item, child, f"{path}[{index}]")
        for index, (item, child) in enumerate(zip(items, node.value, strict=True))
    )


def _without_none(hint: Any) -> Any:
    """Return X of ``X | None`` and every other hint as it is."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [item for item in typing.get_args(hint) if item is not types.NoneType]
        if len(inner) != 1:
            raise TypeError(f"{hint} is not a type that a configuration can hold")
        return inner[0]
    return hint


def _is_text(hint: Any) -> bool:
    return hint is str or (
        typing.get_origin(hint) is Literal
        and all(isinstance(choice, str) for choice in typing.get_args(hint))
    )


def _expected(hint: Any) -> str:
    """Say what a key takes: ``must be an integer``."""
    inner = _without_none(hint)
    if dataclasses.is_dataclass(inner):
        text = "a section"
    elif typing.get_origin(inner) is tuple:
        text = _expected_list(typing.get_args(inner))
    elif typing.get_origin(inner) is Literal:
        text = "one of " + ", ".join(map(str, typing.get_args(inner)))
    else:
        text = _KIND.get(inner, str(inner))
    return f"must be {text}{'' if inner is hint else ' or null'}"


def _expected_list(items: tuple[Any, ...]) -> str:
    length = "any number of items" if items[-1] is Ellipsis else f"{len(items)} items"
    return f"a list of {length}, each {_expected(items[0]).removeprefix('must be ')}"


def _show(node: _Node) -> str:
    """Show a value as YAML's user would write it, shortened."""
    value = node.value
    if isinstance(value, (dict, list)):
        text = "{...}" if isinstance(value, dict) else f"[{', '.join(_show(item) for item in value)}]"
    else:
        text = {None: "null", True: "true", False: "false"}[value] if _is_word(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_word(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
