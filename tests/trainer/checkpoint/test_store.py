"""Directories: commit, recovery, verification, quarantine, retention. No torch, one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.checkpoint.store import CheckpointError, CheckpointStore, steps_to_keep


def _write(store: CheckpointStore, step: int, *, world_size: int = 2, loss: float | None = None) -> Path:
    directory = store.begin(step)
    for rank in range(world_size):
        (directory / f"data_{rank}").write_bytes(bytes([step % 256, rank]) * 500)
        store.seal(directory, rank=rank, names=[f"data_{rank}"])
    return store.commit(directory, step=step, world_size=world_size, info={"by": "test"}, loss=loss).path


def _content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=3)


def test_store_needs_no_torch() -> None:
    """The launcher's status command reads the store; it must not pay for torch."""
    code = "import sys, trainer.checkpoint.store, trainer.checkpoint.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_commit_is_found_with_its_summary(store: CheckpointStore) -> None:
    """Catches a commit that loses the step, the world size, the info or the loss."""
    assert store.newest_good() is None
    _write(store, 1000, world_size=3, loss=2.5)
    found = store.newest_good()
    assert found is not None
    assert (found.step, found.world_size, found.info, found.loss) == (1000, 3, {"by": "test"}, 2.5)
    assert found.path.name == "step_00001000"


def test_steps_are_ordered_as_numbers(store: CheckpointStore) -> None:
    """Catches sorting by name, where 100,000,000 comes before 99,999,999."""
    for step in (99_999_999, 100_000_000):
        _write(store, step)
    newest = store.newest_good()
    assert newest is not None
    assert newest.step == 100_000_000


def test_each_save_has_a_fresh_directory(store: CheckpointStore) -> None:
    """Catches writing into an existing path, where old metadata over new data loads silently mixed."""
    first = store.begin(5)
    (first / "old").write_bytes(b"old")
    second = store.begin(5)
    assert first != second
    assert list(second.iterdir()) == []
    assert not first.exists(), "a save that never ended must not be left behind"


def test_commit_wants_every_rank(store: CheckpointStore) -> None:
    """Catches a checkpoint that is committed while one rank's files are missing."""
    directory = store.begin(1)
    (directory / "data_0").write_bytes(b"x")
    store.seal(directory, rank=0, names=["data_0"])
    with pytest.raises(CheckpointError, match="rank 1 of 2 has not sealed"):
        store.commit(directory, step=1, world_size=2)
    assert store.steps() == []


def test_commit_wants_every_file_sealed(store: CheckpointStore) -> None:
    """Catches a file that nobody hashed: its damage could never be found."""
    directory = store.begin(1)
    (directory / "data_0").write_bytes(b"x")
    (directory / "forgotten").write_bytes(b"x")
    store.seal(directory, rank=0, names=["data_0"])
    with pytest.raises(CheckpointError, match="forgotten"):
        store.commit(directory, step=1, world_size=1)


