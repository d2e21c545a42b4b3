"""The normal with its entropy in closed form: an exact density, another term for an ELBO."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor
from torch.distributions import kl_divergence

from pvae.distributions import AnalyticEntropyNormal
from tests.distributions.tracing import assert_traceable, host_syncs


def parameters(*batch: int, z_dim: int = 3) -> tuple[Tensor, Tensor]:
    loc = torch.randn(*batch, z_dim, dtype=torch.float64)
    return loc, 0.2 + torch.rand(*batch, z_dim, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_log_prob_and_entropy_equal_scipy(batch: tuple[int, ...]) -> None:
    loc, scale = parameters(*batch)
    q, z = AnalyticEntropyNormal(loc, scale), torch.randn(*batch, 3, dtype=torch.float64)
    assert (q.batch_shape, q.event_shape, q.has_rsample) == (batch, (3,), True)
    log_prob, score_function, entropy_term = q.score_parts(z)
    reference = stats.norm(loc.numpy(), scale.numpy())
    np.testing.assert_allclose(log_prob.numpy(), reference.logpdf(z.numpy()).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(q.log_prob(z).numpy(), log_prob.numpy())
    np.testing.assert_allclose(entropy_term.numpy(), -reference.entropy().sum(-1), rtol=1e-12)
    assert score_function == 0


def test_the_entropy_term_is_the_mean_of_log_prob_with_its_gradient() -> None:
    loc, scale = (t.requires_grad_() for t in parameters(4))
    q = AnalyticEntropyNormal(loc, scale)
    z = q.rsample((20_000,))
    log_prob, _, entropy_term = q.score_parts(z)
    assert entropy_term.shape == log_prob.shape == (20_000, 4)
    error = log_prob.std(0) / 20_000**0.5
    assert ((log_prob.mean(0) - entropy_term[0]).abs() <= 4 * error).all()
    # Along the draw they differ by a function of the noise alone.
    for term in (log_prob, entropy_term):
        by_loc, by_scale = torch.autograd.grad(term.sum(), (loc, scale), retain_graph=True, allow_unused=True)
        assert by_loc is None or by_loc.abs().max() < 1e-8
        torch.testing.assert_close(by_scale, -20_000 / scale)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5)])
def test_expanded_it_is_of_the_same_class(shape: tuple[int, ...]) -> None:
    loc, scale = parameters(5)
    q = AnalyticEntropyNormal(loc, scale).expand(torch.Size(shape))
    assert type(q) is AnalyticEntropyNormal
    assert type(q.expand([2, *shape])) is AnalyticEntropyNormal
    assert q.rsample().shape == (*shape, 3)
    entropy = scale.log().sum(-1) + 1.5 * math.log(2 * math.pi * math.e)
    torch.testing.assert_close(q.score_parts(q.sample()).entropy_term, -entropy.expand(shape))


def test_as_a_site_in_plates_it_keeps_its_term_under_stock_pyro() -> None:
    loc, scale = parameters(5)

    def guide() -> None:
        with pyro.plate("particles", 4, dim=-2), pyro.plate("data", 5, dim=-1):
            pyro.sample("z", AnalyticEntropyNormal(loc, scale))

    trace = poutine.trace(guide).get_trace()
    trace.compute_score_parts()
    node = trace.nodes["z"]
    assert type(node["fn"]) is AnalyticEntropyNormal
    entropy = scale.log().sum(-1) + 1.5 * math.log(2 * math.pi * math.e)
    torch.testing.assert_close(node["score_parts"].entropy_term, -entropy.expand(4, 5))
    wanted = dist.Normal(loc, scale).log_prob(node["value"]).sum(-1)
    torch.testing.assert_close(node["log_prob"], wanted)


def test_registered_divergences_are_those_of_the_normal() -> None:
    loc, scale = parameters(5)
    q, plain = AnalyticEntropyNormal(loc, scale), dist.Normal(loc, scale).to_event(1)
    other = dist.Normal(*parameters(5)).to_event(1)
    covariance = torch.eye(3, dtype=torch.float64) + 0.3
    joint = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance)
    for p in (other, AnalyticEntropyNormal(other.base_dist.loc, other.base_dist.scale)):
        assert torch.equal(kl_divergence(q, p), kl_divergence(plain, other))
    assert torch.equal(kl_divergence(other, q), kl_divergence(other, plain))
    assert torch.equal(kl_divergence(q, joint), kl_divergence(plain, joint))
    z = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(copy.deepcopy(q).log_prob(z), plain.log_prob(z))


def test_arguments_are_checked_as_those_of_a_normal() -> None:
    loc, scale = parameters(5)
    with pytest.raises(ValueError, match="Expected parameter scale"):
        AnalyticEntropyNormal(loc, -scale, validate_args=True)
    AnalyticEntropyNormal(loc, -scale, validate_args=False)


def test_traceable_without_synchronisation() -> None:
    def terms(loc: Tensor, log_scale: Tensor, z: Tensor) -> Tensor:
        parts = AnalyticEntropyNormal(loc, log_scale.exp()).score_parts(z)
        return parts.log_prob + parts.entropy_term.square()

    inputs = tuple(torch.randn(5, 3, dtype=torch.float64).requires_grad_() for _ in range(3))
    others = tuple(torch.randn(5, 3, dtype=torch.float64).requires_grad_() for _ in range(3))
    assert_traceable(terms, inputs, others)
    q = AnalyticEntropyNormal(*parameters(5), validate_args=False)
    assert host_syncs(lambda: q.rsample()) == []
