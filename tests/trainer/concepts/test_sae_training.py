"""Training a TopK autoencoder: losses and gradients against dense formulas, invariants, what it learns."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.apply import apply_parallel, gather_full_state, materialize
from parallel.collectives import min_over_ranks
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh
from parallel.tensor import TensorGroup
from parallel.world import World
from tests.ranks import run_ranks
from trainer.concepts.sae import TopKSae
from trainer.concepts.sae_metrics import reconstruction_metrics, reconstruction_sums
from trainer.concepts.sae_training import SaeLearner, SaeTerms, init_sae_parameter
from trainer.config import SaeConfig

WIDTH = 16
CONFIG = SaeConfig(
    teacher="none", layer=0, num_latents=64, top_k=4, aux_top_k=6, aux_weight=0.5, dead_after_tokens=100
)


def learner_of(
    config: SaeConfig = CONFIG, width: int = WIDTH, *, seed: int = 0, noise: float = 0.0
) -> SaeLearner:
    """A learner with initial weights; ``noise`` untangles encoder, decoder and biases."""
    learner = SaeLearner(width, config)
    first = partial(init_sae_parameter, num_latents=config.num_latents)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in learner.state_dict().items():
            tensor.copy_(first(name, tensor.shape, tensor.dtype, seed=seed))
        for parameter in learner.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return learner


def kill(learner: SaeLearner, *latents: int) -> None:
    learner.tokens_since_active[list(latents)] = learner.dead_after_tokens


def residuals(num_tokens: int = 50, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed)) + 1


def dense_terms(learner: SaeLearner, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses of Gao et al. from dense (N, M) latents, by plain autograd."""
    sae = learner.sae
    x = (residual - residual.mean(-1, keepdim=True)) / (residual.std(-1, keepdim=True) + 1e-5)
    scores = (x - sae.pre_bias) @ sae.encoder.weight.T + sae.latent_bias
    keep = torch.zeros_like(scores).scatter(-1, scores.topk(sae.top_k).indices, 1.0)
    error = x - ((scores.relu() * keep) @ sae.decoder + sae.pre_bias)
    mse = (error.square().sum(-1) / x.square().sum(-1)).sum()
    dead = learner.dead_latents()
    dead_scores = torch.where(dead, scores, -torch.inf)
    keep = torch.zeros_like(scores).scatter(-1, dead_scores.topk(learner.aux_top_k).indices, 1.0) * dead
    left = error.detach() - (scores.relu() * keep) @ sae.decoder
    return mse, (left.square().sum(-1) / x.square().sum(-1)).sum()