def test_commit_sees_a_file_that_changed_size_after_the_seal(store: CheckpointStore) -> None:
    """Catches a writer that goes on after its manifest."""
    directory = store.begin(1)
    (directory / "data_0").write_bytes(b"x")
    store.seal(directory, rank=0, names=["data_0"])
    (directory / "data_0").write_bytes(b"xy")
    with pytest.raises(CheckpointError, match="2 bytes, 1 when it was sealed"):
        store.commit(directory, step=1, world_size=1)


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "extra", "delete", "summary", "manifest", "folder", "link"]
)
def test_damage_is_quarantined_with_a_reason_and_the_older_one_is_taken(
    store: CheckpointStore, tmp_path: Path, damage: str
) -> None:
    """Catches each way in which a damaged checkpoint could be loaded."""
    _write(store, 1)
    good = _content(store.root / "step_00000001")
    bad = _write(store, 2)
    data = bad / "data_1"
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[77] ^= 4
        data.write_bytes(content)
    elif damage == "truncate":
        os.truncate(data, 10)
    elif damage == "extra":
        (bad / "extra").touch()
    elif damage == "delete":
        data.unlink()
    elif damage == "summary":
        (bad / "COMMITTED").unlink()
    elif damage == "manifest":
        (bad / "manifest_1.json").unlink()
    elif damage == "folder":
        (bad / "sub").mkdir()
    else:
        shutil.move(data, tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")
    newest = store.newest_good()
    assert newest is not None
    assert newest.step == 1
    assert _content(newest.path) == good
    reason = (store.quarantine_root / "step_00000002.reason").read_text()
    names = {"extra": "extra", "summary": "COMMITTED", "manifest": "manifest_1.json", "folder": "sub"}
    assert names.get(damage, "data_1") in reason


def test_renamed_checkpoint_is_bad(store: CheckpointStore) -> None:
    """Catches a checkpoint that is offered under another step."""
    _write(store, 1).rename(store.root / "step_00000009")
    assert store.find_problems(9) != []


def test_no_fresh_start_when_all_are_bad(store: CheckpointStore) -> None:
    """Catches a silent restart from step 0 over a run whose checkpoints are all damaged."""
    for step in (1, 2):
        (_write(store, step) / "data_0").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint is good"):
            store.newest_good()
    assert store.steps() == []
    _write(store, 3)
    newest = store.newest_good()
    assert newest is not None
    assert newest.step == 3


def test_the_same_step_can_be_quarantined_twice(store: CheckpointStore) -> None:
    """Catches a quarantine that fails or overwrites because the name is taken."""
    _write(store, 1)
    for _ in range(2):
        (_write(store, 2) / "data_0").unlink()
        newest = store.newest_good()
        assert newest is not None
        assert newest.step == 1
    folders = [path for path in store.quarantine_root.iterdir() if path.is_dir()]
    assert len(folders) == 2


def test_parts_cover_every_file_once(store: CheckpointStore) -> None:
    """Catches a split of the verification over ranks that leaves a file unread."""
    path = _write(store, 1, world_size=7)
    for rank in range(7):
        original = (path / f"data_{rank}").read_bytes()
        (path / f"data_{rank}").write_bytes(original[:-1] + b"?")
        found = [bool(store.find_problems(1, part=part, parts=3)) for part in range(3)]
        assert sorted(found) == [False, False, True]
        (path / f"data_{rank}").write_bytes(original)


def test_recovery_removes_leftovers_only(store: CheckpointStore) -> None:
    """Catches leftovers that fill the disk, and a clean-up that takes a checkpoint with it."""
    _write(store, 1)
    (store.begin(2) / "data_0").write_bytes(b"half")
    (store.root / ".tmp-losses-dead").write_bytes(b"{")
    fresh = CheckpointStore(store.root)
    fresh.recover()
    assert [path.name for path in store.root.iterdir()] == ["step_00000001"]
    assert fresh.find_problems(1) == []


def test_replacing_a_step_survives_a_crash_in_the_middle(store: CheckpointStore) -> None:
    """Catches the loss of a step's only checkpoint between the two renames of its replacement."""
    path = _write(store, 4)
    path.rename(store.root / ".replaced-step_00000004")
    CheckpointStore(store.root).recover()
    assert store.find_problems(4) == []


def test_a_rewound_step_is_replaced(store: CheckpointStore) -> None:
    """Catches a rewind that keeps the checkpoint of the abandoned course under the same step."""
    _write(store, 4, loss=9.0)
    _write(store, 4, loss=1.0)
    newest = store.newest_good()
    assert newest is not None
    assert newest.loss == 1.0
    assert [path.name for path in store.root.iterdir()] == ["step_00000004"]


def test_retention_keeps_last_multiples_and_best(tmp_path: Path) -> None:
    """Catches the removal of a checkpoint that some rule protects, and the keeping of any other."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2, keep_every_steps=100)
    for step in range(10, 260, 10):
        _write(store, step, loss=1.0 if step == 30 else 2.0 + step)
    assert store.steps() == [30, 100, 200, 240, 250]


def test_best_may_be_marked_while_in_flight_and_later(tmp_path: Path) -> None:
    """Catches a validation loss that is lost because it was known before or after the commit."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    directory = store.begin(1)
    store.mark_best(1, 3.0)
    store.seal(directory, rank=0, names=[])
    store.commit(directory, step=1, world_size=1)
    _write(store, 2)
    store.mark_best(2, 2.0)
    _write(store, 3)
    assert store.steps() == [2, 3], "2 became the best before retention looked at it"
    store.mark_best(3, float("nan"))
    _write(store, 4)
    assert store.steps() == [2, 4], "a loss that is not a number is not the best"
    (store.root / "losses.json").write_text("{")
    _write(store, 5, loss=7.0)
    assert store.steps()[-1] == 5, "a damaged record of losses must not stop a save"


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_retention_never_removes_the_only_good_one(tmp_path: Path, keep_last: int) -> None:
    """Catches retention that counts unfinished directories as checkpoints, or removes before it commits."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=keep_last)
    for step in range(1, 12):
        _write(store, step)
        unfinished = store.begin(step + 1)
        (unfinished / "data_0").write_bytes(b"half")
        newest = CheckpointStore(store.root).newest_good()
        assert newest is not None
        assert newest.step == step
        assert store.steps() == list(range(max(1, step - keep_last + 1), step + 1))


def test_retention_counts_committed_checkpoints_only(tmp_path: Path) -> None:
    """Catches keep_last being used up by leftovers and quarantined checkpoints."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    _write(store, 1)
    (_write(store, 2) / "data_0").unlink()
    assert store.newest_good() is not None
    for name in (".tmp-step_00000007-dead", "quarantine/step_00000009"):
        (store.root / name).mkdir()
    _write(store, 3)
    assert store.steps() == [1, 3]


def test_steps_to_keep() -> None:
    """Catches off-by-one errors in the rules themselves."""
    assert steps_to_keep([], keep_last=2) == set()
    assert steps_to_keep([5, 1, 3], keep_last=2) == {3, 5}
    assert steps_to_keep(range(1, 10), keep_last=1, keep_every_steps=4) == {4, 8, 9}
    assert steps_to_keep([1, 2, 3], keep_last=1, losses={1: 2.0, 2: 2.0}) == {2, 3}


def test_bad_limits_are_refused(tmp_path: Path) -> None:
    """Catches keep_last=0, which would remove what was just written."""
    with pytest.raises(ValueError, match="keep_last=0 must be at least 1"):
        CheckpointStore(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="step=-1 must be at least 0"):
        CheckpointStore(tmp_path).begin(-1)


def test_every_single_bit_of_the_small_files_counts(store: CheckpointStore) -> None:
    """Catches a summary or manifest that is checked by meaning rather than by byte (white space, digits)."""
    path = _write(store, 1, world_size=1)
    missed = []
    for name in ("COMMITTED", "manifest_0.json"):
        original = (path / name).read_bytes()
        json.loads(original)
        for bit in range(8 * len(original)):
            changed = bytearray(original)
            changed[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(changed)
            if not store.find_problems(1):
                missed.append((name, bit))
        (path / name).write_bytes(original)
    assert missed == []
    assert store.find_problems(1) == []
