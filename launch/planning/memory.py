"""Memory of one GPU over a training step: what is alive at the moments that can be the peak (torch-free).

The functions walk through one microbatch as ``trainer.step.train_step`` does and book every tensor that
lives on: which tensors autograd keeps is a fact of the modules in ``trainer.model`` and
``trainer.kernels``. Temporaries are booked at a moment. Rank 0 is meant, whose shards are the largest.

Legend: B sequences of a microbatch, T tokens, D width, V vocabulary and M dictionary (both padded),
K kept concepts, t tensor-parallel ranks, e bytes of an activation.
"""

from __future__ import annotations

from launch.planning.blocks import (
    BLOCK_ELEMENTS,
    FP32,
    INT64,
    Sizes,
    attention_kept,
    chunk_rows,
    copied_shard,
    gather_buffer,
    gathered_ahead,
    kept_by_forward,
    kept_in_backward,
    last_attention_kept,
    mlp_at_work,
    mlp_kept,
    mlp_recomputed,
    whole_weights,
)
from launch.planning.book import Book, Moment
from launch.planning.layout import Layout
from launch.planning.targets import distribution, extraction, latents_held
from launch.planning.teacher import Teacher
from trainer.config import RunConfig

COPIES_OF_ADAM = 2


def mixer_kept(s: Sizes) -> int:
    """Bytes that autograd keeps of the concept mixer beside the head's gradients.

    fp32: the stream, it less its mean, the mixed concept; compute precision: the head's input; K values
    and ids per token. What is only predicted is not mixed.
    """
    assert s.concepts is not None
    streams = 2 if s.concepts.mix == "none" else 3
    stream = streams * FP32 * s.vectors * s.model.d_model // s.tp
    return stream + s.stream(s.vectors) + s.vectors * s.concepts.top_k * (INT64 + s.element)


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
    book = _book(config)
    _hold_state(book, config, layout, teacher)
    book.note("optimizer step", gradients=FP32 * layout.shard_elements)
    return (*moments, *book.moments)


def _microbatch(
    config: RunConfig, layout: Layout, teacher: Teacher | None, rows: int, *, accumulated: bool
) -> list[Moment]:
    assert config.model is not None
    s = Sizes(
        model=config.model,
        layout=layout,
        parallel=config.parallel,
        insertion=config.insertion,
        learns_concepts=config.predicted_concepts is not None and config.objective.concept_weight > 0,
        tokens=rows * config.data.seq_len,
        seq_len=config.data.seq_len,
        element=2 if config.train.precision == "bf16" else FP32,
        masked=config.data.mask_documents,
    )
    book = _book(config)
    _hold_state(book, config, layout, teacher)
    if accumulated:
        book.hold(accumulated_gradients=FP32 * layout.gathered_elements)
    if teacher is not None and config.kd is not None and config.objective.name == "kd":
        distribution(book, config, layout, teacher, rows)
    elif teacher is not None:
        assert config.concepts is not None
        extraction(book, config, layout, teacher, rows)
        if config.concepts.ahead:
            book.run_beside()
    _forward(book, s, teacher)
    _backward(book, s, accumulated=accumulated)
    return book.moments


def _book(config: RunConfig) -> Book:
    return Book(("parameters", "optimizer", "gradients") if config.parallel.offload_parameters else ())


def optimizer_bytes(layout: Layout) -> int:
    """Adam's two moments of the shard, and a step counter for each weight."""
    return COPIES_OF_ADAM * FP32 * layout.shard_elements + FP32 * layout.num_tensors


def _hold_state(book: Book, config: RunConfig, layout: Layout, teacher: Teacher | None) -> None:
    """What lives as long as the run."""
    book.hold(parameters=FP32 * layout.shard_elements, optimizer=optimizer_bytes(layout))
    if teacher is not None:
        ranks = layout.replica if config.parallel.shard_teacher else 1
        book.hold(teacher=teacher.element * teacher.shard_elements(ranks))
    concepts = config.predicted_concepts
    if concepts is None:
        return
    book.hold(metrics=2 * INT64 * (concepts.num_concepts + 1))
    if teacher is not None:
        rows = latents_held(concepts, config.parallel)
        book.hold(SAE=FP32 * (2 * rows * teacher.d_model + rows + teacher.d_model))


