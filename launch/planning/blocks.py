"""What the student's blocks keep for backward, compute again and hold gathered, in bytes (torch-free).

Which tensors autograd keeps is a fact of ``trainer.model.gpt2`` and ``parallel.recompute``, and when
weights are whole one of FSDP2. Compiled blocks keep no more: the compiler itself decides what is
cheaper to compute again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.planning.layout import Layout
from parallel.config import ParallelConfig
from trainer.config import ConceptsConfig, Insertion, ModelConfig, PauseConfig
from trainer.model.padding import padded

FP32 = 4
INT64 = 8
CHUNK_ELEMENTS = 2**28
"""Elements of one chunk of logits on a GPU, as ``trainer.kernels.chunks`` cuts them."""
BLOCK_ELEMENTS = 2**25
"""Elements of a chunk's rows that are compared with the targets' logits at a time, there too."""

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers that the formulas are written in; bytes where nothing else is said."""

    model: ModelConfig
    layout: Layout
    parallel: ParallelConfig
    insertion: Insertion | None
    learns_concepts: bool
    """Whether predicted concepts have a loss of their own."""
    tokens: int
    """B*T of the microbatch."""
    seq_len: int
    element: int
    masked: bool = False
    """Whether the documents of a sequence are kept apart."""

    @property
    def concepts(self) -> ConceptsConfig | None:
        """The concept path, where there is one."""
        return self.insertion if isinstance(self.insertion, ConceptsConfig) else None

    @property
    def interleaves(self) -> bool:
        """Whether the upper blocks have a longer stream, of which the last one updates T positions alone."""
        return interleaves(self.insertion)

    @property
    def insert_layer(self) -> int:
        """Blocks below the insertion."""
        return 0 if self.insertion is None else self.insertion.insert_layer

    @property
    def vectors(self) -> int:
        """Tokens of the microbatch that have a vector of their own."""
        return self.tokens // (1 if self.insertion is None else self.insertion.every)

    @property
    def mixed(self) -> int:
        """Positions of the stream above the insertion."""
        return self.tokens + self.vectors if self.interleaves else self.tokens

    @property
    def tp(self) -> int:
        return self.layout.tp

    @property
    def cast(self) -> int:
        """Bytes per element of a copy in the compute precision, which fp32 does not need."""
        return self.element if self.element < FP32 else 0

    @property
    def vocabulary(self) -> int:
        """Columns of next-token logits on this rank."""
        return padded(self.model.vocab_size) // self.tp

    @property
    def dictionary(self) -> int:
        """Columns of concept logits on this rank."""
        return 0 if self.concepts is None else padded(self.concepts.num_concepts) // self.tp

    @property
    def num_widest(self) -> int:
        """Blocks that update all positions of the longest stream."""
        return self.model.n_layer - self.insert_layer - self.interleaves

    def stream(self, positions: int) -> int:
        """(positions, D) activations."""
        return positions * self.model.d_model * self.element

    def mask(self, positions: int) -> int:
        """What keeps documents apart in a stream of B*S positions: (B, S, S)."""
        return positions**2 * self.seq_len // self.tokens * self.element if self.masked else 0

    def received(self, positions: int) -> int:
        """A sublayer's input where other ranks sent parts of it; alone a rank can compute it again."""
        return self.stream(positions) if self.tp > 1 else 0

    def statistics(self, positions: int) -> int:
        """Mean and inverse deviation of a LayerNorm over this rank's part."""
        return 2 * positions // self.tp * self.element


def interleaves(insertion: Insertion | None) -> bool:
    """Whether vectors get positions of their own."""
    return isinstance(insertion, PauseConfig) or (insertion is not None and insertion.mix == "interleave")


