"""Process trees of this machine, read from /proc (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose parent dies, so that none can get away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def signal_at_parent_death(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, however that happens."""
    _prctl(_PR_SET_PDEATHSIG, number)


def _prctl(option: int, argument: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def read_stat(pid: int) -> tuple[str, int, int] | None:
    """Return (state letter, parent's pid, start in clock ticks since boot) of a process, None if gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold spaces and parentheses; the last one ends it.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[1]), int(fields[19])


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    stat = read_stat(pid)
    return stat is not None and stat[0] not in "ZX"


def _all_pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def children(pid: int) -> list[int]:
    """Return the living children of a process."""
    found = []
    for candidate in _all_pids():
        stat = read_stat(candidate)
        if stat is not None and stat[1] == pid and stat[0] not in "ZX":
            found.append(candidate)
    return found


def descendants(pid: int) -> list[int]:
    """Return the living descendants of a process, parents first."""
    by_parent: dict[int, list[int]] = {}
    for candidate in _all_pids():
        stat = read_stat(candidate)
        if stat is not None and stat[0] not in "ZX":
            by_parent.setdefault(stat[1], []).append(candidate)
    found, queue = [], [pid]
    while queue:
        below = by_parent.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def environment(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with; empty when it is gone."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.decode(errors="replace").partition("=") for entry in raw.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal; a process that is gone already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_descendants(pid: int, *, timeout_s: float = 10.0) -> list[int]:
    """SIGKILL everything below a process until nothing is left.

    Returns:
        Processes that are still there after the timeout (in uninterruptible sleep).
    """
    deadline = time.monotonic() + timeout_s
    while (left := descendants(pid)) and time.monotonic() < deadline:
        for process in left:
            send(process, signal.SIGKILL)
        time.sleep(0.02)
    return left
