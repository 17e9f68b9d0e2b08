"""Memory of one GPU over a training step: what is alive at the moments that can be the peak (torch-free).

The functions walk through one microbatch as ``trainer.step.train_step`` does and book every tensor that
lives on: which tensors autograd keeps is a fact of the modules in ``trainer.model`` and
``trainer.kernels``. Temporaries are booked at a moment. Rank 0 is meant, whose shards are the largest.

Legend: B sequences of a microbatch, T tokens, D width, V vocabulary and M dictionary (both padded),
K kept concepts, t tensor-parallel ranks, e bytes of an activation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from launch.planning.layout import Layout, concepts_of
from launch.planning.teacher import Teacher
from parallel.config import ParallelConfig
from trainer.config import ConceptsConfig, ModelConfig, RunConfig
from trainer.model.padding import padded

FP32 = 4
INT64 = 8
CHUNK_ELEMENTS = 2**28
"""Elements of one chunk of logits on a GPU, as ``trainer.kernels.chunks`` cuts them."""
BLOCK_ELEMENTS = 2**25
"""Elements of a chunk's rows that are turned into fp32 at a time, there too."""
SAE_CHUNK_ROWS = 1024
"""Tokens that the autoencoder encodes at a time."""
COPIES_OF_ADAM = 2


@dataclass(frozen=True, slots=True)
class Moment:
    """What is alive at one moment of a step."""

    name: str
    parts: Mapping[str, int]
    """Bytes of tensors by what they are."""
    workspace: int = 0
    """Bytes that a GPU's kernels allocate inside one operation, and of work on another stream; no tensor
    of this moment shows them."""

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """Bytes of tensors and workspace."""
        return self.tensors + self.workspace


class Book:
    """Bytes alive by part, and the moments noted so far."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self._held: Counter[str] = Counter()
        self._beside = 0

    def hold(self, **parts: int) -> None:
        """Tensors that live on; underscores in a name stand for spaces."""
        self._held.update({name.replace("_", " "): size for name, size in parts.items()})

    def drop(self, *names: str) -> None:
        """Tensors that end."""
        for name in names:
            del self._held[name.replace("_", " ")]

    def run_beside(self) -> None:
        """What the moments so far needed beyond what lives on may now be alive at any other moment."""
        self._beside = max(moment.total for moment in self.moments) - sum(self._held.values())

    def note(self, moment: str, workspace: int = 0, **temporaries: int) -> None:
        """A moment at which ``temporaries`` are alive too."""
        parts = self._held + Counter({name.replace("_", " "): size for name, size in temporaries.items()})
        self.moments.append(Moment(moment, dict(parts), workspace + self._beside))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The numbers that the formulas below are written in; bytes where nothing else is said."""

    model: ModelConfig
    layout: Layout
    concepts: ConceptsConfig | None
    tokens: int
    """B*T of the microbatch."""
    seq_len: int
    element: int

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
        lower = 0 if self.concepts is None else self.concepts.insert_layer + 1
        return self.model.n_layer - lower

    def stream(self, positions: int) -> int:
        """(positions, D) activations."""
        return positions * self.model.d_model * self.element


