"""Triton's kernels as machine code of the GPUs that they are meant for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    """Catches what the interpreter accepts and the compiler refuses, register spills, and narrow loads."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.kernels.hopper"],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 10
    for found in compiled:
        assert found["local"] == found["stack"] == 0, found
        assert found["reg"] <= 128, found  # 512 threads and more per multiprocessor
        assert found["shared"] <= 48 * 1024, found
        assert found["loads_of_16_bytes"] > 0, found
