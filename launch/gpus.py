"""What nvidia-smi says about the GPUs of this machine (torch-free)."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass
from typing import Any

_FIELDS = "index,memory.used,memory.total,temperature.gpu"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    index: int
    used_mib: float
    """Memory in use by anybody."""
    total_mib: float
    celsius: float
    """Temperature of the chip."""

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


def query_gpus() -> list[Gpu]:
    """Return the GPUs that nvidia-smi lists; empty where there is none, or no driver."""
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(result.stdout) if result.returncode == 0 else []


def parse_gpus(text: str) -> list[Gpu]:
    """Read nvidia-smi's lines ``index, used MiB, total MiB, degrees``; a value it cannot tell becomes 0."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[0].isdecimal():
            used, total, celsius = (_number(cell) for cell in cells[1:])
            gpus.append(Gpu(int(cells[0]), used, total, celsius))
    return gpus


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:  # "[N/A]"
        return 0.0
