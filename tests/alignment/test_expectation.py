"""E_q log p in closed form against KL and entropy, draws and hand-made cases."""

import copy
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pvae.alignment import align
from pvae.alignment.expectation import expected_log_prob, log_prob_at, mean_log_prob
from pvae.distributions import AnalyticEntropyNormal
from pvae.priors import GaussianMixture
from pvae.testing import LinearGaussianVAE

from .programs import BATCH, arguments, density, programs

pytestmark = pytest.mark.usefixtures("float64")


def normals(batch: tuple[int, ...], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(*batch, 3, generator=generator)
    scale = torch.rand(*batch, 3, generator=generator) + 0.3
    tril = torch.diag_embed(scale) + torch.randn(*batch, 3, 3, generator=generator).tril(-1)
    return {
        "diagonal": dist.Normal(loc, scale).to_event(1),
        "analytic": AnalyticEntropyNormal(loc, scale),
        "full": dist.MultivariateNormal(loc, scale_tril=tril),
    }


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
@pytest.mark.parametrize("p_kind", ["diagonal", "full"])
@pytest.mark.parametrize("q_kind", ["diagonal", "full"])
def test_closed_form_is_minus_kl_and_entropy(q_kind: str, p_kind: str, batch: tuple[int, ...]) -> None:
    q, p = normals((4,), 1)[q_kind].expand(batch or (4,)), normals((), 2)[p_kind].expand(batch)
    ours = expected_log_prob(q, p)
    assert ours is not None
    plain: dict[str, Any] = {
        "diagonal": lambda d: dist.MultivariateNormal(d.mean, scale_tril=torch.diag_embed(d.stddev)),
        "full": lambda d: d,
    }
    wanted = -kl_divergence(plain[q_kind](q), plain[p_kind](p)) - q.entropy()
    torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11)


def test_an_analytic_entropy_changes_nothing() -> None:
    p = normals((), 2)["diagonal"]
    kinds = normals((4,), 1)
    ours, wanted = expected_log_prob(kinds["analytic"], p), expected_log_prob(kinds["diagonal"], p)
    assert ours is not None
    assert wanted is not None
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("p_kind", ["diagonal", "full"])
def test_closed_form_is_the_mean_over_draws(p_kind: str) -> None:
    q, p = normals((3,), 5)["full"], normals((), 6)[p_kind]
    drawn = p.log_prob(q.sample((100_000,)))
    ours = expected_log_prob(q, p)
    assert ours is not None
    assert ((ours - drawn.mean(0)).abs() < 4.5 * drawn.std(0) / 100_000**0.5).all()


def test_other_pairs_have_none() -> None:
    q = normals((4,), 1)["diagonal"]
    assert expected_log_prob(q, GaussianMixture(3, 2)()) is None
    assert expected_log_prob(q, dist.Laplace(torch.zeros(3), 1.0).to_event(1)) is None
    assert expected_log_prob(q, q.mask(False)) is None
    model, five = programs("normal", "five")
    assert expected_log_prob(five.posterior(*arguments(model, torch.arange(3))), model.prior()) is None  # type: ignore[operator]


@pytest.mark.parametrize("particles", [(), (3,)])
def test_fresh_draws_are_averaged_over_particles_too(particles: tuple[int, ...]) -> None:
    q = normals((4,), 1)["diagonal"].expand((*particles, 4))
    p = GaussianMixture(3, 2)().expand((*particles, 4))
    torch.manual_seed(0)
    ours = mean_log_prob(q, p, num_samples=60_000)
    assert ours.shape == (4,)
    drawn = p.log_prob(q.sample((60_000,))).reshape(-1, 4)
    assert ((ours - drawn.mean(0)).abs() < 4.5 * 2**0.5 * drawn.std(0) / 60_000**0.5).all()


def test_fresh_draws_of_five_leave_its_last_draw_alone() -> None:
    model, guide = programs("normal", "five")
    q = guide.posterior(*arguments(model, torch.arange(BATCH)))  # type: ignore[operator]
    z = q.rsample()
    before = q.score_parts(z).log_prob
    mean_log_prob(q, model.prior(), 3)  # type: ignore[operator]
    assert torch.equal(q.score_parts(z).log_prob, before)


@pytest.mark.parametrize("prior", ["normal", "gmm", "zuko"])
def test_the_slope_in_place_of_a_density_has_its_value_and_gradient(prior: str) -> None:
    model, _ = programs(prior)
    args = arguments(model, torch.arange(BATCH))
    p = model.prior(*args[1:])  # type: ignore[operator]
    z = torch.randn(3, BATCH, 2, requires_grad=True)
    weight = torch.randn(3, BATCH)
    found: list[Tensor] = []
    for detach in (None, "prior"):
        value = log_prob_at(p, z, detach)
        found += [value.detach(), *torch.autograd.grad((weight * value).sum(), z)]
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[3], found[1], rtol=1e-10, atol=1e-12)


def test_a_posterior_is_asked_for_where_it_is_needed() -> None:
    aligned = align(*programs(), density(), estimator="mean", gamma=1.0)
    index = torch.arange(BATCH)
    aligned.model.on_batch(index)
    args = arguments(aligned.model, index)
    with pytest.raises(ValueError, match="needs the posterior: run the aligned guide before the model"):
        aligned.model(*args)
    with torch.no_grad():  # somebody looks at the program
        aligned.model(*args)
    aligned.guide(*args)
    aligned.model(*args)
    # One run of the guide serves one of the model.
    with pytest.raises(ValueError, match="needs the posterior"):
        aligned.model(*args)
    copy.deepcopy(aligned)


def test_an_oracle_agrees() -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2, scale=0.5)
    q = oracle.exact_guide.posterior(torch.randn(4, 3))
    ours = expected_log_prob(q, oracle.model.prior())
    assert ours is not None
    second = q.mean.square().sum(-1) + q.covariance_matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(ours, -0.5 * second - torch.tensor(2 * torch.pi).log())
