"""Sharded saves and loads on real gloo ranks, with real faults."""

from __future__ import annotations

import copy
import ctypes
import functools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from parallel.world import World
from tests.ranks import RankError, run_ranks
from trainer.checkpoint.io import Checkpointer, SaveResult, WriterLostError
from trainer.checkpoint.store import CheckpointError, CheckpointStore, SaveError

CONFIG = "train:\n  steps: 10\n"


def _full(step: int, rows: int = 7) -> dict[str, torch.Tensor]:
    """Full tensors of one step: a matrix that does not divide evenly, a vector, a scalar, another dtype."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(rows, 64, generator=generator),
        "bias": torch.randn(5, generator=generator),
        "count": torch.tensor(float(step)),
        "half": torch.randn(3, 2, generator=generator).bfloat16(),
    }


def _state(world: World, step: int, rows: int = 7) -> dict[str, Any]:
    """The same tensors as a state dict of this layout: sharded, replicated, plain, and plain values."""
    mesh = init_device_mesh("cpu", (world.size,))
    full = _full(step, rows)
    model = {
        "weight": distribute_tensor(full["weight"], mesh, [Shard(0)]),
        "bias": distribute_tensor(full["bias"], mesh, [Replicate()]),
        "half": distribute_tensor(full["half"], mesh, [Shard(1)]),
    }
    groups = [{"lr": 0.5 * step, "betas": (0.9, 0.95), "fused": None}]
    return {"model": model, "optimizer": {"state": {"count": full["count"]}, "param_groups": groups}}


def _gathered(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {**state["model"], "count": state["optimizer"]["state"]["count"]}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def _assert_is(state: dict[str, Any], step: int, rows: int = 7) -> None:
    for name, tensor in _full(step, rows).items():
        assert torch.equal(_gathered(state)[name], tensor), name
    assert state["optimizer"]["param_groups"] == [{"lr": 0.5 * step, "betas": (0.9, 0.95), "fused": None}]


def _save(
    world: World,
    root: Path,
    step: int,
    *,
    wait: bool = True,
    rows: int = 7,
    checkpointer: Checkpointer | None = None,
) -> SaveResult:
    checkpointer = checkpointer or Checkpointer(CheckpointStore(root), timeout_s=30)
    state = _state(world, step, rows)
    checkpointer.save(
        step, state, {"tokens": 10 * step}, config_text=CONFIG, rank_extra={"me": world.rank}, wait=wait
    )
    for tensor in (*state["model"].values(), state["optimizer"]["state"]["count"]):
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1)
    (result,) = checkpointer.close()
    return result


def _load(world: World, root: Path, rows: int = 7) -> int:
    """Load the newest checkpoint, compare everything with what its step must hold, return the step."""
    checkpointer = Checkpointer(CheckpointStore(root), timeout_s=30)
    saved = checkpointer.find_newest()
    assert saved is not None
    state = _state(world, 0, rows)
    checkpointer.load(saved, state)
    step = saved.checkpoint.step
    _assert_is(state, step, rows)
    assert saved.extra == {"tokens": 10 * step}
    assert saved.config_text == CONFIG
    own = {"me": world.rank} if world.rank < saved.checkpoint.world_size else None
    assert saved.rank_extra == own
    return step


def _hashes(path: Path) -> dict[str, Any]:
    """Hash by name of the tensor files of a checkpoint."""
    manifests = [json.loads(p.read_bytes())["files"] for p in sorted(path.glob("manifest_*.json"))]
    return {name: entry for files in manifests for name, entry in files.items() if name.endswith(".distcp")}


@pytest.mark.dist
def test_loads_bitwise_on_other_world_sizes(tmp_path: Path) -> None:
    """Catches a resume that loses or reorders rows when the number of ranks changes."""
    results = run_ranks(_save, 2, tmp_path, 3)
    assert [result.error for result in results] == [None, None]
    for world_size in (1, 2, 3):
        assert run_ranks(_load, world_size, tmp_path) == [3] * world_size


def test_no_process_group_is_one_rank(tmp_path: Path) -> None:
    """Catches tools (export, evaluation) that would need a launcher to read a checkpoint."""
    tensors = {"model": {"weight": torch.arange(6.0)}, "rest": {"lr": 0.1}}
    checkpointer = Checkpointer(CheckpointStore(tmp_path))
    assert checkpointer.find_newest() is None
    checkpointer.save(1, copy.deepcopy(tensors), {}, config_text="", wait=False)
    assert [result.error for result in checkpointer.close()] == [None]
    wanted = {"model": {"weight": torch.zeros(6)}}
    saved = checkpointer.find_newest()
    assert saved is not None
    checkpointer.load(saved, wanted, partial_state=True)
    assert torch.equal(wanted["model"]["weight"], torch.arange(6.0))


def _save_both_ways(world: World, root: Path) -> None:
    for folder, wait in (("sync", True), ("async", False)):
        result = _save(world, root / folder, 6, wait=wait, rows=3000)
        assert result.error is None
        assert result.asynchronous is not wait


@pytest.mark.dist
def test_asynchronous_equals_synchronous_bitwise(tmp_path: Path) -> None:
    """Catches a background write that sees tensors changed after save returned (it is overwritten)."""
    run_ranks(_save_both_ways, 2, tmp_path)
    sync, background = (_hashes(tmp_path / name / "step_00000006") for name in ("sync", "async"))
    assert len(sync) == 2
    assert sync == background
    for folder in ("sync", "async"):
        run_ranks(functools.partial(_load, rows=3000), 2, tmp_path / folder)


class _HeldStore(CheckpointStore):
    """Starts to write only when it is let go, as on a slow disk."""

    go: threading.Event

    def begin(self, step: int) -> Path:
        assert self.go.wait(timeout=30)
        return super().begin(step)


def _held(root: Path) -> tuple[Checkpointer, threading.Event]:
    store = _HeldStore(root)
    store.go = threading.Event()
    return Checkpointer(store, timeout_s=30), store.go


def _save_twice_on_a_slow_disk(world: World, root: Path) -> None:
    checkpointer, go = _held(root)
    state = _state(world, 1)
    checkpointer.save(1, state, {"tokens": 10}, config_text=CONFIG, rank_extra={"me": world.rank}, wait=False)
    state["model"]["weight"].to_local().zero_()
    assert checkpointer.poll() == [], "save and poll must not wait for the disk"
    go.set()
    second = _state(world, 2)
    checkpointer.save(
        2, second, {"tokens": 20}, config_text=CONFIG, rank_extra={"me": world.rank}, wait=False
    )
    results = checkpointer.close()
    assert [(result.step, result.error) for result in results] == [(1, None), (2, None)]
    assert checkpointer.poll() == []


@pytest.mark.dist
def test_background_save_does_not_block_and_one_is_in_flight(tmp_path: Path) -> None:
    """Catches a step loop that waits for the disk, two writers at once, and a lost result."""
    run_ranks(_save_twice_on_a_slow_disk, 2, tmp_path)
    assert run_ranks(_load, 2, tmp_path) == [2, 2]
    shutil.rmtree(tmp_path / "step_00000002")
    assert run_ranks(_load, 2, tmp_path) == [1, 1]


def _kill_thread(thread: threading.Thread) -> None:
    """Raise SystemExit inside another thread, wherever it is, until it is dead."""
    deadline = time.monotonic() + 30
    while thread.is_alive():
        assert time.monotonic() < deadline
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        )
        time.sleep(0.01)


def _lose_the_writer(world: World, root: Path) -> None:
    threading.excepthook = threading.__excepthook__  # pytest's own would keep the dead thread's frames alive
    checkpointer, go = _held(root)
    save = functools.partial(checkpointer.save, config_text=CONFIG, rank_extra={"me": world.rank}, wait=False)
    save(1, _state(world, 1), {"tokens": 10})
    (writer,) = (thread for thread in threading.enumerate() if thread.name == "checkpoint-writer")
    if world.rank == 1:
        killer = threading.Thread(target=_kill_thread, args=(writer,))
        killer.start()
        time.sleep(0.1)
    go.set()
    found: list[SaveResult] = []
    deadline = time.monotonic() + 20
    while not found and time.monotonic() < deadline:
        found = checkpointer.poll()
        time.sleep(0.01)
    assert isinstance(found[0].error, WriterLostError)
    save(2, _state(world, 2), {"tokens": 20})
    (result,) = checkpointer.close()
    assert result.error is None
    assert not result.asynchronous


@pytest.mark.dist
def test_dead_writer_is_noticed_and_saves_go_on_synchronously(tmp_path: Path) -> None:
    """Catches a writer whose death nobody sees: no checkpoint would be written for the rest of the run."""
    run_ranks(_lose_the_writer, 2, tmp_path)
    assert run_ranks(_load, 2, tmp_path) == [2, 2]
    assert list(tmp_path.glob(".tmp-*")) == []


# Faults of the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here; the test with a file size limit covers it")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def _fill_the_disk(world: World, root: Path, wait: bool) -> None:
    rows = 4000
    checkpointer = Checkpointer(CheckpointStore(root / "checkpoints"), timeout_s=30)
    save = functools.partial(_save, world, root, rows=rows, wait=wait, checkpointer=checkpointer)
    assert save(1).error is None
    if world.rank == 0:
        (root / "filler").write_bytes(bytes(2 << 20))
    for step in (2, 3):
        error = save(step).error
        assert type(error) is SaveError
        assert "\n" not in str(error)
    if world.rank == 0:
        assert list((root / "checkpoints").glob(".*")) == []
        assert CheckpointStore(root / "checkpoints").find_problems(1) == []
        (root / "filler").unlink()
    assert save(4).error is None


@pytest.mark.dist
@pytest.mark.parametrize("wait", [True, False])
def test_full_disk_leaves_the_previous_checkpoint(small_disk: Path, wait: bool) -> None:
    """Catches a full disk that ends the run, leaves half a checkpoint, or costs the good one."""
    run_ranks(_fill_the_disk, 2, small_disk, wait)
    assert run_ranks(functools.partial(_load, rows=4000), 2, small_disk / "checkpoints") == [4, 4]


def _fail_on_one_rank(world: World, root: Path, wait: bool) -> str:
    checkpointer = Checkpointer(CheckpointStore(root), timeout_s=30)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    error = _save(world, root, 2, rows=1000, wait=wait, checkpointer=checkpointer).error
    assert type(error) is SaveError
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(error)


@pytest.mark.dist
@pytest.mark.parametrize("wait", [True, False])
def test_one_rank_that_cannot_write_abandons_the_save_on_all(tmp_path: Path, wait: bool) -> None:
    """Catches a checkpoint that is committed without one rank's part, and ranks that disagree about it."""
    run_ranks(_save, 2, tmp_path, 1)
    first, second = run_ranks(_fail_on_one_rank, 2, tmp_path, wait)
    assert first == second
    assert "step 2 not saved" in first
    assert "rank 1" in first
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert run_ranks(_load, 2, tmp_path) == [1, 1]


