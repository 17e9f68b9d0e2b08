"""Settings of the whole test suite."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Settings that libraries read when they are imported.

    One thread per process: rank tests fork, and several ranks share few cores. Without a GPU Triton's
    kernels run in its interpreter.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; the reason stands in pytest's summary."""
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slurm") and shutil.which("slurmctld") is None:
            item.add_marker(pytest.mark.skip(reason="needs slurmctld on the PATH"))


def _has_gpu() -> bool:
    # torch is imported late, so that torch-free tests start quickly.
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="module")
def deepspeed_before_forks() -> Iterator[None]:
    """Import deepspeed once for all ranks that a module forks; its stage 3 partitions small weights too."""
    import torch

    import parallel.zero

    parallel.zero.load_deepspeed(torch.device("cpu"))
    # It collects garbage at every turn, and so many modules are a lot to walk through.
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.zero, "_WHOLE_BELOW", 0)
        yield
    gc.unfreeze()
