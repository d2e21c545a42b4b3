"""A prior with an estimate for a density, in a likelihood and in objectives: allowed where it is a bound."""

import math
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.alignment import align
from pvae.evaluation import log_likelihood
from pvae.guides import NormalGuide
from pvae.inference import ELBO
from pvae.likelihoods import Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import DiffusionPrior

pytestmark = pytest.mark.usefixtures("float64")

SIZE, STEPS, NOISE = 3, 6, 0.5


class Zero(nn.Module):
    """The optimal v of standard normal data."""

    def forward(self, y: Tensor, gamma: Tensor) -> Tensor:
        return torch.zeros_like(y)


class Model(nn.Module):
    """u under a diffusion, x = u + noise."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = DiffusionPrior(Zero(), (SIZE,), gamma_min=-4.0, gamma_max=5.0, num_steps=STEPS)
        self.noise = nn.Parameter(torch.tensor(NOISE))
        self.passes = 0

    def forward(self, x: Tensor) -> None:
        self.passes += 1
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", self.prior())
            pyro.sample("x", dist.Normal(u, self.noise).to_event(1), obs=x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Of the model that is sampled: u is normal, its variance by the chain's recursion."""
        gamma = torch.linspace(-4, 5, STEPS + 1).tolist()
        variance = 1.0
        for s, t in zip(gamma[-2::-1], gamma[:0:-1], strict=True):
            alpha_s, alpha_t = (1 / (1 + math.exp(g)) for g in (s, t))
            between = (1 - alpha_t) - alpha_t / alpha_s * (1 - alpha_s)
            slope = math.sqrt(alpha_t / alpha_s) * (1 - alpha_s) / (1 - alpha_t)
            slope += math.sqrt(alpha_s) * between / (1 - alpha_t) * math.sqrt(alpha_t)
            variance = slope**2 * variance + between * (1 - alpha_s) / (1 - alpha_t)
        variance = variance * (1 + math.exp(-4)) + math.exp(-4)
        return dist.Normal(torch.zeros(SIZE), math.sqrt(variance + NOISE**2)).to_event(1).log_prob(x)