def _forward(book: Book, s: Sizes, teacher: Teacher | None) -> None:
    """Book what the student's forward keeps, and note its two heads."""
    book.hold(tokens=s.tokens * (5 if s.masked else 3) * INT64, document_masks=s.mask(s.tokens))
    _hold_blocks(book, s, "blocks_below", s.insert_layer, s.tokens)
    if s.concepts is not None:
        _concept_head(book, s)
        book.hold(concept_mixer=mixer_kept(s))
    if s.insertion is not None:
        # The two streams that were mixed stay until the model's forward returns; a pause has no second one.
        vectors = s.vectors if s.concepts is not None else 0
        book.hold(streams_before_mixing=(s.stream(s.tokens) + s.stream(vectors)) // s.tp)
    if s.interleaves:
        book.hold(interleaved_masks=s.mask(s.mixed))
    _hold_blocks(book, s, "interleaved_blocks" if s.interleaves else "blocks", s.num_widest, s.mixed)
    _top_block(book, s)
    if s.interleaves:
        how = s.parallel.recompute
        book.hold(last_block_attention=last_attention_kept(s, how), last_block_MLP=mlp_kept(s, s.tokens, how))
    book.hold(final_norm=s.stream(s.tokens) // s.tp)
    _lm_head(book, s, teacher)
    book.drop("streams_before_mixing", "teacher_states")


def _hold_blocks(book: Book, s: Sizes, name: str, count: int, positions: int) -> None:
    if count:
        how = s.parallel.recompute
        book.hold(**{f"{name}_attention": count * attention_kept(s, positions, how)})
        book.hold(**{f"{name}_MLP": count * mlp_kept(s, positions, how)})


def _logits(s: Sizes, rows: int, columns: int, per_block: int = 0, *, gradient: bool = True) -> int:
    """Largest temporaries of a head beside its gradients, of which the weight's are made by the first chunk.

    A chunk of logits is reduced and replaced by its gradient in place (on a GPU by one kernel, without fp32
    copies), then multiplied; one chunk is alive at a time.

    Args:
        s: sizes.
        rows, columns: of the logits.
        per_block: bytes beside each logit of the block of rows in work before that.
        gradient: whether any are taken.
    """
    weight = columns * s.model.d_model
    first = chunk_rows(rows, columns)
    if not gradient:
        return s.element * first * columns
    second = min(first, rows - first)
    block = per_block * min(first, max(1, BLOCK_ELEMENTS // columns)) * columns
    found = s.element * first * columns + max(block - FP32 * weight, s.cast * weight)
    if second:
        found = max(found, s.element * second * columns + max(block, s.element * weight))
    return found


def _top_block(book: Book, s: Sizes) -> None:
    """The MLP of the widest block, where less is kept than is at work."""
    if not s.num_widest or s.parallel.recompute == "none":
        return
    done = s.model.n_layer - (2 if s.interleaves else 1)
    book.note(
        "forward: top block",
        activations_at_work=mlp_at_work(s, s.mixed, s.parallel.recompute),
        gathered_weights=whole_weights(s, 1) + kept_by_forward(s, done),
        gather_buffer=gather_buffer(s) + gathered_ahead(s, done + 1),
    )


def _concept_head(book: Book, s: Sizes) -> None:
    """Loss, top-K and their gradients in one pass; gradients stay until backward."""
    weight = s.dictionary * s.model.d_model
    if s.learns_concepts:
        book.hold(concept_head_gradients=FP32 * (weight + s.dictionary) + s.stream(s.vectors))
    # A byte per logit is a comparison, for the targets' ranks.
    logits = _logits(s, s.vectors, s.dictionary, per_block=1, gradient=s.learns_concepts)
    book.note(
        "forward: concept head",
        concept_mixer=mixer_kept(s) + 2 * FP32 * s.vectors * s.model.d_model // s.tp,
        logits=logits,
        gathered_weights=whole_weights(s, 0) + kept_by_forward(s, s.insert_layer),
        gather_buffer=gather_buffer(s) + gathered_ahead(s, s.insert_layer),
    )


def _lm_head(book: Book, s: Sizes, teacher: Teacher | None) -> None:
    """The widest moment of most runs: all activations, and a chunk of logits."""
    weight = s.vocabulary * s.model.d_model
    norm = s.stream(s.tokens) if s.tp == 1 else s.stream(s.tokens) + s.stream(s.tokens) // s.tp
    book.hold(LM_head_gradients=FP32 * weight + s.stream(s.tokens))
    distilled = teacher if s.insertion is None else None
    book.note(
        "forward: LM head",
        final_norm_output=norm,
        logits=_logits(s, s.tokens, s.vocabulary) if distilled is None else _two_logits(s, distilled),
        gathered_weights=whole_weights(s, 0) + kept_by_forward(s, s.model.n_layer),
        gather_buffer=gather_buffer(s),
    )


def _two_logits(s: Sizes, teacher: Teacher) -> int:
    """As :func:`_logits`, with the teacher's beside them until a chunk's gradient is there.

    Of a block of rows there are both logarithms of probabilities and their difference in fp32.
    """
    columns, weight = s.vocabulary, s.vocabulary * s.model.d_model
    first = chunk_rows(s.tokens, columns)
    second = min(first, s.tokens - first)
    block = 3 * FP32 * max(1, BLOCK_ELEMENTS // columns) * columns
    beside = teacher.element * first * columns + min(block, 3 * FP32 * first * columns)
    found = s.element * first * columns + max(beside - FP32 * weight, s.cast * weight)
    if second:
        beside = teacher.element * second * columns + min(block, 3 * FP32 * second * columns)
        found = max(found, s.element * second * columns + max(beside, s.element * weight))
    return found


def _backward(book: Book, s: Sizes, *, accumulated: bool) -> None:
    """The heads' gradients are scaled and cast; then the last block, the mixer, and the root's reduction."""
    weight = s.vocabulary * s.model.d_model
    book.note(
        "backward: LM head",
        cast_gradients=s.cast * weight,
        gathered_weights=kept_in_backward(s, 0, s.model.n_layer),
    )
    book.drop("LM_head_gradients")
    # The tied embedding's gradient stays until the root, the last unit, is reduced.
    book.hold(root_gradients=s.element * weight)
    book.drop("final_norm")
    if s.interleaves:
        _backward_block(book, s, "backward: last block", s.tokens, done=0, accumulated=accumulated)
    book.drop("last_block_attention", "last_block_MLP")
    if s.num_widest:
        done = int(s.interleaves)
        _backward_block(book, s, "backward: top block", s.mixed, done=done, accumulated=accumulated)
    book.drop("blocks_attention", "blocks_MLP", "interleaved_blocks_attention", "interleaved_blocks_MLP")
    book.drop("interleaved_masks")
    if s.concepts is not None:
        _backward_mixer(book, s, accumulated=accumulated)
    book.drop("concept_mixer", "concept_head_gradients", "blocks_below_attention", "blocks_below_MLP")
    book.drop("root_gradients", "document_masks")
    _reduce_root(book, s, accumulated=accumulated)


def _backward_block(
    book: Book, s: Sizes, moment: str, positions: int, *, done: int, accumulated: bool
) -> None:
    """The MLP of a block behind ``done`` others: gradients of its result, projection and inner width."""
    how = s.parallel.recompute
    last = s.interleaves and done == 0
    reduced = _reduction_buffer(s, accumulated) if done or not s.interleaves else 0
    if not s.interleaves:
        # Nothing is reduced before the top block; the one below it has one block's activations less.
        reduced = max(0, reduced - attention_kept(s, positions, how) - mlp_kept(s, positions, how))
    split = s.stream(positions) // s.tp
    projection = 4 * s.model.d_model**2 // s.tp * s.element
    book.note(
        moment,
        workspace=FP32 * positions * s.model.d_model // s.tp + copied_shard(s),
        recomputed_activations=mlp_recomputed(s, positions, how, last=last),
        block_gradients=split + s.received(positions) + projection + 4 * split,
        reduction_buffer=reduced,
        gathered_weights=kept_in_backward(s, 1, s.model.n_layer - 1 - done),
    )


def _backward_mixer(book: Book, s: Sizes, *, accumulated: bool) -> None:
    """The K kept values add their gradients to the concept head's; the compress weight has its own."""
    assert s.concepts is not None
    weight, kept = s.dictionary * s.model.d_model, s.vectors * s.concepts.top_k
    gradients = s.cast * weight
    if s.concepts.mix != "none":
        gradients = s.element * weight + FP32 * weight + kept * (FP32 + s.element + 3 * INT64)
    book.note(
        "backward: concept head",
        workspace=copied_shard(s),
        sparse_gradients=gradients,
        streams=2 * s.stream(s.vectors) // s.tp,
        reduction_buffer=_reduction_buffer(s, accumulated),
        gathered_weights=kept_in_backward(s, 0, s.insert_layer),
    )


def _reduction_buffer(s: Sizes, accumulated: bool) -> int:
    """The fp32 copy of a block's gradients that a reduce-scatter reads; it replaces accumulated ones."""
    return 0 if accumulated or s.layout.dp_shard == 1 else FP32 * s.layout.block.elements(s.tp)


def _reduce_root(book: Book, s: Sizes, *, accumulated: bool) -> None:
    """The root's gradients, the largest unit, are copied into one fp32 buffer and reduced."""
    root = s.layout.root.elements(s.tp)
    shard = s.layout.shard_elements if s.layout.dp_shard > 1 else s.layout.gathered_elements
    if s.layout.dp_size == 1:
        shard -= root  # the buffer becomes the root's gradients
    book.note(
        "gradient reduction of the root",
        gathered_weights=whole_weights(s, 0),
        root_gradients=0 if accumulated else s.element * root,
        reduction_buffer=FP32 * root,
        gradients=0 if accumulated else FP32 * shard,
    )
