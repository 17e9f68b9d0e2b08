"""How a run is spread over ranks (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The ``parallel:`` section. The product of the three axes is the world size."""

    dp_replicate: int = 1
    """Replicas of the sharded model (HSDP); 1 shards over all data-parallel ranks."""

    dp_shard: int = -1
    """Ranks over which FSDP2 shards parameters, gradients and optimizer state; -1 takes what is left."""

    tp: int = 1
    """Ranks that compute one share of the batch together (tensor and sequence parallel); must divide
    the student's heads and ``data.seq_len``."""

    engine: Literal["fsdp"] = "fsdp"
    """Who shards the optimizer: ``fsdp`` is torch's fully_shard (FSDP2)."""

    zero_stage: int = 0
    """ZeRO stage of the DeepSpeed engine; 0 with ``engine: fsdp``."""

    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward and gather them again in backward (ZeRO-3)."""

    timeout_s: float = 600.0
    """Seconds that a collective may take before the run is ended with an error."""

    def __post_init__(self) -> None:
        if self.dp_replicate < 1:
            raise ValueError(f"dp_replicate={self.dp_replicate} must be at least 1")
        if self.dp_shard != -1 and self.dp_shard < 1:
            raise ValueError(
                f"dp_shard={self.dp_shard} must be at least 1, or -1 for all ranks that are left"
            )
        if self.tp < 1:
            raise ValueError(f"tp={self.tp} must be at least 1")
        if self.zero_stage != 0:
            raise ValueError(f"zero_stage={self.zero_stage} must be 0 with engine={self.engine}")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s} must be above 0")