def _save_state_that_is_not_json(world: World, root: Path) -> str:
    checkpointer = Checkpointer(CheckpointStore(root), timeout_s=30)
    own = {"me": object()} if world.rank == 1 else {}
    checkpointer.save(1, _state(world, 1), {}, config_text=CONFIG, rank_extra=own)
    (result,) = checkpointer.close()
    return str(result.error)


@pytest.mark.dist
def test_error_before_writing_is_agreed_too(tmp_path: Path) -> None:
    """Catches one rank raising early while the others wait for it in a collective."""
    first, second = run_ranks(_save_state_that_is_not_json, 2, tmp_path)
    assert first == second
    assert "not JSON serializable" in first


# Damage


def _file_classes(path: Path) -> dict[str, list[Path]]:
    files = list(path.iterdir())
    return {
        "tensors": [file for file in files if file.suffix == ".distcp"],
        "metadata": [path / ".metadata"],
        "manifest": [file for file in files if file.name.startswith("manifest_")],
        "summary": [path / "COMMITTED"],
        "state": [path / "state.json", *path.glob("rank_*.json")],
        "config": [path / "config.yaml"],
    }


def _damage(file: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif kind == "truncate":
        os.truncate(file, rng.randrange(len(content)))
    elif kind == "delete":
        file.unlink()
    else:
        file.with_name(f"{file.name}{rng.choice(['.tmp', '~', '_1'])}").write_bytes(content)


@pytest.mark.dist
def test_random_damage_to_every_file_class_is_found_before_loading(tmp_path: Path) -> None:
    """Catches damage that loads silently: 120 cases, 5 of each kind for each class of file."""
    run_ranks(_save, 2, tmp_path / "good", 1)
    run_ranks(_save, 2, tmp_path / "good", 2)
    rng = random.Random(0)
    missed, num_cases = [], 0
    for kind in ("flip", "truncate", "delete", "extra"):
        for name in _file_classes(tmp_path / "good" / "step_00000002"):
            for _ in range(5):
                root = tmp_path / "case"
                shutil.copytree(tmp_path / "good", root)
                file = rng.choice(_file_classes(root / "step_00000002")[name])
                _damage(file, kind, rng)
                newest = CheckpointStore(root).newest_good()
                reason = root / "quarantine" / "step_00000002.reason"
                if newest is None or newest.step != 1 or not reason.read_text():
                    missed.append((kind, file.name))
                num_cases += 1
                shutil.rmtree(root)
    assert num_cases == 120
    assert missed == []


def _find(world: World, root: Path) -> int | str | None:
    try:
        saved = Checkpointer(CheckpointStore(root), timeout_s=30).find_newest()
    except CheckpointError as error:
        return str(error)
    return saved.checkpoint.step if saved else None


@pytest.mark.dist
def test_ranks_agree_on_the_checkpoint_and_never_start_afresh(tmp_path: Path) -> None:
    """Catches ranks that load different checkpoints, or start at step 0 where all checkpoints are bad."""
    assert run_ranks(_find, 2, tmp_path) == [None, None]
    for step in (1, 2):
        run_ranks(_save, 2, tmp_path, step)
    (tmp_path / "step_00000002" / "__1_0.distcp").unlink()
    assert run_ranks(_find, 3, tmp_path) == [1, 1, 1]
    os.truncate(tmp_path / "step_00000001" / "__0_0.distcp", 5)
    for _ in range(2):
        first, second = run_ranks(_find, 2, tmp_path)
        assert first == second
        assert "no checkpoint is good" in str(first)


def _load_other_shape(world: World, root: Path) -> list[str]:
    checkpointer = Checkpointer(CheckpointStore(root), timeout_s=30)
    saved = checkpointer.find_newest()
    assert saved is not None
    messages = []
    more, less = _state(world, 0), _state(world, 0)
    more["model"]["new"] = torch.zeros(1)
    del less["model"]["bias"]
    for state in (_state(world, 0, rows=8), more, less):
        with pytest.raises(CheckpointError) as error:
            checkpointer.load(saved, state)
        messages.append(str(error.value))
    return messages


@pytest.mark.dist
def test_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    """Catches a checkpoint that fills only a part of the model, and a library traceback as the message."""
    run_ranks(_save, 2, tmp_path, 1)
    for messages in run_ranks(_load_other_shape, 2, tmp_path):
        assert all("\n" not in message for message in messages)
        for message, name in zip(messages, ("weight", "model.new", "model.bias"), strict=True):
            assert name in message


# Hostile files


class _Payload:
    """Creates a file when it is unpickled without restriction."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call


def _payloads(marker: Path) -> list[_Payload]:
    touch = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
    return [
        _Payload(os.system, f"touch {marker}"),
        _Payload(exec, touch),
        _Payload(eval, f"exec({touch!r})"),
        _Payload(Path.touch, marker),
        _Payload(functools.partial(exec, touch)),
        _Payload(subprocess.check_call, ["touch", str(marker)]),
        _Payload(torch.save, {}, str(marker)),
    ]


def _reseal(path: Path, step: int) -> None:
    """Give changed files valid hashes again: whoever can write files can do this as well."""
    store = CheckpointStore(path.parent)
    for name in ("COMMITTED", "manifest_0.json"):
        (path / name).unlink()
    store.seal(path, rank=0, names=[file.name for file in path.iterdir()])
    aside = path.rename(path.parent / ".tmp-resealed")
    store.commit(aside, step=step, world_size=1)
    assert store.find_problems(step) == []


def _save_plain(root: Path, tensors: dict[str, Any]) -> Path:
    checkpointer = Checkpointer(CheckpointStore(root))
    checkpointer.save(1, tensors, {}, config_text="")
    (result,) = checkpointer.close()
    assert result.checkpoint is not None
    return result.checkpoint.path


def _load_plain(root: Path, tensors: dict[str, Any]) -> None:
    checkpointer = Checkpointer(CheckpointStore(root))
    saved = checkpointer.find_newest()
    assert saved is not None
    checkpointer.load(saved, tensors)


@pytest.mark.parametrize("index", range(7))
def test_hostile_metadata_executes_nothing(tmp_path: Path, index: int) -> None:
    """Catches unpickling of .metadata without an allow-list, bare or inside valid metadata."""
    marker = tmp_path / "executed"
    path = _save_plain(tmp_path / "c", {"weight": torch.ones(3)})
    metadata = FileSystemReader(path).read_metadata()
    for nested in (False, True):
        payload = _payloads(marker)[index]
        metadata.planner_data = payload
        (path / ".metadata").write_bytes(pickle.dumps(metadata if nested else payload))
        _reseal(path, 1)
        with pytest.raises(CheckpointError, match="^load: .*may not contain$"):
            _load_plain(tmp_path / "c", {"weight": torch.zeros(3)})
        assert not marker.exists()


@pytest.mark.parametrize("index", range(7))
def test_hostile_item_executes_nothing(tmp_path: Path, index: int) -> None:
    """Catches unpickling of non-tensor items without weights_only; the library alone does execute them."""
    marker = tmp_path / "executed"
    path = _save_plain(tmp_path / "c", {"weight": torch.ones(3), "item": _payloads(marker)[index]})
    with pytest.raises(CheckpointError):
        _load_plain(tmp_path / "c", {"weight": torch.zeros(3), "item": 0})
    assert not marker.exists()
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load({"weight": torch.zeros(3), "item": 0}, checkpoint_id=path, no_dist=True)
    assert marker.exists(), "the payload is harmless, so the test proves nothing"


def test_metadata_cannot_point_outside(tmp_path: Path) -> None:
    """Catches a path in the metadata that makes the reader open other files of the machine."""
    path = _save_plain(tmp_path / "c", {"weight": torch.ones(3)})
    metadata = FileSystemReader(path).read_metadata()
    for location in metadata.storage_data.values():
        location.relative_path = "../../outside"
    metadata.storage_meta = None
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    _reseal(path, 1)
    with pytest.raises(CheckpointError, match="outside its directory"):
        _load_plain(tmp_path / "c", {"weight": torch.zeros(3)})


# Killed writers


def _resume_save_and_die(world: World, root: Path, log: Path, die_rank: int, after: float) -> None:
    """Resume, then save step after step, alternately in the foreground and background, until killed.

    The rank ``die_rank`` kills itself ``after`` saves; the fraction is of the time that the last one took.
    """
    rows = 3000
    checkpointer = Checkpointer(CheckpointStore(root, keep_last=2), timeout_s=30)
    checkpointer.recover()
    saved = checkpointer.find_newest()
    step = 0
    if saved is not None:
        state = _state(world, 0, rows)
        checkpointer.load(saved, state)
        step = saved.checkpoint.step
        _assert_is(state, step, rows)
        assert saved.extra == {"tokens": 10 * step}
    if world.rank == 0:
        with log.open("a") as file:
            file.write(f"resumed {step}\n")
    first, save_time_s = step, 0.0
    while True:
        if world.rank == die_rank and step - first == int(after):
            threading.Timer((after % 1) * save_time_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        step += 1
        checkpointer.save(
            step, _state(world, step, rows), {"tokens": 10 * step}, config_text=CONFIG, wait=step % 2 == 0
        )
        for result in checkpointer.poll():
            assert result.error is None
            save_time_s = result.seconds
            if world.rank == 0:
                with log.open("a") as file:
                    file.write(f"committed {result.step}\n")


@pytest.mark.dist
@pytest.mark.slow
def test_killed_writers_never_cost_a_checkpoint(tmp_path: Path) -> None:
    """Catches a checkpoint that is torn, mixed or lost when a rank is killed: 20 kills during saves."""
    root, log = tmp_path / "checkpoints", tmp_path / "log"
    log.touch()
    rng = random.Random(0)
    num_torn = 0
    for _ in range(20):
        with pytest.raises(RankError, match="exit code -9|another rank is gone|Connection|checkpoint"):
            run_ranks(
                _resume_save_and_die, 2, root, log, rng.randrange(2), rng.uniform(1.0, 3.0), timeout_s=30
            )
        num_torn += any(root.glob(".tmp-*"))
        lines = [line.split() for line in log.read_text().splitlines()]
        acknowledged = max((int(step) for _, step in lines), default=0)
        assert not (root / "quarantine").exists(), "a kill must never make a committed checkpoint bad"
        newest = CheckpointStore(root).newest_good()
        assert (newest.step if newest else 0) >= acknowledged
    resumed = [int(step) for word, step in lines if word == "resumed"]
    assert len(resumed) == 20
    assert resumed == sorted(resumed)
    assert resumed[-1] >= 19
    assert num_torn >= 5, "too few kills hit a save for this to prove anything"
