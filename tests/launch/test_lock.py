"""One owner per run directory, whatever happened to the one before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.lock import LockedError, LockLostError, RunLock, read_holder
from tests.launch.runs import ROOT

_HOLD = """
import sys, time
from pathlib import Path
from launch.lock import RunLock
lock = RunLock(Path(sys.argv[1]), lease_s=float(sys.argv[2]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""

_RACE = """
import sys, time
from pathlib import Path
from launch.lock import LockedError, RunLock
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
try:
    RunLock(Path(sys.argv[1])).acquire()
    print("won", flush=True)
    time.sleep(2.0)
except LockedError:
    print("lost", flush=True)
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def rewrite(directory: Path, **changes: Any) -> None:
    """Change the newest record, as if another machine had written it."""
    number, _ = read_holder(directory)
    path = directory / f"{number:08d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_live_owner_is_named(tmp_path: Path) -> None:
    """Catches a second owner, and a refusal that does not say whom to look for."""
    RunLock(tmp_path / "lock").acquire()
    with pytest.raises(LockedError, match=f"{tmp_path} is in use by process {os.getpid()} on "):
        RunLock(tmp_path / "lock").acquire()
    assert len(list((tmp_path / "lock").iterdir())) == 1


def test_killed_owner_on_this_machine(tmp_path: Path) -> None:
    """Catches a restart that has to wait for the lease of a process that is known to be dead."""
    holder = python(_HOLD, tmp_path / "lock", 3600)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError):
        RunLock(tmp_path / "lock").acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert RunLock(tmp_path / "lock").acquire() == "its process is gone"


def test_lease_of_another_machine(tmp_path: Path) -> None:
    """Catches a dead node's lease that lasts for ever, and a live one's that does not count."""
    RunLock(tmp_path / "lock").acquire()
    rewrite(tmp_path / "lock", pid_space="another machine", pid=1, expires=time.time() + 30)
    with pytest.raises(LockedError):
        RunLock(tmp_path / "lock").acquire()
    rewrite(tmp_path / "lock", expires=time.time() - 1)
    assert RunLock(tmp_path / "lock").acquire() == "its lease expired"


def test_same_job_after_requeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a requeued job that waits for itself."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "c")
    RunLock(tmp_path / "lock").acquire()
    rewrite(tmp_path / "lock", pid_space="another machine")
    with pytest.raises(LockedError, match="in use by SLURM job 12, process"):
        RunLock(tmp_path / "lock").acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert RunLock(tmp_path / "lock").acquire() == "it is this job before a requeue"


def test_release_and_renewal(tmp_path: Path) -> None:
    """Catches an owner that goes on after it was replaced, and a release that nobody notices."""
    first = RunLock(tmp_path / "lock", lease_s=0.3)
    first.acquire()
    for _ in range(4):
        time.sleep(0.1)
        first.renew_if_due()
    with pytest.raises(LockedError):
        RunLock(tmp_path / "lock").acquire()
    time.sleep(0.4)
    second = RunLock(tmp_path / "lock")
    assert second.acquire() == "its lease expired"
    with pytest.raises(LockLostError, match="taken over by process"):
        first.renew_if_due()
    first.release()
    with pytest.raises(LockedError):
        RunLock(tmp_path / "lock").acquire()
    second.release()
    assert RunLock(tmp_path / "lock").acquire() == "released"


def test_race_has_one_winner(tmp_path: Path) -> None:
    """Catches a takeover that two jobs win."""
    RunLock(tmp_path / "lock").acquire()
    rewrite(tmp_path / "lock", pid_space="another machine", expires=0.0)
    start = time.time() + 1.5
    racers = [python(_RACE, tmp_path / "lock", start) for _ in range(6)]
    assert sorted(racer.communicate()[0].strip() for racer in racers) == ["lost"] * 5 + ["won"]


def test_damaged_record(tmp_path: Path) -> None:
    """Catches a record that a full disk cut short, which would lock a run for ever."""
    (tmp_path / "lock").mkdir()
    record = tmp_path / "lock" / "00000004.json"
    record.write_text('{"owner": "x')
    with pytest.raises(LockedError, match="just starting"):
        RunLock(tmp_path / "lock").acquire()
    os.utime(record, (0, 0))
    assert RunLock(tmp_path / "lock").acquire() == "its record is damaged and old"
