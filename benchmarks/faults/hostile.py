"""Files made by somebody who wants to run code or to write elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from torch.distributed.checkpoint.filesystem import FileSystemReader

from benchmarks.faults.lab import Lab
from benchmarks.faults.ranks import RankFailure, run_ranks
from benchmarks.faults.report import Trials
from data.loader import TokenLoader
from data.manifest import TAR_BLOCK, DataError, Manifest, read_manifest, write_manifest
from data.shards import hash_file
from data.verify import verify_folder
from trainer.checkpoint.io import Checkpointer
from trainer.checkpoint.store import CheckpointError, CheckpointStore
from trainer.concepts.sae_formats import load_sae
from trainer.config import RunConfig
from trainer.model.formats import load_model

MARKER = "executed"
REFUSALS = (CheckpointError, DataError, ValueError, OSError)
Attack = Callable[[Path, "Payload"], None]
"""Plants a payload below a folder and reads the file as the project does."""


class Payload:
    """Calls a function when it is unpickled without restriction."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call


def payloads(marker: Path) -> dict[str, Payload]:
    """Seven ways to create ``marker``."""
    touch = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
    return {
        "os.system": Payload(os.system, f"touch {marker}"),
        "exec": Payload(exec, touch),
        "eval": Payload(eval, f"exec({touch!r})"),
        "Path.touch": Payload(Path.touch, marker),
        "partial": Payload(functools.partial(exec, touch)),
        "subprocess": Payload(subprocess.check_call, ["touch", str(marker)]),
        "torch.save": Payload(torch.save, {}, str(marker)),
    }


# Pickles


def _save_checkpoint(root: Path, tensors: dict[str, Any]) -> Path:
    checkpointer = Checkpointer(CheckpointStore(root))
    checkpointer.save(1, tensors, {}, config_text="")
    (result,) = checkpointer.close()
    assert result.checkpoint is not None
    return result.checkpoint.path


def _load_checkpoint(root: Path, tensors: dict[str, Any]) -> None:
    checkpointer = Checkpointer(CheckpointStore(root))
    saved = checkpointer.find_newest()
    assert saved is not None
    checkpointer.load(saved, tensors)


def _reseal(path: Path) -> None:
    """Give changed files valid hashes again: whoever can write files can do this as well."""
    store = CheckpointStore(path.parent)
    for name in ("COMMITTED", "manifest_0.json"):
        (path / name).unlink()
    store.seal(path, rank=0, names=[file.name for file in path.iterdir()])
    aside = path.rename(path.parent / ".tmp-resealed")
    store.commit(aside, step=1, world_size=1)


def in_metadata(folder: Path, payload: Payload, *, nested: bool = False) -> None:
    """The payload is a checkpoint's ``.metadata``, or stands in valid metadata."""
    path = _save_checkpoint(folder, {"weight": torch.ones(3)})
    metadata = FileSystemReader(path).read_metadata()
    metadata.planner_data = payload
    (path / ".metadata").write_bytes(pickle.dumps(metadata if nested else payload))
    _reseal(path)
    _load_checkpoint(folder, {"weight": torch.zeros(3)})


def in_item(folder: Path, payload: Payload) -> None:
    """The payload is an item of a checkpoint."""
    _save_checkpoint(folder, {"weight": torch.ones(3), "item": payload})
    _load_checkpoint(folder, {"weight": torch.zeros(3), "item": 0})


def in_sae(folder: Path, payload: Payload, *, source: Path) -> None:
    """The payload stands in an autoencoder's published file."""
    state = torch.load(source, weights_only=True)
    torch.save({**state, "activation_state_dict": payload}, folder / "sae.pt")
    load_sae(folder / "sae.pt")


def in_model(folder: Path, payload: Payload, *, source: Path) -> None:
    """The payload stands in a teacher's pytorch_model.bin."""
    shutil.copy(source / "config.json", folder / "config.json")
    torch.save({"wte.weight": torch.ones(3), "more": payload}, folder / "pytorch_model.bin")
    load_model(folder)


def hostile_pickles(lab: Lab, trials: Trials, folder: Path) -> None:
    """Every payload in every kind of file that may hold a pickle."""
    attacks: dict[str, Attack] = {
        ".metadata": in_metadata,
        ".metadata, nested": functools.partial(in_metadata, nested=True),
        "item": in_item,
        "SAE .pt": functools.partial(in_sae, source=lab.world.sae),
        "model .bin": functools.partial(in_model, source=lab.world.teacher),
    }
    for place, attack in attacks.items():
        for name in payloads(folder):
            case = lab.room("hostile_case")
            marker = folder / MARKER
            trials.add(f"{name} in {place}", _attack(attack, case, payloads(marker)[name], marker), "refused")
    for name, payload in payloads(folder / "alive").items():
        pickle.loads(pickle.dumps(payload))
        alive = (folder / "alive").exists()
        (folder / "alive").unlink(missing_ok=True)
        trials.check(f"{name} is alive", [] if alive else ["it does nothing even without protection"])