@pytest.mark.parametrize("num_dead", [0, 3, 20])
@pytest.mark.parametrize("chunk_rows", [2048, 7])
def test_losses_and_gradients_equal_the_dense_formula(num_dead: int, chunk_rows: int) -> None:
    """Catches a sparse backward that misses a term, and dead latents fewer than K_aux leaking live ones."""
    learner = learner_of(noise=0.1)
    learner.chunk_rows = chunk_rows
    kill(learner, *range(num_dead))
    terms = learner(residuals())
    mse, aux = dense_terms(learner, residuals())
    loss = mse + CONFIG.aux_weight * (aux if num_dead else 0)
    torch.testing.assert_close(terms.normalized_mse, mse.detach())
    torch.testing.assert_close(terms.aux, aux.detach() if num_dead else torch.zeros(()))
    torch.testing.assert_close(terms.loss, loss)
    parameters = list(learner.parameters())
    ours = torch.autograd.grad(terms.loss, parameters)
    for found, expected in zip(ours, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_auxiliary_loss_trains_dead_latents_only() -> None:
    """Catches a gradient through the error, which would make live latents serve the auxiliary loss."""
    learner = learner_of(replace(CONFIG, aux_weight=1.0), noise=0.1)
    kill(learner, 1, 2, 3)
    terms = learner(residuals())
    (gradient,) = torch.autograd.grad(terms.loss - dense_terms(learner, residuals())[0], learner.sae.decoder)
    assert gradient[1:4].norm() > 1
    assert gradient[4:].norm() < 1e-4


def test_no_dead_latent_no_auxiliary_loss() -> None:
    """Catches a constant term that is logged and weighted while nothing is dead."""
    learner = learner_of(noise=0.1)
    assert learner(residuals()).aux == 0
    kill(learner, 0)
    assert learner(residuals()).aux > 0
    off = learner_of(replace(CONFIG, aux_top_k=0))
    kill(off, 0)
    assert off(residuals()).aux == 0


def test_auxiliary_loss_that_overflows_is_dropped() -> None:
    """Catches NaN weights after one overflow in a dead latent: loss and gradients must stay finite."""
    learner = learner_of(noise=0.1)
    with torch.no_grad():
        learner.sae.decoder[0] = 3e38
        # Large, but never among the top K.
        learner.sae.latent_bias[0] = 50.0
        learner.sae.latent_bias[1:] += 100.0
    kill(learner, 0)
    terms = learner(residuals())
    assert terms.loss.isfinite() and terms.aux == 0
    terms.loss.backward()
    assert all(
        parameter.grad.isfinite().all() for parameter in learner.parameters() if parameter.grad is not None
    )


def test_token_without_variation_and_empty_batches_are_finite() -> None:
    """Catches 0/0 for a constant residual, and a crash where a rank has no real validation rows."""
    learner = learner_of(noise=0.1)
    terms = learner(torch.ones(2, WIDTH))
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert all(
        parameter.grad.isfinite().all() for parameter in learner.parameters() if parameter.grad is not None
    )
    assert learner(torch.zeros(0, 5, WIDTH)).loss == 0


def test_bf16_weights_give_fp32_losses_and_bf16_gradients() -> None:
    """Catches a dtype mismatch in the hand-written backward under bf16 compute."""
    learner = learner_of(noise=0.1)
    half = learner_of(noise=0.1).to(torch.bfloat16)
    kill(learner, 0, 1)
    kill(half, 0, 1)
    exact, rounded = learner(residuals()), half(residuals().bfloat16())
    rounded.loss.backward()
    assert rounded.loss.dtype == torch.float32
    torch.testing.assert_close(rounded.loss, exact.loss, atol=0, rtol=0.03)
    assert half.sae.encoder.weight.grad is not None and half.sae.encoder.weight.grad.dtype == torch.bfloat16


def test_counters_age_by_steps_and_ignore_evaluation() -> None:
    """Catches validation tokens that keep a latent alive, and counters that depend on the microbatches."""
    learner = learner_of(noise=0.1)
    used = {int(i) for i in learner.sae.encode(residuals())[1][learner.sae.encode(residuals())[0] > 0]}
    learner.eval()
    learner(residuals())
    learner.train()
    for microbatch in residuals().split(10):
        learner(microbatch)
    learner.sync_buffers(lambda counters: counters, tokens_per_step=70)
    expected = [0 if latent in used else 70 for latent in range(CONFIG.num_latents)]
    assert learner.tokens_since_active.tolist() == expected
    assert not learner.dead_latents().any()
    learner.sync_buffers(lambda counters: counters, tokens_per_step=70)
    assert learner.tokens_since_active.tolist() == [count + 70 for count in expected]
    assert learner.dead_latents().tolist() == [latent not in used for latent in range(CONFIG.num_latents)]
    assert "activations" not in learner.state_dict() and "tokens_since_active" in learner.state_dict()


def test_rows_stay_unit_norm_and_gradients_tangential() -> None:
    """Catches a decoder that grows instead of its latents, and a projection along a whole other axis."""
    learner = learner_of()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.05)
    for step in range(3):
        learner(residuals(seed=step)).loss.backward()
        learner.project_gradients()
        gradient = learner.sae.decoder.grad
        assert gradient is not None and gradient.norm() > 0
        assert (gradient * learner.sae.decoder).sum(-1).abs().max() < 1e-4
        optimizer.step()
        optimizer.zero_grad()
        assert (learner.sae.decoder.norm(dim=-1) - 1).abs().max() > 1e-4
        learner.after_step()
        torch.testing.assert_close(learner.sae.decoder.norm(dim=-1), torch.ones(CONFIG.num_latents))