class Guide(nn.Module):
    """The posterior for standard normal u."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1 / (1 + NOISE**2)))

    def forward(self, x: Tensor) -> None:
        scale = NOISE / math.sqrt(1 + NOISE**2)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("u", dist.Normal(self.gain * x, scale).to_event(1))


def data(n: int = 40) -> Tensor:
    return 1.1 * torch.randn(n, SIZE, generator=torch.Generator().manual_seed(5))


def test_likelihood_of_the_sampled_model() -> None:
    model, guide, x = Model(), Guide(), data()
    exact = model.log_prob(x)
    previous = -math.inf
    for num_particles in (1, 10, 1000):
        estimate = log_likelihood(model, guide, x, num_particles=num_particles)
        gap = estimate.log_prob - exact
        error = gap.std() / math.sqrt(len(x))
        assert gap.mean() < 4 * error
        assert gap.mean() > previous
        previous = gap.mean().item()
    assert previous == pytest.approx(0, abs=0.05)
    assert model.training


def test_calibration_gives_another_model_and_a_tighter_elbo() -> None:
    model, guide, x = Model(), Guide(), data()
    plain = log_likelihood(model, guide, x, num_particles=200)
    model.prior.calibrate(torch.randn(2000, SIZE) for _ in range(5))
    calibrated = log_likelihood(model, guide, x, num_particles=200)
    assert calibrated.elbo > plain.elbo + 0.5
    exact = dist.Normal(torch.zeros(SIZE), math.sqrt(1 + NOISE**2)).to_event(1).log_prob(x)
    assert abs((calibrated.log_prob - exact).mean()) < 0.1


def test_figures_depend_neither_on_the_batch_nor_on_the_other_data() -> None:
    model, guide, x = Model(), Guide(), data()
    whole = log_likelihood(model, guide, x, num_particles=50, seed=3)
    for other in (
        log_likelihood(model, guide, x, num_particles=50, seed=3, batch_size=64),
        log_likelihood(model, guide, x, num_particles=50, seed=3, batch_size=1),
        log_likelihood(model, guide, x[:10], num_particles=50, seed=3),
    ):
        n = len(other.log_prob)
        torch.testing.assert_close(other.log_prob, whole.log_prob[:n])
    assert log_likelihood(model, guide, x, num_particles=50, seed=4).elbo != whole.elbo


def test_a_bound_is_refused_inside_the_logarithm() -> None:
    model, guide, x = Model(), Guide(), data()
    with model.prior.using("vlb", num_times=4):
        with pytest.raises(ValueError, match=r"site 'u' has only a stochastic lower bound .* 2 particles"):
            log_likelihood(model, guide, x, num_particles=2)
        # One particle is an ELBO, in which it is linear.
        elbo = log_likelihood(model, guide, data(400), num_particles=1)
    # In continuous time the denoiser leaves y_0 standard normal.
    scale = math.sqrt(1 + 2 * math.exp(-4) + NOISE**2)
    gap = elbo.log_prob - dist.Normal(torch.zeros(SIZE), scale).to_event(1).log_prob(data(400))
    assert gap.mean() < 4 * gap.std() / math.sqrt(400)


def test_an_estimate_is_refused_in_a_guide() -> None:
    model = Model()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.poutine.mask(mask=torch.tensor(True)):
            pyro.sample("u", model.prior())

    with pytest.raises(ValueError, match="guide site 'u' has only an estimate of its density"):
        log_likelihood(model, guide, data(), num_particles=2)


@pytest.mark.parametrize("kind", ["iwae", "dreg"])
def test_importance_weighted_objectives(kind: Any) -> None:
    model, guide, x = Model(), Guide(), data()
    with pytest.raises(ValueError, match=rf"objective '{kind}' needs a density of model site 'u'"):
        ELBO(kind, 2).terms(model, guide, x)
    assert ELBO(kind, 1).terms(model, guide, x).loss.isfinite()
    with model.prior.using("chain"):
        losses = [ELBO(kind, k).terms(model, guide, x).loss for k in (1, 300)]
    assert losses[1] < losses[0]
    assert abs(losses[1] + model.log_prob(x).mean()) < 0.1
    losses[1].backward()
    assert guide.gain.grad is not None
    assert guide.gain.grad.isfinite()


@pytest.mark.parametrize("kind", ["elbo", "mean_field"])
def test_objectives_that_are_linear_in_the_density(kind: Any) -> None:
    model, guide, x = Model(), Guide(), data()
    terms = ELBO(kind, 400).terms(model, guide, x)
    # The bound of standard normal u under its optimal denoiser, at the guide's moments.
    second = (guide.gain * x).square() + NOISE**2 / (1 + NOISE**2)
    gamma = torch.linspace(-4, 5, 20_001).unsqueeze(-1).unsqueeze(-1)
    signal, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
    error = (signal.square() + noise * signal * second).mean(0)
    alpha, sigma = torch.sigmoid(torch.tensor(-5.0)), torch.sigmoid(torch.tensor(5.0))
    last = alpha * second + sigma - sigma.log() - 1
    log_p = -0.5 * (math.log(2 * math.pi) - 4 + 1 + 9 * error + last).sum(-1)
    scale = torch.tensor(NOISE / math.sqrt(1 + NOISE**2))
    log_q = -SIZE * (scale.log() + 0.5 * (math.log(2 * math.pi) + 1))
    assert terms.parts["kl/u"].item() == pytest.approx((log_q - log_p).mean().item(), abs=0.05)
    assert terms.bound.mean() < model.log_prob(x).mean() + 0.05
    terms.loss.backward()


def test_alignment_is_refused() -> None:
    model = VAE(DiffusionPrior(Zero(), (2,)), MLPDecoder(2, (4,)), Normal())

    density = SimpleNamespace(log_density=torch.zeros(9), standard_error=torch.ones(9), embedding=None)
    with pytest.raises(ValueError, match="must have a density to be aligned, got one that is only bounded"):
        align(model, NormalGuide(MLPEncoder((4,), 2)), density)
