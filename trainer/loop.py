"""The training loop: steps, records, validations, checkpoints, until the end or a request to stop."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from data.config import DataConfig
from data.loader import validation_batches
from data.source import open_tokenizer
from data.tokenizer import Tokenizer
from parallel.collectives import Agreement, sum_over_ranks
from parallel.compile import uncompiled
from trainer.analysis.sampling import Sampling, continue_tokens
from trainer.analysis.task_report import store_tasks
from trainer.analysis.training_tasks import evaluate_in_training
from trainer.build import Parts
from trainer.checkpoint.io import Checkpointer, SavedRun, SaveResult
from trainer.checkpoint.policy import CheckpointPolicy
from trainer.checkpoint.state import RunState, capture_rng, code_version, restore_rng
from trainer.config import RunConfig
from trainer.config_io import dump_config, to_dict
from trainer.damage import DamageCount
from trainer.feed import Feed
from trainer.health import HealthMonitor, Skipped, Spike
from trainer.heartbeat import Heartbeat
from trainer.metrics.logger import MetricsLogger
from trainer.metrics.sums import ConceptUsage, StepMetrics, UsageReport
from trainer.optim import learning_rate
from trainer.step import train_step, validate
from trainer.stop import StopRequest

logger = logging.getLogger(__name__)

Outcome = Literal["finished", "stopped"]


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    validated_step: int = -1
    """Step of the newest validation."""
    saved_step: int = 0
    """Step of the newest save that was started."""


class Loop:
    """One run on one rank, from the newest checkpoint to the last step.

    Args:
        config: the resolved configuration.
        parts: from :func:`trainer.build.build_parts`.
        checkpointer: store of this run.
        metrics_logger: records of this run.
        policy: when to save by the clock, and when to leave.
        heartbeat: signs of life of this rank.
        stop: signals of this process.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        checkpointer: Checkpointer,
        metrics_logger: MetricsLogger,
        policy: CheckpointPolicy,
        heartbeat: Heartbeat,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.parts = parts
        self.checkpointer = checkpointer
        self.log = metrics_logger
        self.policy = policy
        self.heartbeat = heartbeat
        self.stop = stop
        self.progress = Progress()
        self.agreement = Agreement(parts.world)
        device = parts.world.device
        self.metrics = StepMetrics(parts.objective.means, device)
        concepts = config.predicted_concepts
        look_ahead = concepts is not None and concepts.ahead
        self.feed = Feed(parts.loader, device, look_ahead=look_ahead)
        self.usage = None if concepts is None else ConceptUsage(concepts.num_concepts, device)
        self.health = HealthMonitor(config.health)
        self.damage = DamageCount(parts.mesh)
        self.code_version = code_version()
        self.last_validation: dict[str, float] = {}

    def run(self) -> Outcome:
        """Train until ``train.steps`` or until all ranks agreed to stop; saves before it returns."""
        self.log.start()
        while not self.done():
            if self.heed(self.one_step()):
                continue
            self.report_saves(self.checkpointer.poll())
            if self.validation_due():
                self.run_validation()
            if self.samples_due():
                self.write_samples()
            if self.tasks_due():
                self.run_tasks()
            flags = self.agreement.exchange(*self.wishes())
            if flags.stop:
                return self.leave()
            if flags.save or self.policy.due_by_step(self.progress.step):
                self.save(wait=False)
        return self.finish()

    def done(self) -> bool:
        """Whether all steps are made and the last one is found healthy."""
        if self.progress.step < self.config.train.steps:
            return False
        return not self.heed(self.health.finish())

    def one_step(self) -> Skipped | Spike | None:
        """One optimizer step; hands its record over without waiting for the device.

        Returns:
            What was wrong with the step before it, if anything.
        """
        config, parts, step = self.config, self.parts, self.progress.step
        started = time.perf_counter()
        batch = self.feed.next()
        data_wait_s = time.perf_counter() - started
        self.damage.add(batch)
        lr = learning_rate(step, config.train.steps, config.optim)
        self.progress.step = step = step + 1
        self.heartbeat.beat(step, "step")
        logged = self.log.due(step) or self.validation_due()
        grad_norm = train_step(
            parts.engine,
            parts.objective,
            parts.mesh,
            batch,
            upcoming=self.feed.upcoming(),
            microbatch_size=config.train.microbatch_size,
            tokens_per_step=config.tokens_per_step,
            rows_may_be_skipped=config.data.on_damage == "skip",
            step=step - 1,
            lr=lr,
            metrics=self.metrics,
            usage=self.usage,
            detail=logged,
        )
        means: dict[str, Tensor] = {}
        if logged or self.health.watches_losses:
            means = self.metrics.reduce(partial(sum_over_ranks, mesh=parts.mesh))
        if logged:
            shares, histograms = self.concept_usage()
            values = {**means, **shares, "grad_norm": grad_norm}
            host = {"lr": lr, "data_wait_s": data_wait_s, **parts.objective.settings(step - 1)}
            host |= self.source_use()
            self.log.submit(step, step * config.tokens_per_step, values, host, histograms)
        loss = means[parts.objective.means[0].name] if self.health.watches_losses else None
        return self.health.submit(step, grad_norm, loss)

    def concept_usage(self) -> UsageReport:
        """Concepts in use since the last record, over all ranks, still on the device."""
        if self.usage is None:
            return UsageReport({}, {})
        return self.usage.reduce(partial(sum_over_ranks, mesh=self.parts.mesh))

    def source_use(self) -> dict[str, float]:
        """Tokens and epochs of each source of a mixture since the start of training."""
        if not self.config.data.sources:
            return {}
        use = self.parts.loader.use
        tokens = {f"tokens/{source.name}": source.tokens for source in use}
        return tokens | {f"epochs/{source.name}": source.epochs for source in use}

    # What can go wrong

    def heed(self, verdict: Skipped | Spike | None) -> bool:
        """Note a skipped step, go back before a spike; returns whether the run went back."""
        if isinstance(verdict, Skipped):
            logger.warning("step %d was skipped: its gradients are not finite", verdict.step)
            self.log.event("skip", what="non-finite gradients", **asdict(verdict))
        return isinstance(verdict, Spike) and self.rewind(verdict)

    def report_damage(self, damage: DamageCount) -> None:
        """Note how many rows of which chunks did not count so far; a collective."""
        if self.config.data.on_damage == "raise":
            return
        for facts in damage.gather(self.agreement):
            self.log.event("skip", what="damaged data", step=self.progress.step, **facts)

    def rewind(self, spike: Spike) -> bool:
        """Go back to the newest checkpoint and leave out the batches read since; False if there is none.

        The event's rows, given as ``data.skip``, replay the same run from the start.
        """
        self.health.count_rewind(spike)
        self.report_saves(self.checkpointer.close())
        saved = self.checkpointer.find_newest()
        facts = {"what": "loss spike", **asdict(spike)}
        if saved is None:
            logger.error("loss spike at step %d, but there is no checkpoint to go back to", spike.step)
            self.log.event("fault", **facts)
            return False
        cursor = self.parts.loader.state_dict()
        with self.log.paused():
            state = self.restore(saved)
        first_row, last_row = state.data["next_row"], cursor["next_row"]
        self.parts.loader.load_state_dict({**state.data, "next_row": last_row})
        self.log.rewind(state.step)
        self.log.event("skip", **facts, resumed_step=state.step, rows=[first_row, last_row])
        logger.warning("loss spike at step %d: back to step %d without its batches", spike.step, state.step)
        return True

    # When

    def validation_due(self) -> bool:
        """Whether the weights after this step are to be validated."""
        every, step = self.config.validation.every_steps, self.progress.step
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def samples_due(self) -> bool:
        """Whether text is to be sampled after this step; only students of text have any."""
        every, step = self.config.log.samples_every_steps, self.progress.step
        due = step == self.config.train.steps or (every > 0 and step % every == 0)
        return due and self.config.objective.name != "sae" and bool(self.config.log.sample_prompts)

    def tasks_due(self) -> bool:
        """Whether downstream tasks are to be evaluated after this step."""
        every, step = self.config.tasks.every_steps, self.progress.step
        due = step == self.config.train.steps or (every > 0 and step % every == 0)
        return due and bool(self.config.tasks.names)

    def wishes(self) -> tuple[bool, bool]:
        """What this rank wants: (stop, save). Clocks differ, so rank 0 alone decides by time."""
        now = time.time()
        is_main = self.parts.world.is_main
        stop = self.stop.requested or (is_main and self.policy.must_stop(now))
        save = is_main and self.policy.due_by_time(now)
        return stop, save

    # What

    def run_validation(self) -> None:
        """Means over the validation windows, on the record of this step.

        Of several sources each has its own, and the run's are their means by the rows of training.
        """
        data = self.config.data
        with self.log.paused(), self.heartbeat.phase("validation"):
            found = {name: self.validate_source(name, part) for name, part in data.by_source.items()}
        values = _over_sources(found, self.parts.loader.shares)
        if data.sources:
            values |= {f"{key}/{name}": found[name][key] for name in found for key in found[name]}
        self.log.validation(self.progress.step, values)
        self.progress.validated_step = self.progress.step
        self.last_validation = values

    def validate_source(self, name: str, data: DataConfig) -> dict[str, float]:
        """Means over the validation windows of one source."""
        config, parts = self.config, self.parts
        damage = DamageCount(parts.mesh)
        batches = validation_batches(
            data,
            share=config.validation.share,
            rows=config.train.microbatch_size,
            rank=parts.mesh.dp_rank,
            world_size=parts.mesh.dp_size,
            labels=parts.labels.get(name),
        )
        means = validate(
            parts.engine,
            parts.objective,
            parts.mesh,
            damage.watch(batches),
            config.train.microbatch_size,
            parts.world.device,
            step=self.progress.step,
        )
        self.report_damage(damage)
        return means

    def write_samples(self) -> None:
        """Continue the configured prompts and show them."""
        config, parts = self.config, self.parts
        assert config.model is not None
        tokenizer = open_tokenizer(config.data)
        prompts = config.log.sample_prompts
        # A context that grows by one token has a new shape each time: nothing to compile for.
        eagerly = uncompiled(config.parallel.compile)
        with self.log.paused(), self.heartbeat.phase("samples"), eagerly:
            continued = continue_tokens(
                parts.engine.model,
                [_prompt_ids(tokenizer, prompt) for prompt in prompts],
                new_tokens=config.log.sample_tokens,
                max_context=config.model.n_positions,
                device=parts.world.device,
                sampling=Sampling(seed=config.run.seed),
            )
        texts = [tokenizer.decode(ids) for ids in continued]
        self.log.samples(self.progress.step, dict(zip(prompts, texts, strict=True)))

    def run_tasks(self) -> None:
        """Evaluate the configured tasks and store the results."""
        # So has every batch of requests.
        eagerly = uncompiled(self.config.parallel.compile)
        with self.log.paused(), self.heartbeat.phase("tasks"), eagerly:
            results = evaluate_in_training(self.config, self.parts)
            if results is not None and self.parts.world.is_main:
                store_tasks(Path(self.config.run.dir), self.progress.step, results)

    def save(self, *, wait: bool) -> None:
        """Start a checkpoint of the weights after this step; with ``wait`` it is written on return."""
        if self.heed(self.health.finish()):
            return
        step, parts = self.progress.step, self.parts
        if wait:
            self.report_saves(self.checkpointer.close())  # one of this step may be in flight
        if self.progress.saved_step == step:
            return
        with self.log.paused(), self.heartbeat.phase("checkpoint"):
            self.report_damage(self.damage)
            state = RunState(
                step=step,
                tokens=step * self.config.tokens_per_step,
                data=parts.loader.state_dict(),
                more={
                    "metrics": self.log.state_dict(),
                    "health": self.health.state_dict(),
                    "damage": self.damage.state_dict(),
                },
            )
            self.policy.started(time.time())
            self.checkpointer.save(
                step,
                parts.engine.state_dict(),
                state.to_json(),
                config_text=dump_config(self.config),
                rank_extra=capture_rng(),
                info={"code": self.code_version, "tokenizer": parts.manifest.tokenizer.sha256},
                loss=self.last_validation.get("loss_ntp") if self.progress.validated_step == step else None,
                wait=wait,
            )
        self.progress.saved_step = step
        if wait:
            self.report_saves(self.checkpointer.close())

    def report_saves(self, results: list[SaveResult]) -> None:
        """Note how saves ended; one that failed is loud, and the run goes on."""
        for result in results:
            self.policy.finished(result.seconds)
            if result.error is not None:
                self.progress.saved_step = -1
                logger.error("checkpoint of step %d was NOT written: %s", result.step, result.error)
                self.log.event("fault", step=result.step, what="checkpoint", error=str(result.error))
            else:
                self.log.event("save", step=result.step, seconds=result.seconds, stall_s=result.stall_s)

    def resume(self, saved: SavedRun) -> None:
        """Continue from a verified checkpoint, whatever ranks and layout wrote it.

        Raises:
            CheckpointError: its tensors do not fit the model.
            DataError: it was written with other data or another order.
        """
        state = self.restore(saved)
        self.log.load_state_dict(state.more["metrics"])
        self.log.event("resume", step=state.step, world_size=self.parts.world.size)

    def restore(self, saved: SavedRun) -> RunState:
        """Put weights, optimizer, data cursor, generators and detectors back to a checkpoint's."""
        tensors = self.parts.engine.state_dict()
        self.checkpointer.load(saved, tensors)
        self.parts.engine.load_state_dict(tensors)
        state = RunState.from_json(saved.extra)
        self.parts.loader.load_state_dict(state.data)
        if saved.rank_extra is not None:
            restore_rng(saved.rank_extra)
        self.health.load_state_dict(state.more["health"])
        self.damage.load_state_dict(state.more.get("damage", ()))  # older checkpoints have none
        self.progress = Progress(step=state.step, saved_step=state.step)
        return state

    def leave(self) -> Outcome:
        """Save and end before the last step, because a signal or the clock said so."""
        self.save(wait=True)
        reason = self.stop.signal_name or "another rank or the job's end time"
        saved = self.progress.saved_step == self.progress.step
        self.log.event("preempt", step=self.progress.step, reason=reason, saved=saved)
        logger.info("stopped after step %d (%s); the same command goes on", self.progress.step, reason)
        return "stopped"

    def finish(self) -> Outcome:
        """The last checkpoint and the run's summary."""
        self.save(wait=True)
        final = {f"val_{name}": value for name, value in self.last_validation.items()}
        self.log.hparams(to_dict(self.config), final)
        self.log.event("finish", step=self.progress.step, **final)
        logger.info("finished after step %d: %s", self.progress.step, json.dumps(final))
        return "finished"


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one starts a document."""
    return list(tokenizer.encode(prompt)) or [tokenizer.eot_id]


def _over_sources(values: Mapping[str, Mapping[str, float]], shares: Mapping[str, float]) -> dict[str, float]:
    """Means of the sources' values, each source with its share of the rows."""
    keys = next(iter(values.values()))
    return {key: math.fsum(shares[name] * values[name][key] for name in values) for key in keys}
