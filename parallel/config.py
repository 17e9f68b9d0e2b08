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

    shard_teacher: bool = False
    """Split the frozen teacher's weights over the ranks of a replica (``dp_shard`` x ``tp``) and gather
    them block by block while targets are computed; otherwise every rank holds all of them."""

    shard_sae: bool = False
    """Split the frozen autoencoder's dictionary over the ``tp`` ranks, which then look for active latents
    together; otherwise every rank holds all of it."""

    engine: Literal["fsdp", "deepspeed"] = "fsdp"
    """Who shards the optimizer: ``fsdp`` is torch's fully_shard (FSDP2), ``deepspeed`` is ZeRO."""

    zero_stage: int = 0
    """With ``engine: deepspeed`` 1 shards optimizer state, 2 gradients too, 3 parameters too; else 0."""

    offload_optimizer: bool = False
    """Keep master weights and optimizer state in CPU memory and update there."""

    offload_parameters: bool = False
    """Keep the sharded parameters in CPU memory between their uses: with ``engine: fsdp`` exactly if
    ``offload_optimizer``, because its masters are its shards; with DeepSpeed at stage 3 only."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations of a block that backward computes again: ``selective`` keeps its input, matrix products,
    attention and what other ranks sent, ``full`` its input only."""

    compile: bool = False
    """Compile each block of student and teacher with torch.compile at its first use."""

    reshard_after_forward: Literal["auto", "always", "never", "node"] = "auto"
    """Whether a block's gathered weights are freed after its forward and gathered again in backward
    (FSDP only): ``auto`` frees all but the last block's, which backward needs first, and none if
    ``dp_shard`` is 1; ``node`` keeps one copy per node, so that backward gathers within it."""

    prefetch: int = 0
    """Blocks whose weights are gathered ahead of their use in forward and in backward (FSDP only); 0 leaves
    it to FSDP2: none in forward, one in backward."""

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
        if self.shard_sae and self.tp == 1:
            raise ValueError(
                "shard_sae=true needs tp of at least 2: ranks that read other rows of the batch would have "
                "to exchange all their residuals to use one dictionary together"
            )
        if self.prefetch < 0:
            raise ValueError(f"prefetch={self.prefetch} must be at least 0")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s} must be above 0")
        if self.engine == "fsdp":
            self._check_fsdp()
        else:
            self._check_deepspeed()

    def _check_fsdp(self) -> None:
        if self.zero_stage != 0:
            raise ValueError(f"zero_stage={self.zero_stage} must be 0 with engine=fsdp")
        both = ("offload_optimizer", "offload_parameters")
        for name, other in (both, both[::-1]):
            if getattr(self, name) and not getattr(self, other):
                raise ValueError(
                    f"{name}=true needs {other}=true with engine=fsdp, whose optimizer updates the shards"
                )
        if self.reshard_after_forward == "node" and self.tp > 1:
            raise ValueError(f"reshard_after_forward=node needs tp=1, not {self.tp}: FSDP2 cannot do both")

    def _check_deepspeed(self) -> None:
        if not 1 <= self.zero_stage <= 3:
            raise ValueError(
                f"zero_stage={self.zero_stage} must be 1, 2 or 3 with engine=deepspeed: "
                "stage 0 shards nothing, and engine=fsdp does that better"
            )
        if self.tp > 1:
            raise ValueError(f"tp={self.tp} must be 1 with engine=deepspeed: ZeRO shards plain tensors only")
        if self.dp_replicate > 1:
            raise ValueError(
                f"dp_replicate={self.dp_replicate} must be 1 with engine=deepspeed: "
                "ZeRO shards over all ranks; engine=fsdp has hybrid sharding"
            )
        if self.reshard_after_forward != "auto":
            raise ValueError(
                f"reshard_after_forward={self.reshard_after_forward} must be auto with engine=deepspeed: "
                "its stage decides"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile=true needs zero_stage=1 or 2: stage 3 has hooks inside each block")
        if self.prefetch > 0:
            raise ValueError(f"prefetch={self.prefetch} must be 0 with engine=deepspeed, which has its own")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters=true needs zero_stage=3: stage {self.zero_stage} keeps parameters whole"
            )

    def shards_per_node(self, dp_shard: int, ranks_per_node: int) -> int:
        """Ranks of a node that share one copy of the weights; ranks are numbered node by node.

        Raises:
            ValueError: ``reshard_after_forward=node`` and the shards do not lie on several whole nodes.
        """
        several = 1 < ranks_per_node < dp_shard and dp_shard % ranks_per_node == 0
        if self.reshard_after_forward == "node" and not several:
            raise ValueError(
                f"parallel.reshard_after_forward=node needs dp_shard={dp_shard} ranks on several whole nodes "
                f"of {ranks_per_node} ranks: use always or never"
            )
        return min(ranks_per_node, dp_shard)