def test_initial_weights_are_tied_and_reproducible() -> None:
    """Catches an encoder that does not start as the decoder, or values that depend on the order of calls."""
    shape = torch.Size((CONFIG.num_latents, WIDTH))
    first = partial(init_sae_parameter, num_latents=CONFIG.num_latents)
    encoder = first("sae.encoder.weight", shape, torch.float32, seed=5)
    torch.manual_seed(0)
    assert torch.equal(encoder, first("sae.decoder", shape, torch.float32, seed=5))
    assert not torch.equal(encoder, first("sae.decoder", shape, torch.float32, seed=6))
    torch.testing.assert_close(encoder.norm(dim=-1), torch.ones(CONFIG.num_latents))
    mean = torch.arange(3.0)
    assert torch.equal(first("sae.pre_bias", mean.shape, mean.dtype, seed=5, data_mean=mean), mean)
    with pytest.raises(ValueError, match=r"sae\.gate is no tensor"):
        first("sae.gate", shape, torch.float32, seed=5)


class Dictionary:
    """Residuals made of a few of M random directions, standardised like the learner's inputs."""

    def __init__(self, width: int, num_atoms: int, num_active: int) -> None:
        self.generator = torch.Generator().manual_seed(11)
        atoms = torch.randn(num_atoms, width, generator=self.generator)
        self.atoms = F.normalize(atoms - atoms.mean(-1, keepdim=True), dim=-1)
        self.num_active = num_active

    def sample(self, num_tokens: int) -> Tensor:
        chosen = (
            torch.rand(num_tokens, len(self.atoms), generator=self.generator).topk(self.num_active).indices
        )
        weights = 1 + torch.rand(num_tokens, self.num_active, generator=self.generator)
        return torch.einsum("nk,nkd->nd", weights, self.atoms[chosen])


def train(learner: SaeLearner, data: Dictionary, steps: int, *, tokens: int = 512, lr: float = 4e-3) -> None:
    optimizer = torch.optim.AdamW(learner.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        terms: SaeTerms = learner(data.sample(tokens))
        (terms.loss / tokens).backward()
        learner.project_gradients()
        optimizer.step()
        optimizer.zero_grad()
        learner.after_step()
        learner.sync_buffers(lambda counters: counters, tokens)


def test_training_recovers_a_sparse_dictionary() -> None:
    """Catches training that lowers the loss without finding the directions the data are made of."""
    data = Dictionary(width=32, num_atoms=48, num_active=3)
    config = replace(
        CONFIG, num_latents=128, top_k=3, aux_top_k=16, aux_weight=1 / 32, dead_after_tokens=10_000
    )
    learner = learner_of(config, width=32)
    train(learner, data, steps=400)
    metrics = reconstruction_metrics(reconstruction_sums(learner.to_sae(), data.sample(2000)))
    assert metrics["normalized_mse"] < 0.1, metrics
    similarity = (data.atoms @ learner.sae.decoder.T).amax(-1)
    assert (similarity > 0.9).float().mean() > 0.9, similarity


def test_dead_latents_come_alive_through_the_auxiliary_loss() -> None:
    """Catches an auxiliary loss without effect: half of the latents start too low to be ever selected."""
    data = Dictionary(width=32, num_atoms=48, num_active=3)
    dead = {}
    for aux_weight in (0.0, 1 / 32):
        config = replace(
            CONFIG, num_latents=64, top_k=3, aux_top_k=32, aux_weight=aux_weight, dead_after_tokens=2_000
        )
        learner = learner_of(config, width=32)
        with torch.no_grad():
            learner.sae.latent_bias[32:] = -2.0
        train(learner, data, steps=200)
        sums = reconstruction_sums(learner.to_sae(), data.sample(2000))
        dead[aux_weight] = reconstruction_metrics(sums)["dead_fraction"]
    assert dead[0.0] > 0.25 and dead[1 / 32] < 0.1, dead


class _Trained(NamedTuple):
    state: dict[str, Tensor]
    counters: list[int]
    losses: list[float]
    sent: list[int]
    """Bytes that this rank put into the collectives among the tensor-parallel ranks, one by one."""


def _train_on_ranks(world: World, config: SaeConfig, steps: int, tp: int) -> _Trained:
    """Some steps of the learner on this rank's share of the tokens, spread over all ranks."""
    parallel = ParallelConfig(tp=tp)
    mesh = build_mesh(parallel, world)
    learner = SaeLearner(WIDTH, config, device="meta")
    apply_parallel(learner, learner.plan, mesh, parallel, "fp32")
    first = partial(init_sae_parameter, seed=0, num_latents=config.num_latents)
    materialize(learner, world.device, first)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.02)
    losses = []
    sent = _count_sent(learner.sae.tp)
    for step in range(steps):
        terms = learner(residuals(48, seed=step).chunk(mesh.dp_size)[mesh.dp_rank])
        (terms.loss / 48).backward()
        learner.project_gradients()
        optimizer.step()
        optimizer.zero_grad()
        learner.after_step()
        learner.sync_buffers(lambda counters: min_over_ranks(counters, mesh), 48)
        losses.append(float(terms.loss))
    return _Trained(gather_full_state(learner), learner.tokens_since_active.tolist(), losses, sent)