def chunk_rows(tokens: int, columns: int) -> int:
    """Rows of the first chunk of logits, the largest one."""
    return min(tokens, max(1, CHUNK_ELEMENTS // columns))


def chunk_bytes(rows: int, columns: int, element: int, per_block: int) -> int:
    """Bytes of a chunk of logits in work.

    Args:
        rows, columns: of the chunk.
        element: bytes of a logit.
        per_block: bytes beside each logit of the block of rows in work.
    """
    block = min(rows, max(1, BLOCK_ELEMENTS // columns))
    return columns * (rows * element + block * per_block)


def fp32_copies(element: int) -> int:
    """Bytes beside a logit of the block in work: its probability, and before it the logit itself in fp32."""
    return FP32 if element == FP32 else 2 * FP32


def attention_kept(s: _Sizes, positions: int) -> int:
    """Bytes that autograd keeps of LayerNorm and attention over ``positions``.

    Input of the norm, its output (with tensor parallelism the gathered one), queries, keys and values,
    their mixture, log-sum-exps and the norm's two statistics.
    """
    x = s.stream(positions)
    split = x // s.tp
    statistics = 2 * positions // s.tp * s.element
    return split + x + 3 * split + split + FP32 * positions * s.model.n_head // s.tp + statistics


def mlp_kept(s: _Sizes, positions: int) -> int:
    """Bytes that autograd keeps of LayerNorm and MLP: two inputs of D, two inner ones of 4 D."""
    x = s.stream(positions)
    statistics = 2 * positions // s.tp * s.element
    return x // s.tp + x + 2 * 4 * x // s.tp + statistics


def last_attention_kept(s: _Sizes) -> int:
    """As :func:`attention_kept`, where keys and values have 2T positions and queries T.

    The parts of the fused weight for queries and for keys and values are copies.
    """
    read, positions = s.tokens, 2 * s.tokens
    x, width = s.stream(positions), s.model.d_model
    split = x // s.tp
    kept = split + x + 2 * split + 2 * s.stream(read) // s.tp
    weights = 3 * width**2 // s.tp * s.element
    mask = 2 * s.seq_len**2 * (1 + s.element)
    return kept + weights + mask + FP32 * read * s.model.n_head // s.tp + 2 * positions // s.tp * s.element


def mixer_kept(s: _Sizes) -> int:
    """Bytes that autograd keeps of the concept mixer beside the head's gradients.

    fp32: the stream, it less its mean, the mixed concept; compute precision: the head's input; K values
    and ids per token.
    """
    assert s.concepts is not None
    stream = 3 * FP32 * s.tokens * s.model.d_model // s.tp
    return stream + s.stream(s.tokens) + s.tokens * s.concepts.top_k * (INT64 + s.element)


def plan_memory(config: RunConfig, layout: Layout, teacher: Teacher | None) -> tuple[Moment, ...]:
    """The moments of a step that can be its peak.

    Args:
        config: the run.
        layout: where it lies.
        teacher: sizes of the teacher, ``None`` where targets are read or there are none.
    """
    # Gradients accumulate from the first microbatch on, so the peak is in the first or the second.
    moments: list[Moment] = []
    sizes = layout.microbatches
    for index in range(min(2, len(sizes))):
        moments += _microbatch(config, layout, teacher, sizes[index], accumulated=index > 0)
    book = Book()
    _hold_state(book, config, layout, teacher)
    book.note("optimizer step", gradients=FP32 * layout.shard_elements)
    return (*moments, *book.moments)


def _microbatch(
    config: RunConfig, layout: Layout, teacher: Teacher | None, rows: int, *, accumulated: bool
) -> list[Moment]:
    assert config.model is not None
    s = _Sizes(
        model=config.model,
        layout=layout,
        concepts=concepts_of(config),
        tokens=rows * config.data.seq_len,
        seq_len=config.data.seq_len,
        element=2 if config.train.precision == "bf16" else FP32,
    )
    book = Book()
    _hold_state(book, config, layout, teacher)
    if accumulated:
        book.hold(accumulated_gradients=FP32 * layout.gathered_elements)
    if teacher is not None:
        assert config.concepts is not None
        _extraction(book, config, layout, teacher, rows)
        if config.concepts.ahead:
            book.run_beside()
    reshard = config.parallel.reshard_after_forward
    _forward(book, s, reshard=reshard)
    _backward(book, s, reshard=reshard, accumulated=accumulated)
    return book.moments


def optimizer_bytes(layout: Layout) -> int:
    """Adam's two moments of the shard, and a step counter for each weight."""
    return COPIES_OF_ADAM * FP32 * layout.shard_elements + FP32 * layout.num_tensors


def _hold_state(book: Book, config: RunConfig, layout: Layout, teacher: Teacher | None) -> None:
    """What lives as long as the run."""
    book.hold(parameters=FP32 * layout.shard_elements, optimizer=optimizer_bytes(layout))
    concepts = concepts_of(config)
    if concepts is None:
        return
    book.hold(metrics=2 * (concepts.num_concepts + 1))
    if teacher is not None:
        element = 2 if concepts.precision == "bf16" else FP32
        ranks = layout.replica if config.parallel.shard_teacher else 1
        rows = latents_held(concepts, config.parallel)
        book.hold(
            teacher=element * teacher.shard_elements(ranks),
            SAE=FP32 * (2 * rows * teacher.d_model + rows + teacher.d_model),
        )


def latents_held(concepts: ConceptsConfig, parallel: ParallelConfig) -> int:
    """Rows of the autoencoder's dictionary on one rank."""
    return -(-concepts.num_concepts // parallel.tp) if parallel.shard_sae else concepts.num_concepts


def _extraction(book: Book, config: RunConfig, layout: Layout, teacher: Teacher, rows: int) -> None:
    """The teacher's pass: blocks above the residual keep what a gradient of activations needs."""
    assert config.concepts is not None
    concepts, parallel = config.concepts, config.parallel
    element = 2 if concepts.precision == "bf16" else FP32
    tokens = -(-rows // layout.tp) * config.data.seq_len
    stream = element * tokens * teacher.d_model
    # Norm input twice, queries, keys, values and their mixture, the inner width before gelu.
    kept = (teacher.n_layer - 1 - concepts.sae_layer) * (10 * stream + FP32 * tokens * teacher.n_head)
    columns = padded(teacher.vocab_size)
    book.note(
        "targets: the teacher's head",
        extraction=kept + 4 * stream,
        extraction_logits=chunk_bytes(chunk_rows(tokens, columns), columns, element, fp32_copies(element)),
        teacher_gathered=element * _teacher_gathered(teacher, layout) if parallel.shard_teacher else 0,
    )
    streams = 2 * stream
    if parallel.shard_sae:
        # The residuals and gradients of this rank's rows, and those of all rows.
        streams += 2 * stream + 2 * element * rows * config.data.seq_len * teacher.d_model
        tokens = rows * config.data.seq_len
    latents = latents_held(concepts, parallel)
    book.note(
        "targets: the autoencoder",
        workspace=FP32 * SAE_CHUNK_ROWS * latents,
        extraction=streams + 3 * FP32 * tokens * teacher.d_model + (FP32 + INT64) * tokens * concepts.top_k,
        extraction_logits=FP32 * min(SAE_CHUNK_ROWS, tokens) * latents,
    )


def _teacher_gathered(teacher: Teacher, layout: Layout) -> int:
    """A split teacher's root, and the buffer in which its last block arrived."""
    ranks = layout.replica
    return 0 if ranks == 1 else teacher.root.elements(1) + ranks * teacher.block.shard_elements(1, ranks)


def _gathered_weights(s: _Sizes, blocks: int) -> int:
    """The root's weights and those of ``blocks`` blocks, whole or cast, beside the fp32 shards."""
    if s.layout.dp_shard == 1 and not s.cast:
        return 0
    return s.element * (s.layout.root.elements(s.tp) + blocks * s.layout.block.elements(s.tp))


def _gather_buffer(s: _Sizes) -> int:
    """The flat output of a block's all-gather; FSDP2 frees it when it waits for the next one."""
    dp_shard = s.layout.dp_shard
    return 0 if dp_shard == 1 else s.element * dp_shard * s.layout.block.shard_elements(s.tp, dp_shard)


def _forward(book: Book, s: _Sizes, *, reshard: bool) -> None:
    """Book what the student's forward keeps, and note its two heads."""
    num_blocks = s.model.n_layer
    book.hold(tokens=s.tokens * 3 * INT64)
    if s.concepts is None:
        _hold_blocks(book, s, "blocks", num_blocks, s.tokens)
    else:
        lower = s.concepts.insert_layer
        _hold_blocks(book, s, "blocks_below", lower, s.tokens)
        _concept_head(book, s, 0 if reshard else lower)
        # The two streams that were interleaved stay until the model's forward returns.
        book.hold(concept_mixer=mixer_kept(s), streams_before_interleaving=2 * s.stream(s.tokens) // s.tp)
        _hold_blocks(book, s, "interleaved_blocks", num_blocks - 1 - lower, 2 * s.tokens)
        book.hold(last_block_attention=last_attention_kept(s), last_block_MLP=mlp_kept(s, s.tokens))
    book.hold(final_norm=s.stream(s.tokens) // s.tp)
    _lm_head(book, s, 0 if reshard else num_blocks)
    if s.concepts is not None:
        book.drop("streams_before_interleaving")


def _hold_blocks(book: Book, s: _Sizes, name: str, count: int, positions: int) -> None:
    if count:
        book.hold(**{f"{name}_attention": count * attention_kept(s, positions)})
        book.hold(**{f"{name}_MLP": count * mlp_kept(s, positions)})


def _logits(s: _Sizes, columns: int) -> int:
    """Largest temporaries of a head beside its gradients, of which the weight's are made by the first chunk.

    A chunk of logits is reduced and replaced by its gradient, then multiplied; one chunk is alive at a time.
    """
    weight, per_block = columns * s.model.d_model, fp32_copies(s.element)
    first = chunk_rows(s.tokens, columns)
    second = min(first, s.tokens - first)
    found = max(
        chunk_bytes(first, columns, s.element, per_block) - FP32 * weight,
        chunk_bytes(first, columns, s.element, 0) + s.cast * weight,
    )
    if second:
        found = max(
            found,
            chunk_bytes(second, columns, s.element, per_block),
            chunk_bytes(second, columns, s.element, 0) + s.element * weight,
        )
    return found


def _concept_head(book: Book, s: _Sizes, gathered_blocks: int) -> None:
    """Loss, top-K and their gradients in one pass; gradients stay until backward."""
    weight = s.dictionary * s.model.d_model
    book.hold(concept_head_gradients=FP32 * (weight + s.dictionary) + s.stream(s.tokens))
    book.note(
        "forward: concept head",
        concept_mixer=mixer_kept(s) + 2 * FP32 * s.tokens * s.model.d_model // s.tp,
        logits=_logits(s, s.dictionary),
        gathered_weights=_gathered_weights(s, gathered_blocks),
        gather_buffer=_gather_buffer(s),
    )


def _lm_head(book: Book, s: _Sizes, gathered_blocks: int) -> None:
    """The widest moment of most runs: all activations, and a chunk of logits."""
    weight = s.vocabulary * s.model.d_model
    norm = s.stream(s.tokens) if s.tp == 1 else s.stream(s.tokens) + s.stream(s.tokens) // s.tp
    book.hold(LM_head_gradients=FP32 * weight + s.stream(s.tokens))
    book.note(
        "forward: LM head",
        final_norm_output=norm,
        logits=_logits(s, s.vocabulary),
        gathered_weights=_gathered_weights(s, gathered_blocks),
        gather_buffer=_gather_buffer(s),
    )


def _backward(book: Book, s: _Sizes, *, reshard: bool, accumulated: bool) -> None:
    """The heads' gradients are scaled and cast; then the last block, the mixer, and the root's reduction."""
    weight = s.vocabulary * s.model.d_model
    book.note(
        "backward: LM head",
        cast_gradients=s.cast * weight,
        gathered_weights=_gathered_weights(s, 1 if reshard else s.model.n_layer),
    )
    book.drop("LM_head_gradients")
    # The tied embedding's gradient stays until the root, the last unit, is reduced.
    book.hold(root_gradients=s.element * weight)
    book.drop("final_norm", "last_block_attention", "last_block_MLP")
    if s.num_widest:
        _backward_block(book, s, reshard=reshard, accumulated=accumulated)
    book.drop("blocks_attention", "blocks_MLP", "interleaved_blocks_attention", "interleaved_blocks_MLP")
    if s.concepts is not None:
        _backward_mixer(book, s, reshard=reshard, accumulated=accumulated)
        book.drop("concept_mixer", "concept_head_gradients", "blocks_below_attention", "blocks_below_MLP")
    book.drop("root_gradients")
    _reduce_root(book, s, accumulated=accumulated)


def _backward_block(book: Book, s: _Sizes, *, reshard: bool, accumulated: bool) -> None:
    """The MLP of the widest block: gradients of its inner width before and after gelu."""
    positions = s.tokens if s.concepts is None else 2 * s.tokens
    block = s.layout.block.elements(s.tp)
    reduced = _reduction_buffer(s, accumulated)
    if s.concepts is None:
        # Nothing is reduced before the top block; the one below it has one block's activations less.
        reduced = max(0, reduced - attention_kept(s, positions) - mlp_kept(s, positions))
    inner = 4 * s.stream(positions) // s.tp
    book.note(
        "backward: top block",
        workspace=FP32 * positions * s.model.d_model // s.tp,
        block_gradients=inner + 2 * s.stream(positions) + s.element * block,
        reduction_buffer=reduced,
        gathered_weights=_gathered_weights(s, 2 if reshard else s.model.n_layer),
    )


def _backward_mixer(book: Book, s: _Sizes, *, reshard: bool, accumulated: bool) -> None:
    """The K kept values add their gradients to the concept head's; the compress weight has its own."""
    assert s.concepts is not None
    weight, kept = s.dictionary * s.model.d_model, s.tokens * s.concepts.top_k
    book.note(
        "backward: concept head",
        sparse_gradients=s.element * weight + FP32 * weight + kept * (FP32 + s.element + 3 * INT64),
        streams=2 * s.stream(s.tokens) // s.tp,
        reduction_buffer=_reduction_buffer(s, accumulated),
        gathered_weights=_gathered_weights(s, 1 if reshard else s.concepts.insert_layer),
    )


def _reduction_buffer(s: _Sizes, accumulated: bool) -> int:
    """The fp32 copy of a block's gradients that a reduce-scatter reads; it replaces accumulated ones."""
    return 0 if accumulated or s.layout.dp_shard == 1 else FP32 * s.layout.block.elements(s.tp)


def _reduce_root(book: Book, s: _Sizes, *, accumulated: bool) -> None:
    """The root's gradients, the largest unit, are copied into one fp32 buffer and reduced."""
    root = s.layout.root.elements(s.tp)
    shard = s.layout.shard_elements if s.layout.dp_shard > 1 else s.layout.gathered_elements
    book.note(
        "gradient reduction of the root",
        gathered_weights=_gathered_weights(s, 0),
        root_gradients=0 if accumulated else s.element * root,
        reduction_buffer=FP32 * root,
        gradients=0 if accumulated else FP32 * shard,
    )