def chunk_rows(tokens: int, columns: int) -> int:
    """Rows of the first chunk of logits, the largest one."""
    return min(tokens, max(1, CHUNK_ELEMENTS // columns))


# Activations


def attention_kept(s: Sizes, positions: int, recompute: Recompute) -> int:
    """Bytes that autograd keeps of LayerNorm and attention over ``positions``.

    Input of the norm, its output (with tensor parallelism the gathered one), queries, keys and values,
    their mixture, log-sum-exps and the norm's two statistics. ``selective`` computes the norm again,
    ``full`` all but the input.
    """
    split = s.stream(positions) // s.tp
    if recompute == "full":
        return split
    products = 3 * split + split + FP32 * positions * s.model.n_head // s.tp
    if recompute == "selective":
        return split + s.received(positions) + products
    return split + s.stream(positions) + products + s.statistics(positions)


def mlp_kept(s: Sizes, positions: int, recompute: Recompute) -> int:
    """Bytes that autograd keeps of LayerNorm and MLP: two inputs of D, two inner ones of 4 D.

    ``selective`` computes the norm and the second inner one again, ``full`` everything.
    """
    split = s.stream(positions) // s.tp
    if recompute == "full":
        return 0
    if recompute == "selective":
        return split + s.received(positions) + 4 * split
    return split + s.stream(positions) + 2 * 4 * split + s.statistics(positions)


def last_attention_kept(s: Sizes, recompute: Recompute) -> int:
    """As :func:`attention_kept`, where keys and values have T + T/s positions and queries T.

    The parts of the fused weight for queries and for keys and values are copies; so are the rows of the
    queries, unless they are every other one.
    """
    read, positions = s.tokens, s.mixed
    width = s.model.d_model
    split = s.stream(positions) // s.tp
    if recompute == "full":
        return split
    products = 2 * split + 2 * s.stream(read) // s.tp + FP32 * read * s.model.n_head // s.tp
    if recompute == "selective":
        return split + s.received(positions) + products
    weights = 3 * width**2 // s.tp * s.element
    width_above = s.mixed * s.seq_len // s.tokens
    if not s.masked:
        mask = s.seq_len * width_above * (1 + s.element)
    else:
        mask = 0 if positions == 2 * read else read * width_above * s.element
    rows = 0 if positions == 2 * read else s.stream(read)
    return split + s.stream(positions) + rows + products + weights + mask + s.statistics(positions)


def mlp_recomputed(s: Sizes, positions: int, recompute: Recompute, *, last: bool) -> int:
    """Bytes that are alive again when backward reaches a block's MLP.

    ``selective`` brings back the MLP's part of what it left out, ``full`` the whole block. ``last`` is the
    block that reads more positions than it updates.
    """
    mlp = mlp_kept(s, positions, "none") - mlp_kept(s, positions, recompute)
    if recompute != "full":
        return mlp
    if last:
        return mlp + last_attention_kept(s, "none") - last_attention_kept(s, "full")
    return mlp + attention_kept(s, positions, "none") - attention_kept(s, positions, "full")


def mlp_at_work(s: Sizes, positions: int, recompute: Recompute) -> int:
    """Bytes at the peak of an MLP's forward beside what it keeps.

    Alone that is gelu, whose input and result exist. With tensor parallelism it is the sum over the ranks,
    which reads a copy of its input in order of the parts.
    """
    if s.tp == 1:
        return mlp_kept(s, positions, "none") - mlp_kept(s, positions, recompute)
    x, split = s.stream(positions), s.stream(positions) // s.tp
    own = split if recompute == "full" else 0
    return own + x + 4 * split + 2 * x + 2 * split


# Weights


def whole_weights(s: Sizes, blocks: int) -> int:
    """The root's weights and those of ``blocks`` blocks, whole in the compute precision."""
    return s.element * s.layout.root.elements(s.tp) + blocks * _block(s)


def gather_buffer(s: Sizes, blocks: int = 1) -> int:
    """The flat outputs of the all-gathers of ``blocks`` blocks.

    In forward FSDP2 frees one only when it waits for the next.
    """
    dp_shard = s.layout.dp_shard
    shard = s.layout.block.shard_elements(s.tp, dp_shard)
    return 0 if dp_shard == 1 else blocks * s.element * dp_shard * shard


def copied_shard(s: Sizes) -> int:
    """A block's offloaded shard on its way into an all-gather, before it is cast."""
    offloaded = s.parallel.offload_parameters
    return FP32 * s.layout.block.shard_elements(s.tp, s.layout.dp_shard) if offloaded else 0


def kept_by_forward(s: Sizes, done: int) -> int:
    """Bytes that the weights of the first ``done`` blocks take after their forward."""
    policy = s.parallel.reshard_after_forward
    if policy == "node":
        return done * _block(s) // s.layout.shards_per_node
    if _keeps_all(s):
        return done * _block(s)
    return _block(s) if policy == "auto" and done == s.model.n_layer else 0


def gathered_ahead(s: Sizes, done: int) -> int:
    """Bytes of gathered weights that wait for their blocks, after the forward of ``done`` blocks."""
    return gather_buffer(s, min(s.parallel.prefetch, s.model.n_layer - done))


def kept_in_backward(s: Sizes, own: int, before: int) -> int:
    """Bytes of whole weights in backward.

    Args:
        s: sizes.
        own: 1 while a block is at work, 0 outside of them.
        before: blocks whose backward is still to come; the next one is gathered ahead, or once blocks are
            at work as many as ``parallel.prefetch`` says.
    """
    if _keeps_all(s):
        return whole_weights(s, own + before)
    ahead = max(1, s.parallel.prefetch) if before < s.model.n_layer else 1
    ahead = min(ahead, before) if s.layout.dp_shard > 1 else 0
    waiting = 0
    if s.parallel.reshard_after_forward == "node":
        waiting = (before - ahead) * _block(s) // s.layout.shards_per_node
    return whole_weights(s, own + ahead) + waiting


def _block(s: Sizes) -> int:
    return s.element * s.layout.block.elements(s.tp)


def _keeps_all(s: Sizes) -> bool:
    policy = s.parallel.reshard_after_forward
    return policy == "never" or (policy == "auto" and s.layout.dp_shard == 1)
