"""Records of measurements: ``benchmarks/records/<date>_<theme>_<hardware>/``.

A record holds ``record.json`` (command, configuration, versions, hardware, commit, results) and
``log.txt`` (what the program printed).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from data.files import replace_text, sync_folder
from trainer.checkpoint.state import code_version

RECORDS = Path(__file__).parent / "records"
LIBRARIES = (
    "torch",
    "torchtitan",
    "webdataset",
    "numpy",
    "safetensors",
    "tokenizers",
    "xxhash",
    "deepspeed",
    "triton",
)


@dataclass(slots=True)
class Transcript:
    """Prints lines and keeps them for the record.

    Args:
        hidden: texts that are replaced, such as a temporary folder's path.
    """

    hidden: dict[str, str] = field(default_factory=dict)
    _lines: list[str] = field(default_factory=list)

    def say(self, text: str = "") -> None:
        """Print a line (or several) and keep it."""
        for secret, shown in self.hidden.items():
            text = text.replace(secret, shown)
        self._lines.append(text)
        print(text, flush=True)

    @property
    def text(self) -> str:
        """Everything that was said."""
        return "".join(f"{line}\n" for line in self._lines)


def command_line(module: str, argv: Sequence[str] | None = None) -> str:
    """How a program was called, as one would type it; ``argv`` as for its ``main``."""
    arguments = sys.argv[1:] if argv is None else argv
    return " ".join(["python", "-m", module, *arguments])


def write_record(
    theme: str,
    *,
    command: str,
    config: Mapping[str, Any],
    results: Any,
    log: str,
    root: Path = RECORDS,
) -> Path:
    """Write a record, which appears whole or not at all and replaces none.

    Args:
        theme: what was measured, for the folder's name: lower-case letters, digits, ``-``.
        command: what to type to measure it again.
        config: JSON-able; everything that the results depend on beside the code.
        results: JSON-able.
        log: what the program printed.
        root: folder of all records.

    Returns:
        The record's folder.

    Raises:
        ValueError: the theme cannot be part of a folder's name.
    """
    if not re.fullmatch(r"[a-z0-9-]+", theme):
        raise ValueError(f"theme={theme!r} must be lower-case letters, digits and '-'")
    hardware, now = describe_hardware(), datetime.now(UTC)
    body = {
        "theme": theme,
        "time": now.isoformat(timespec="seconds"),
        "command": command,
        "config": config,
        "versions": versions(),
        "hardware": hardware,
        "git_commit": code_version(),
        "results": results,
    }
    text = json.dumps(body, indent=2, allow_nan=False) + "\n"
    root.mkdir(parents=True, exist_ok=True)
    draft = root / f".tmp-{uuid.uuid4().hex[:12]}"
    draft.mkdir()
    try:
        replace_text(draft / "record.json", text)
        replace_text(draft / "log.txt", log)
        return _publish(draft, root / f"{now:%Y-%m-%d}_{theme}_{hardware['name']}")
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _publish(draft: Path, wanted: Path) -> Path:
    """Give the finished folder its name, or the next free one with a number behind."""
    number, target = 1, wanted
    while target.exists():
        number += 1
        target = wanted.with_name(f"{wanted.name}_{number}")
    draft.rename(target)
    sync_folder(target.parent)
    return target


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_hardware() -> dict[str, Any]:
    """This machine: ``name`` for folders, processor, cores, memory, GPUs, and the load it is under."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0))
    model = f"{len(gpus)}x-{gpus[0]}" if gpus else f"{cores}x-cpu"
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-"),
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": gpus,
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor()