def _attack(attack: Attack, case: Path, payload: Payload, marker: Path) -> list[str]:
    problems = []
    try:
        attack(case, payload)
        problems.append("loaded without an objection")
    except REFUSALS:
        pass
    if marker.exists():
        marker.unlink()
        problems.append("EXECUTED")
    return problems


# Shards


def climbing_member(shards: Path) -> None:
    """Rename the first member of the first shard to a path outside, all checksums valid."""
    manifest = read_manifest(shards)
    shard = manifest.splits["train"].shards[0]
    path, offset = shards / shard.name, shard.chunks[0].offset
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(content[offset : offset + TAR_BLOCK]), "utf-8", "strict")
    header.name = "../../escaped.tokens"
    content[offset : offset + TAR_BLOCK] = header.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(content)
    _replace_first_shard(shards, manifest, sha256=hash_file(path))


def pipe_name(shards: Path, *, present: bool) -> None:
    """Call the first shard ``pipe:touch executed``; the file itself may bear that name."""
    manifest = read_manifest(shards)
    name = f"pipe:touch {MARKER}"
    if present:
        (shards / manifest.splits["train"].shards[0].name).rename(shards / name)
    _replace_first_shard(shards, manifest, name=name)


def _replace_first_shard(shards: Path, manifest: Manifest, **changes: Any) -> None:
    train = manifest.splits["train"]
    first = dataclasses.replace(train.shards[0], **changes)
    split = dataclasses.replace(train, shards=(first, *train.shards[1:]))
    write_manifest(shards, dataclasses.replace(manifest, splits={**manifest.splits, "train": split}))


def hostile_shards(lab: Lab, trials: Trials, folder: Path) -> None:
    """A member that climbs out of its folder, and shard names that are commands; read in another process."""
    cases: dict[str, tuple[Callable[[Path], None], bool]] = {
        "tar member ../../escaped.tokens": (climbing_member, False),
        "pipe: as shard name, no such file": (functools.partial(pipe_name, present=False), False),
        "pipe: as shard name, a file of that name": (functools.partial(pipe_name, present=True), False),
        "pipe: as shard name in data.dir=.": (functools.partial(pipe_name, present=True), True),
    }
    for name, (plant, relative) in cases.items():
        case = lab.room("hostile_case")
        shards = case / "a" / "b" / "shards"
        shutil.copytree(lab.world.shards, shards)
        plant(shards)
        config = lab.world.config(case / "run", "ntp", data__dir="." if relative else str(shards))
        trials.add(name, _read_shards(config, case, shards, folder / "ranks"), "nothing run, nothing written")
    wds.gopen(f"pipe:touch {folder / MARKER}").read()
    alive = (folder / MARKER).exists()
    trials.check("pipe: is alive", [] if alive else ["it does nothing even without protection"])


def _read_shards(config: RunConfig, case: Path, shards: Path, ranks: Path) -> list[str]:
    """Read all windows and verify all bytes; returns what was made, changed or removed meanwhile."""

    def one_rank(_: object) -> None:
        os.chdir(shards)
        _suppressed(lambda: verify_folder(Path(config.data.dir)))
        _suppressed(lambda: _read_an_epoch(config))

    before = dict(_snapshot(case))
    try:
        run_ranks(one_rank, 1, ranks)
    except RankFailure as error:
        return [str(error)]
    after = dict(_snapshot(case))
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return [f"wrote {', '.join(changed)}"] if changed else []


def _suppressed(read: Callable[[], object]) -> None:
    try:
        read()
    except REFUSALS as error:
        print(f"refused: {error}")


def _read_an_epoch(config: RunConfig) -> None:
    loader = TokenLoader(config.data, rows_per_step=config.train.batch_size, rank=0, world_size=1)
    for _ in range(50):
        next(loader)
    loader.close()


def _snapshot(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b""


def hostile_files(lab: Lab, trials: Trials) -> str:
    """All of them."""
    folder = lab.room("hostile")
    hostile_pickles(lab, trials, folder)
    hostile_shards(lab, trials, folder)
    return "0 executions; 0 files outside"
