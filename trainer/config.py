"""The configuration of one run: a frozen dataclass per section (torch-free).

Every check that needs one section alone stands in its ``__post_init__``; checks across
sections stand in :meth:`RunConfig.__post_init__`. A check raises ``ValueError`` whose text
starts with the field's name; ``trainer.config_io`` puts file and section before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data.config import DataConfig
from parallel.config import ParallelConfig


def _at_least(section: object, bound: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value < bound:
            raise ValueError(f"{name}={value} must be at least {bound}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """The ``run:`` section: where a run lives and what it is seeded with."""

    dir: str
    """Run directory; created when missing, resumed when it holds the same configuration."""

    seed: int = 1
    """Seed of the weights. The data order has its own, ``data.seed``."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes CUDA where it is present."""

    deterministic: bool = False
    """The same bits from every run on the same GPUs, also from a resumed one, at the price of a slower
    backward of attention. On a CPU they are the same anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The ``model:`` section: the GPT-2 trunk of the student."""

    d_model: int
    """Width D."""
    n_layer: int
    """Number of blocks L."""
    n_head: int
    """Attention heads H; must divide ``d_model``."""
    vocab_size: int
    """Vocabulary V; at least the tokenizer's."""
    n_positions: int
    """Learned positions; at least ``data.seq_len``."""
    layer_norm_eps: float = 1e-5
    """Epsilon of the LayerNorms."""
    tied_head: bool = True
    """LM head shares the token embedding's weight."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "d_model", "n_layer", "n_head", "vocab_size", "n_positions")
        if self.d_model % self.n_head:
            raise ValueError(f"d_model={self.d_model} must be a multiple of n_head={self.n_head}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptsConfig:
    """The ``concepts:`` section: the teacher's targets and the student's concept path."""

    teacher: str
    """GPT-2 in Hugging Face layout: a folder, a weights file beside its config.json, or ``RUN/model``."""
    sae: str
    """Sparse autoencoder: published .pt file, SAELens folder or sparsify folder."""
    sae_layer: int
    """Teacher block l after which the residual is read (0-based)."""
    insert_layer: int
    """Student block i before which concepts are mixed in (0-based)."""
    mix: Literal["interleave", "add", "none"] = "interleave"
    """How they are mixed in: each as a position of its own after its token, added to its token's position,
    or not at all, so that they are predicted only."""
    every: int = 1
    """A concept after every so many tokens; must divide ``data.seq_len``, above 1 ``interleave`` only."""
    num_concepts: int
    """Dictionary size M; must equal the SAE's."""
    top_k: int
    """Concept logits K that the student keeps per token."""
    num_targets: int = 4
    """Targets A per token."""
    targets: Literal["attribution", "activation", "random"] = "attribution"
    """Which active latents are targets: those of largest attribution, of largest activation, or any A
    of them, drawn from the window's tokens alone."""
    attribution: Literal["signed", "abs", "negative"] = "signed"
    """Rank latents by g.W_dec*z as it is (the authors' choice), by its absolute value, or by its negative."""
    mask_non_positive: bool = True
    """Leave targets whose score is not positive out of the loss; ``false`` keeps them, as the authors do."""
    source: Literal["teacher", "cache"] = "teacher"
    """``teacher`` computes targets on the fly; ``cache`` reads what ``trainer.concepts.label`` has stored."""
    labels: str | None = None
    """Folder of stored targets, with one for each of ``data.sources`` in it; ``null`` means ``labels`` in
    each shard folder."""
    ahead: bool = False
    """Compute a microbatch's targets while the student trains on the one before it, on a CUDA stream of
    their own (on a CPU one after the other); costs the memory of both at once. Needs a teacher that no
    ranks share: ``parallel.tp=1`` and ``parallel.shard_teacher=false``."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the frozen teacher; the SAE's latents are selected from its residual. The SAE stays fp32;
    with ``bf16`` a GPU takes its encoder's product as a sum of bf16 ones, with errors of 2**-16."""
    teacher_width: int = 768
    """Width D_t of the teacher; read by ``objective.regression`` alone, and must be right there."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_concepts", "top_k", "num_targets", "every")
        _at_least(self, 2, "teacher_width")
        _at_least(self, 0, "sae_layer", "insert_layer")
        if self.every > 1 and self.mix != "interleave":
            raise ValueError(f"every={self.every} must be 1 with mix={self.mix}: only interleave leaves out")
        if self.targets != "attribution" and self.attribution != "signed":
            raise ValueError(
                f"attribution={self.attribution} has no meaning with targets={self.targets}, leave it signed"
            )
        if self.top_k > self.num_concepts:
            raise ValueError(f"top_k={self.top_k} must be at most num_concepts={self.num_concepts}")
        if self.num_targets > self.num_concepts:
            raise ValueError(
                f"num_targets={self.num_targets} must be at most num_concepts={self.num_concepts}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegressionInsertion:
    """What ``objective.regression`` makes of the ``concepts:`` section; no section of its own."""

    insert_layer: int
    """As ``concepts.insert_layer``."""
    width: int
    """Width D_t of the state that is predicted."""
    distance: Literal["l1", "l2", "cosine"] = "l2"
    """As ``objective.regression``."""
    sae_layer: int = 0
    """As ``concepts.sae_layer``."""
    mix: Literal["interleave", "add", "none"] = "interleave"
    """As ``concepts.mix``."""
    every: int = 1
    """As ``concepts.every``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseConfig:
    """The ``pause:`` section, of ``objective.name=pause``: one learned vector where concepts would stand."""

    insert_layer: int
    """Block before which it is interleaved (0-based)."""
    every: int = 1
    """Once after every so many tokens; must divide ``data.seq_len``."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "insert_layer")
        _at_least(self, 1, "every")


Insertion = ConceptsConfig | RegressionInsertion | PauseConfig
"""What a student's residual stream takes up before one of its blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KdConfig:
    """The ``kd:`` section, of ``objective.name=kd``: a teacher's token distribution (Hinton et al. 2015)."""

    teacher: str
    """As ``concepts.teacher``; its vocabulary must be the student's."""
    weight: float = 0.1
    """Weight of KL(teacher || student) beside the next-token loss."""
    temperature: float = 1.0
    """Divides both models' logits in the divergence, which is multiplied by its square."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the frozen teacher."""

    def __post_init__(self) -> None:
        for name in ("weight", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeConfig:
    """The ``sae:`` section: a TopK sparse autoencoder trained on a teacher's residuals (Gao et al. 2024)."""

    teacher: str
    """As ``concepts.teacher``."""
    layer: int
    """Teacher block l after which the residual is read (0-based)."""
    num_latents: int
    """Dictionary size M."""
    top_k: int
    """Active latents K per token."""
    aux_top_k: int = 64
    """Dead latents that reconstruct the residual error in the auxiliary loss."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss."""
    dead_after_tokens: int = 10_000_000
    """A latent that was silent for so many tokens counts as dead."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "layer", "aux_top_k", "aux_weight")
        _at_least(self, 1, "num_latents", "top_k", "dead_after_tokens")
        if self.top_k > self.num_latents:
            raise ValueError(f"top_k={self.top_k} must be at most num_latents={self.num_latents}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The ``objective:`` section: what is minimised."""

    name: Literal["ntp", "cocomix", "kd", "pause", "sae"]
    """``ntp``: next-token prediction; ``cocomix``: concepts predicted and mixed in; ``kd``: next tokens and
    a teacher's distribution; ``pause``: next tokens, with pauses to think; ``sae``: an autoencoder."""
    concept_weight: float = 0.1
    """Lambda of the concept loss; 0 mixes in without predicting, and needs no teacher."""
    concept_weight_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How lambda falls: not at all, or to 0 at the last step."""
    regression: Literal["none", "l1", "l2", "cosine"] = "none"
    """Predict the teacher's standardised residual instead of concepts, with this distance as concept loss."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "concept_weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The ``optim:`` section: AdamW and its learning rate."""

    lr: float
    """Peak learning rate."""
    min_lr: float
    """Learning rate at the last step."""
    warmup_steps: int
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """``cosine`` falls to ``min_lr`` over the run; ``wsd`` stays at ``lr``, then falls linearly."""
    decay_share: float = 0.2
    """Share of the steps that ``wsd`` spends falling."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment coefficients."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay_all: bool = False
    """Decay every parameter as the authors do; by default matrices only."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "lr", "min_lr", "warmup_steps", "weight_decay", "clip_norm")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share={self.decay_share} must be above 0 and at most 1")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} must be at most lr={self.lr}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The ``train:`` section: how long, how wide and how precise."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Sequences per optimizer step over all ranks."""
    microbatch_size: int
    """Sequences per forward and backward on one rank; the rest is gradient accumulation."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute precision; master weights, gradients' reduction and optimizer stay fp32."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_size", "microbatch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """The ``health:`` section: what a run does about gradients and losses that go wrong."""

    max_skipped_steps: int = 16
    """Steps in a row with non-finite gradients after which the run ends; each one is skipped by itself."""
    spike_sigmas: float = 0.0
    """A loss so many standard deviations above the window's mean is a spike: the run goes back to the
    checkpoint before it and leaves the batches since then out. 0 is off."""
    spike_window: int = 128
    """Steps over which mean and standard deviation are taken; no spike is seen before it is half full."""
    max_rewinds: int = 8
    """Rewinds after which the run ends."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_skipped_steps")
        _at_least(self, 0, "spike_sigmas", "max_rewinds")
        _at_least(self, 4, "spike_window")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig:
    """The ``validation:`` section."""

    every_steps: int
    """Steps between validations; 0 validates after the last step only."""
    share: float = 1.0
    """Share of the validation windows that is read, from the first one on."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "every_steps")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """The ``checkpoint:`` section."""

    every_steps: int
    """Steps between checkpoints; 0 saves at the end and on a signal only."""
    every_minutes: float = 0.0
    """Minutes between checkpoints; 0 is off."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this step are kept for ever; 0 keeps none."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "every_steps", "every_minutes", "keep_every_steps")
        _at_least(self, 1, "keep_last")


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksConfig:
    """The ``tasks:`` section: downstream tasks of the lm-evaluation-harness during training."""

    names: tuple[str, ...] = ()
    """Tasks, groups and tags; none are evaluated when empty."""
    every_steps: int = 0
    """Steps between evaluations; 0 evaluates after the last step only."""
    include_path: str = ""
    """Folder with further tasks (YAML, which may run code of its own)."""
    limit: int = 0
    """Examples per task; 0 takes all."""
    batch_tokens: int = 4096
    """Positions per forward on one rank."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "every_steps", "limit")
        _at_least(self, 1, "batch_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """The ``log:`` section."""

    every: int = 10
    """Steps between lines of metrics.jsonl, TensorBoard points and log lines."""
    tensorboard: bool = True
    """Write ``tb/`` in the run directory."""
    samples_every_steps: int = 0
    """Steps between text samples; 0 samples at the end only."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts that are continued for the text samples."""
    sample_tokens: int = 48
    """New tokens per text sample."""
    peak_tflops: float = 0.0
    """Peak of one rank's device for MFU; 0 looks the GPU up and measures a matmul on CPU."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "sample_tokens")
        _at_least(self, 0, "samples_every_steps", "peak_tflops")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that a run is made from; written to ``config.yaml`` in its directory."""

    run: RunSection
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    model: ModelConfig | None = None
    concepts: ConceptsConfig | None = None
    pause: PauseConfig | None = None
    kd: KdConfig | None = None
    sae: SaeConfig | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        self._check_sections()
        self._check_objective()
        self._check_shared_models()
        if self.model is not None and self.data.seq_len > self.model.n_positions:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} must be at most model.n_positions={self.model.n_positions}"
            )
        if self.data.mask_documents and "" in self.log.sample_prompts:
            raise ValueError(
                "log.sample_prompts must hold no empty prompt with data.mask_documents=true: it would begin "
                "behind an end-of-text token, where such a model is taught nothing"
            )
        if self.insertion is not None:
            self._check_insertion("pause" if self.objective.name == "pause" else "concepts", self.insertion)

    def _check_sections(self) -> None:
        needed = {
            "ntp": ("model",),
            "cocomix": ("model", "concepts"),
            "kd": ("model", "kd"),
            "pause": ("model", "pause"),
            "sae": ("sae",),
        }
        for section in needed[self.objective.name]:
            if getattr(self, section) is None:
                raise ValueError(
                    f"{section}: section is missing, objective.name={self.objective.name} needs it"
                )

    def _check_objective(self) -> None:
        objective, concepts = self.objective, self.concepts
        if objective.name == "sae" and self.parallel.engine != "fsdp":
            raise ValueError(
                f"parallel.engine={self.parallel.engine} does not fit objective.name=sae, which changes "
                "gradients and weights around each update: use parallel.engine=fsdp"
            )
        if objective.name == "sae" and self.tasks.names:
            raise ValueError("tasks.names must be empty with objective.name=sae: it trains no language model")
        if objective.name == "sae":
            for key, neutral in (("recompute", "none"), ("reshard_after_forward", "auto"), ("prefetch", 0)):
                found = getattr(self.parallel, key)
                if found != neutral:
                    raise ValueError(
                        f"parallel.{key}={found} must be {neutral} with objective.name=sae: "
                        "an autoencoder has no blocks"
                    )
        if concepts is not None and objective.name == "cocomix":
            self._check_ahead(concepts, objective)
        ablation = f"objective.regression={objective.regression}"
        if objective.name != "cocomix":
            schedule = f"objective.concept_weight_schedule={objective.concept_weight_schedule}"
            for setting in (ablation, schedule):
                if not setting.endswith(("=none", "=constant")):
                    raise ValueError(f"{setting} needs objective.name=cocomix, not {objective.name}")
            return
        assert concepts is not None
        without_loss = "needs objective.concept_weight above 0: without a loss nothing would"
        if concepts.mix == "none" and objective.concept_weight == 0:
            raise ValueError(f"concepts.mix=none {without_loss} train the concept head")
        if objective.regression == "none":
            return
        if objective.concept_weight == 0:
            raise ValueError(f"{ablation} {without_loss} be regressed")
        for key, value, default in (
            ("targets", concepts.targets, "attribution"),
            ("source", concepts.source, "teacher"),
        ):
            if value != default:
                raise ValueError(
                    f"{ablation} does not fit concepts.{key}={value}: its target is the teacher's residual "
                    f"and no concept, leave it at {default}"
                )

    def _check_ahead(self, concepts: ConceptsConfig, objective: ObjectiveConfig) -> None:
        """Collectives on two streams have no common order over the ranks, which would wait for ever."""
        if not concepts.ahead:
            return
        if objective.regression != "none" or objective.concept_weight == 0:
            raise ValueError(
                "concepts.ahead=true needs targets that are concepts: objective.regression=none, "
                f"not {objective.regression}, and objective.concept_weight above 0, "
                f"not {objective.concept_weight}"
            )
        if concepts.source == "cache":
            raise ValueError(
                "concepts.ahead=true needs concepts.source=teacher: stored targets are only read"
            )
        if self.parallel.tp > 1:
            raise ValueError(
                f"concepts.ahead=true needs parallel.tp=1, not {self.parallel.tp}: ranks that share rows "
                "exchange targets, which a second stream must not"
            )
        if self.parallel.shard_teacher:
            raise ValueError(
                "concepts.ahead=true needs parallel.shard_teacher=false: gathering the teacher's weights "
                "is an exchange between ranks, which a second stream must not make"
            )

    def _check_shared_models(self) -> None:
        name = self.objective.name
        for key in ("shard_teacher", "shard_sae"):
            if self.reads_labels and getattr(self.parallel, key):
                raise ValueError(
                    f"parallel.{key}=true does not fit concepts.source=cache: neither teacher nor "
                    "autoencoder is loaded"
                )
        if self.parallel.shard_teacher and not self.frozen_models:
            raise ValueError(
                f"parallel.shard_teacher=true does not fit objective.name={name}: there is no teacher"
            )
        if self.parallel.shard_teacher and name == "kd":
            raise ValueError(
                "parallel.shard_teacher=true does not fit objective.name=kd: the loss reads the teacher's "
                "whole head"
            )
        if self.parallel.shard_sae and "concepts.sae" not in self.frozen_models:
            reason = "parallel.tp splits its dictionary anyway" if name == "sae" else "there is none"
            raise ValueError(f"parallel.shard_sae=true does not fit objective.name={name}: {reason}")

    def _check_insertion(self, section: str, insertion: Insertion) -> None:
        assert self.model is not None
        if insertion.insert_layer >= self.model.n_layer:
            raise ValueError(
                f"{section}.insert_layer={insertion.insert_layer} must be below "
                f"model.n_layer={self.model.n_layer}"
            )
        shared = insertion.every * self.parallel.tp
        if insertion.every > 1 and self.data.seq_len % shared:
            ranks = f" x parallel.tp={self.parallel.tp}" if self.parallel.tp > 1 else ""
            raise ValueError(
                f"{section}.every={insertion.every}{ranks} must divide data.seq_len={self.data.seq_len}"
            )

    @property
    def insertion(self) -> Insertion | None:
        """What the student's residual stream takes up; ``None`` where it is a plain GPT-2."""
        if self.objective.name == "pause":
            return self.pause
        if self.objective.name != "cocomix" or self.concepts is None:
            return None
        concepts = self.concepts
        if self.objective.regression == "none":
            return concepts
        return RegressionInsertion(
            insert_layer=concepts.insert_layer,
            width=concepts.teacher_width,
            distance=self.objective.regression,
            sae_layer=concepts.sae_layer,
            mix=concepts.mix,
            every=concepts.every,
        )

    @property
    def predicted_concepts(self) -> ConceptsConfig | None:
        """The ``concepts:`` section where the student predicts concepts."""
        return self.insertion if isinstance(self.insertion, ConceptsConfig) else None

    @property
    def reads_labels(self) -> bool:
        """Whether concept targets are read with the tokens and not computed."""
        concepts = self.predicted_concepts
        return concepts is not None and concepts.source == "cache" and self.objective.concept_weight > 0

    @property
    def frozen_models(self) -> dict[str, str]:
        """Paths of the models that the objective reads and does not train, by their keys."""
        objective, concepts = self.objective, self.concepts
        if objective.name == "kd" and self.kd is not None:
            return {"kd.teacher": self.kd.teacher}
        if objective.name == "sae" and self.sae is not None:
            return {"sae.teacher": self.sae.teacher}
        if objective.name != "cocomix" or concepts is None or objective.concept_weight == 0:
            return {}
        if objective.regression != "none":
            return {"concepts.teacher": concepts.teacher}
        if concepts.source == "cache":
            return {}
        return {"concepts.teacher": concepts.teacher, "concepts.sae": concepts.sae}

    @property
    def differentiates_teacher(self) -> bool:
        """Whether gradients of a teacher's loss are taken."""
        concepts = self.predicted_concepts
        return concepts is not None and concepts.targets == "attribution"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.train.batch_size * self.data.seq_len
