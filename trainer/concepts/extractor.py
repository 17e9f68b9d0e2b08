"""Tokens -> concept targets: the frozen teacher with its sparse autoencoder, on the fly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.apply import shard_frozen
from parallel.tensor import TensorGroup
from trainer.concepts.attribution import (
    attribution,
    random_scores,
    residual_and_gradient,
    select_targets,
)
from trainer.concepts.sae import TopKSae
from trainer.concepts.sae_formats import check_fits, load_sae
from trainer.config import ConceptsConfig
from trainer.kernels.reference import MASKED_TARGET
from trainer.model.documents import Documents
from trainer.model.formats import load_model
from trainer.model.gpt2 import GPT2


def load_frozen(path: str, *, key: str) -> GPT2:
    """A frozen GPT-2; ``key`` is the setting named in errors.

    Raises:
        ValueError: the model is not a plain GPT-2.
        FileNotFoundError: no model there.
    """
    teacher = load_model(path)
    if type(teacher) is not GPT2:
        kind = type(teacher).__name__
        raise ValueError(f"{key}: the teacher at {path} is a {kind} student, it must be a plain GPT-2")
    return teacher


def load_teacher(path: str, layer: int, *, key: str) -> GPT2:
    """A frozen GPT-2 that has a block after ``layer``; ``key`` is the setting named in errors.

    Raises:
        ValueError: the layer is the last block or beyond it, or the model is not a plain GPT-2.
        FileNotFoundError: no model there.
    """
    teacher = load_frozen(path, key=key)
    if not 0 <= layer < teacher.config.n_layer - 1:
        raise ValueError(
            f"{key}={layer} must be from 0 to {teacher.config.n_layer - 2}: "
            f"the teacher at {path} has {teacher.config.n_layer} blocks and one must follow the residual"
        )
    return teacher


def shard_teacher(teacher: GPT2, ranks: DeviceMesh, *, backward: bool) -> None:
    """Split a teacher's weights over the ranks of a replica.

    Args:
        teacher: frozen, on the device of the run.
        ranks: from :func:`parallel.mesh.replica_mesh`.
        backward: whether gradients of its loss are taken, or residuals alone.
    """
    shard_frozen(teacher, teacher.plan, ranks, ("residual_after", "loss_from_residual"), backward=backward)


def check_vocabulary(
    teacher: GPT2, vocab_size: int, seq_len: int, path: str, *, key: str = "concepts.teacher"
) -> None:
    """Refuse a teacher that cannot read the data: too small a vocabulary or too few positions."""
    if vocab_size > teacher.config.vocab_size:
        raise ValueError(
            f"{key}: token ids up to {vocab_size - 1} in the data are beyond the vocabulary of "
            f"{teacher.config.vocab_size} of the teacher at {path}"
        )
    if seq_len > teacher.config.n_positions:
        raise ValueError(
            f"data.seq_len={seq_len} must be at most {teacher.config.n_positions}, "
            f"the positions of the teacher at {path}"
        )


MAX_PACKED_ID = 2**16 - 2


def pack_ids(targets: Tensor) -> Tensor:
    """Target ids (..., A), ``MASKED_TARGET`` included, as two bytes each: (..., 2A) uint8."""
    return targets.to(torch.int16).view(torch.uint8)


def unpack_ids(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_ids`, int64, from (..., 2A) uint8 or the same bytes as (..., A) uint16.

    Two bytes hold ids up to ``MAX_PACKED_ID``.
    """
    ids = packed.view(torch.int16).long() & 0xFFFF
    return ids.masked_fill(ids == 0xFFFF, MASKED_TARGET)


def share_rows(
    input_ids: Tensor, documents: Documents | None, tp: TensorGroup
) -> tuple[Tensor, Documents | None]:
    """The rows of input_ids (B, T) that this rank of ``tp`` gives to the teacher, with their documents."""
    return tp.share_rows(input_ids), None if documents is None else documents.map(tp.share_rows)