def _count_sent(tp: TensorGroup) -> list[int]:
    sent: list[int] = []
    all_gather, all_sum = tp.all_gather, tp.sum

    def counted(x: Tensor) -> Tensor:
        sent.append(x.numel() * x.element_size())
        return x

    tp.all_gather = lambda x: all_gather(counted(x))  # type: ignore[method-assign]
    tp.sum = lambda x: all_sum(counted(x))  # type: ignore[method-assign]
    return sent


FEW_LATENTS = replace(CONFIG, num_latents=5, top_k=1, aux_top_k=2, dead_after_tokens=60)


@pytest.fixture(scope="module")
def one_rank() -> _Trained:
    (trained,) = run_ranks(_train_on_ranks, 1, FEW_LATENTS, 4, 1)
    return trained


@pytest.mark.dist
@pytest.mark.parametrize(("num_ranks", "tp"), [(4, 1), (2, 2), (4, 2)])
def test_sharded_training_equals_one_rank(num_ranks: int, tp: int, one_rank: _Trained) -> None:
    """Catches rows normalised in pieces, ranks of padding alone, and dead latents that differ by rank."""
    # 5 latents in 64 rows: most ranks hold padding only.
    sharded = run_ranks(_train_on_ranks, num_ranks, FEW_LATENTS, 4, tp)
    assert all(rank.counters == one_rank.counters for rank in sharded)
    for step, loss in enumerate(one_rank.losses):
        assert sum(rank.losses[step] for rank in sharded) / tp == pytest.approx(loss, rel=1e-4)
    for name, tensor in one_rank.state.items():
        torch.testing.assert_close(sharded[0].state[name], tensor, atol=1e-4, rtol=1e-4)
    sae = SaeLearner(WIDTH, FEW_LATENTS).to_sae(sharded[0].state)
    assert isinstance(sae, TopKSae)
    torch.testing.assert_close(sae.decoder.norm(dim=-1), torch.ones(5))


@pytest.mark.dist
def test_what_a_split_dictionary_exchanges() -> None:
    """Catches an exchange in backward, and candidates that travel one selection at a time."""
    config = replace(CONFIG, dead_after_tokens=48)  # after the first of two steps
    active, auxiliary, reconstruction = (48 * count * 4 for count in (config.top_k, config.aux_top_k, WIDTH))
    for rank in run_ranks(_train_on_ranks, 2, config, 2, 2):
        assert rank.sent[:2] == [2 * active, reconstruction]
        assert rank.sent[2:] == [2 * (active + auxiliary), reconstruction, reconstruction]
