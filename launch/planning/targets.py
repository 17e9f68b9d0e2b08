"""Memory of what a frozen teacher and its autoencoder compute before a student's microbatch (torch-free)."""

from __future__ import annotations

from launch.planning.blocks import FP32, INT64, chunk_rows
from launch.planning.book import Book
from launch.planning.layout import Layout
from launch.planning.teacher import Teacher
from parallel.config import ParallelConfig
from trainer.config import ConceptsConfig, RunConfig
from trainer.model.padding import padded

SAE_CHUNK_ROWS = 1024
"""Tokens that the autoencoder encodes at a time."""


def latents_held(concepts: ConceptsConfig, parallel: ParallelConfig) -> int:
    """Rows of the autoencoder's dictionary on one rank."""
    return -(-concepts.num_concepts // parallel.tp) if parallel.shard_sae else concepts.num_concepts


def extraction(book: Book, config: RunConfig, layout: Layout, teacher: Teacher, rows: int) -> None:
    """Note the pass of the teacher over its share of ``rows`` sequences, then the autoencoder."""
    _teacher_pass(book, config, layout, teacher, rows)
    assert config.concepts is not None
    concepts, seq_len = config.concepts, config.data.seq_len
    tokens, every = -(-rows // layout.tp) * seq_len, 1
    if config.parallel.shard_sae:  # what was read of this rank's rows is gone when that of all rows is here
        tokens, every = rows * seq_len, concepts.every
    read = 2 if config.differentiates_teacher else 1
    streams = read * teacher.element * tokens * teacher.d_model // every
    tokens //= concepts.every
    latents, chunk = latents_held(concepts, config.parallel), min(SAE_CHUNK_ROWS, tokens)
    # The encoder as three bf16 matrices; a chunk's rows as three and as the two that they are made of.
    split = 2 * (3 * latents + 5 * chunk) * teacher.d_model if teacher.element < FP32 else 0
    book.note(
        "targets: the autoencoder",
        extraction=streams + 3 * FP32 * tokens * teacher.d_model + (FP32 + INT64) * tokens * concepts.top_k,
        extraction_encoder=split,
        extraction_logits=FP32 * chunk * latents,
    )


def _teacher_pass(book: Book, config: RunConfig, layout: Layout, teacher: Teacher, rows: int) -> None:
    """Blocks up to the residual; those above keep what a gradient of activations needs, if one is taken."""
    assert config.concepts is not None
    tokens = -(-rows // layout.tp) * config.data.seq_len
    masks = _document_masks(config, teacher, tokens)
    gathered = 0
    if config.parallel.shard_teacher and layout.replica > 1:
        root, ranks = teacher.root, layout.replica
        arriving = root.elements(1) + ranks * root.shard_elements(1, ranks)
        book.note("targets: the teacher's root", teacher_gathered=teacher.element * arriving)
        gathered = teacher.element * _teacher_gathered(teacher, layout)
    book.note(
        "targets: the teacher's blocks",
        extraction=_blocks_at_work(teacher, tokens),
        document_masks=masks,
        teacher_gathered=gathered,
    )
    if not config.differentiates_teacher:
        return
    stream = teacher.element * tokens * teacher.d_model
    above = teacher.n_layer - 1 - config.concepts.sae_layer
    # Norm input twice, queries, keys, values and their mixture, the inner width before gelu.
    kept = above * (10 * stream + FP32 * tokens * teacher.n_head)
    columns = padded(teacher.vocab_size)
    book.note(
        "targets: the teacher's head",
        extraction=kept + 4 * stream,
        document_masks=masks,
        extraction_logits=teacher.element * chunk_rows(tokens, columns) * columns,
        teacher_gathered=gathered,
    )


def distribution(book: Book, config: RunConfig, layout: Layout, teacher: Teacher, rows: int) -> None:
    """The forward of a teacher whose final hidden states wait for the student's head."""
    tokens = -(-rows // layout.tp) * config.data.seq_len
    book.note(
        "targets: the teacher's blocks",
        extraction=_blocks_at_work(teacher, tokens),
        document_masks=_document_masks(config, teacher, tokens),
    )
    book.hold(teacher_states=teacher.element * rows * config.data.seq_len * teacher.d_model)


def _document_masks(config: RunConfig, teacher: Teacher, tokens: int) -> int:
    """What keeps documents apart in the teacher: (B, T, T)."""
    return config.data.seq_len * tokens * teacher.element if config.data.mask_documents else 0


def _blocks_at_work(teacher: Teacher, tokens: int) -> int:
    """Peak of a block's forward without gradients: its input, the stream, the norm's output, gelu's two."""
    return (3 + 2 * 4) * teacher.element * tokens * teacher.d_model


def _teacher_gathered(teacher: Teacher, layout: Layout) -> int:
    """A split teacher's root, and the buffer in which its last block arrived."""
    ranks = layout.replica
    return teacher.root.elements(1) + ranks * teacher.block.shard_elements(1, ranks)