class TargetExtractor:
    """Concept targets of a batch of tokens, selected by attribution unless ``concepts.targets`` says else.

    Args:
        teacher: frozen GPT-2 on the device of the run.
        sae: its TopK sparse autoencoder, same device.
        config: layer, number of targets, ranking and masking.
        tp: ranks that hold the same tokens. Each of them runs the teacher on a share of the rows; the
            autoencoder follows on these alone, or on all rows where the ranks share its dictionary.
    """

    def __init__(
        self, teacher: GPT2, sae: TopKSae, config: ConceptsConfig, tp: TensorGroup | None = None
    ) -> None:
        self.tp = tp or TensorGroup()
        if self.tp.size > 1 and sae.tp.size == 1 and config.num_concepts - 1 > MAX_PACKED_ID:
            raise ValueError(
                f"concepts.num_concepts={config.num_concepts} must be at most {MAX_PACKED_ID + 1} "
                f"with parallel.tp={self.tp.size}: ids travel in two bytes"
            )
        self.teacher = teacher
        self.sae = sae
        self.sae.split_products = config.precision == "bf16"
        self.config = config

    @classmethod
    def load(
        cls,
        config: ConceptsConfig,
        device: torch.device,
        tp: TensorGroup | None = None,
        *,
        shard_sae: bool = False,
    ) -> TargetExtractor:
        """Read teacher and SAE from the paths in ``config`` and check that they fit together.

        With ``shard_sae`` each rank of ``tp`` keeps its part of the dictionary only.

        Raises:
            ValueError: widths, dictionary size or layer do not fit; the message names the key.
            FileNotFoundError: a path does not exist.
        """
        teacher = load_teacher(config.teacher, config.sae_layer, key="concepts.sae_layer")
        sae = load_sae(config.sae, layer=config.sae_layer)
        check_fits(sae, teacher.config.d_model, config.num_concepts)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        if shard_sae and tp is not None:
            sae.split(tp)
        # The SAE stays fp32: its K-th and (K+1)-th pre-activations are closer than bf16 can tell.
        sae = sae.to(device=device, dtype=torch.float32)
        return cls(teacher.to(device=device, dtype=dtype), sae, config, tp)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, labels: Tensor, documents: Documents | None = None) -> Tensor:
        """Targets of input_ids (B, T) int64 whose next tokens are labels (B, T), document by document.

        Returns:
            (B, C, A) int64 ids for the C = T / ``concepts.every`` tokens that have a concept, best first,
            ``MASKED_TARGET`` where no further active latent has a positive score (unless
            ``concepts.mask_non_positive`` is off). The same on all ranks of ``tp``.
        """
        num_rows = input_ids.shape[0]
        mine, my_documents = share_rows(input_ids, documents, self.tp)
        read = self._read_teacher(mine, self.tp.share_rows(labels), my_documents)
        if self.sae.tp.size > 1:
            read = self.tp.gather_rows(torch.stack(read, dim=1), num_rows).unbind(1)
            return self._select(input_ids, documents, *read)
        targets = self._select(mine, my_documents, *read)
        if self.tp.size == 1:
            return targets
        return unpack_ids(self.tp.gather_rows(pack_ids(targets), num_rows))

    @torch.no_grad()
    def latents(
        self, input_ids: Tensor, labels: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Active latents beside the targets that are chosen among them, on a rank of its own.

        Returns:
            Values (B, C, K) fp32, largest first, ids (B, C, K) int64 and targets (B, C, A) int64.
        """
        assert self.tp.size == 1
        x, *grad = self._read_teacher(input_ids, labels, documents)
        values, ids = self.sae.encode(x.float())
        return values, ids, self._targets(input_ids, documents, values, ids, *grad)

    def _read_teacher(
        self, input_ids: Tensor, labels: Tensor, documents: Documents | None
    ) -> tuple[Tensor, ...]:
        """Residuals (B, C, D_t) and, for attribution, their gradients."""
        layer, every = self.config.sae_layer, self.config.every
        read: tuple[Tensor, ...] = ()
        if self.config.targets == "attribution":
            read = residual_and_gradient(self.teacher, input_ids, labels, layer, documents)[:2]
        else:
            read = (self.teacher.residual_after(input_ids, layer, documents),)
        return tuple(part[:, every - 1 :: every] for part in read)

    def _score(
        self,
        input_ids: Tensor,
        documents: Documents | None,
        values: Tensor,
        ids: Tensor,
        grad: Tensor | None,
    ) -> Tensor:
        """Scores (B, C, K) of active latents; the largest ones are targets."""
        if self.config.targets == "random":
            return random_scores(input_ids, values, ids, documents)
        if grad is None:
            return values
        # Each rank scores the latents that it holds; the others' scores are 0 there.
        index, here = self.sae.columns.find(ids)
        scores = attribution(grad.float(), values.masked_fill(~here, 0.0), index, self.sae.decoder)
        return self.sae.tp.sum(scores)

    def _select(
        self, input_ids: Tensor, documents: Documents | None, x: Tensor, grad: Tensor | None = None
    ) -> Tensor:
        """Targets of residuals x (B, C, D_t) of input_ids (B, T)."""
        return self._targets(input_ids, documents, *self.sae.encode(x.float()), grad)

    def _targets(
        self,
        input_ids: Tensor,
        documents: Documents | None,
        values: Tensor,
        ids: Tensor,
        grad: Tensor | None = None,
    ) -> Tensor:
        return select_targets(
            self._score(input_ids, documents, values, ids, grad),
            ids,
            self.config.num_targets,
            ranking=self.config.attribution,
            mask_non_positive=self.config.mask_non_positive,
        )
