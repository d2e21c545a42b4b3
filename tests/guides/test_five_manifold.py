"""FIVE on a curved manifold whose posteriors are known: the covariance off the diagonal, in sign and size."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.data import Data, load
from pvae.guides import FiveGuide, laplace_proposal
from pvae.likelihoods import Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal

NOISE = 0.1


class KnownSaddle(nn.Module):
    """The decoder that the data come from."""

    z_dim = 2

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat((z, z.prod(-1, keepdim=True)), -1)


class Trained(NamedTuple):
    data: Data
    model: Any
    guide: Any


def trained(decoder: nn.Module, steps: int, lr: float) -> Trained:
    """A small FIVE, with the noise of the data."""
    data = load("saddle", noise=NOISE, num_train=4000, num_test=200, valid=0)
    likelihood = Normal("fixed", NOISE)
    model = VAE(StandardNormal(2), decoder, likelihood)
    guide = FiveGuide(MLPEncoder((3,), 2, (64, 64), "silu"), decoder, likelihood)
    pvae.fit(model, guide, data, steps=steps, lr=lr, schedule="cosine", grad_clip=100.0)
    return Trained(data, model, guide)


@pytest.fixture(scope="module")
def known() -> Trained:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trained(KnownSaddle(), steps=1500, lr=5e-3)


def correlation(covariance: Tensor) -> Tensor:
    return covariance[:, 0, 1] / covariance.diagonal(dim1=1, dim2=2).prod(1).sqrt()


def error(ours: Tensor, true: Tensor) -> Tensor:
    """Largest difference of the entries, in units of the largest true one."""
    return (ours - true).abs().amax((1, 2)) / true.abs().amax((1, 2))


def by_weights(run: Trained, x: Tensor, num: int = 5000) -> Tensor:
    """Covariances of p(z | x), ``(n, 2, 2)``, by self-normalised importance sampling."""
    normal = laplace_proposal(run.model, run.guide).posterior(x)
    wide = torch.distributions.MultivariateNormal(normal.mean, 2 * normal.covariance_matrix)
    z = wide.sample((num,))
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_w = log_prior + run.model.decode(z).log_prob(x) - wide.log_prob(z)
    weights = log_w.softmax(0)
    away = z - torch.einsum("kn,kni->ni", weights, z)
    return torch.einsum("kn,kni,knj->nij", weights, away, away)


def test_the_covariance_has_the_sign_and_size_of_the_true_one(known: Trained) -> None:
    x = known.data.test.x
    mean, true = known.data.truth.posterior(x)
    torch.manual_seed(1)
    with torch.no_grad():
        ours = known.guide.posterior(x).exact().covariance_matrix
        assert error(by_weights(known, x), true).median() < 0.06
    clear = correlation(true).abs() > 0.15
    assert clear.sum() > 100
    # The sign, which is that of -z1 z2, wherever there is one to speak of.
    assert torch.equal(correlation(true)[clear].sign(), -mean[clear].prod(1).sign())
    assert torch.equal(correlation(ours)[clear].sign(), correlation(true)[clear].sign())
    # The size.
    assert error(ours, true).median() < 0.12
    slope = (ours[:, 0, 1] * true[:, 0, 1]).sum() / true[:, 0, 1].square().sum()
    assert slope == pytest.approx(1.0, abs=0.15)


def test_the_bound_is_nearer_than_that_of_any_diagonal_posterior(known: Trained) -> None:
    data = known.data
    _, true = data.truth.posterior(data.test.x)
    # Of all diagonal normals the nearest to a normal has the diagonal of its precision.
    precision = true.double().inverse()
    least = 0.5 * (precision.diagonal(dim1=1, dim2=2).log().sum(1) - precision.logdet())
    x = data.test.x[correlation(true).abs() > 0.3]
    least = least[correlation(true).abs() > 0.3]
    torch.manual_seed(2)
    with torch.no_grad():
        q = known.guide.posterior(x).exact()
        z = q.sample((400,))
        log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        elbo = (log_prior + known.model.decode(z).log_prob(x) - q.log_prob(z)).mean(0)
    assert data.log_density is not None
    gap = data.log_density(x) - elbo
    assert gap.median() < 0.5 * least.median()


def test_a_learned_decoder_gets_the_posterior_of_its_own_model() -> None:
    torch.manual_seed(0)
    run = trained(MLPDecoder(2, (3,), (64, 64), "silu"), steps=1000, lr=3e-3)
    x = run.data.test.x
    with torch.no_grad():
        true, ours = by_weights(run, x), run.guide.posterior(x).exact().covariance_matrix
    clear = correlation(true).abs() > 0.15
    assert clear.sum() > 40
    assert (correlation(ours)[clear].sign() == correlation(true)[clear].sign()).float().mean() > 0.95
    assert error(ours, true).median() < 0.2
