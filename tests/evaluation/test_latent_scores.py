"""Scores of single data: closed forms where these are known, SciPy's and quadrature's numbers elsewhere."""

import json
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import pvae
from pvae.alignment import align
from pvae.data import from_tensors
from pvae.distributions import CodeMixture, PointMass
from pvae.evaluation import best_labels, latent_scores
from pvae.testing import LinearGaussianVAE
from tests.oracles import linear_gaussian_elbo

from .programs import Encoding, Latent, Layers


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Mixture(nn.Module):
    """z from a mixture of two normals at -2 and at 2, x ~ N(z, 0.5^2)."""

    def __init__(self, kl_mode: Any = "mc") -> None:
        super().__init__()
        self.kl_mode = kl_mode

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        loc = x.new_tensor([[-2.0], [2.0]]).expand(2, x.shape[-1])
        prior = CodeMixture(x.new_zeros(2), loc, torch.ones_like(loc), kl_mode=self.kl_mode)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def test_two_normals_are_in_closed_form(float64: None) -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2)
    x = oracle.model.sample(30)
    found = latent_scores(oracle.model, oracle.exact_guide, x, num_samples=2000)
    loc, covariance = (value.numpy() for value in oracle.posterior(x))
    covariance = np.broadcast_to(covariance, (30, 2, 2))
    normal = scipy.stats.multivariate_normal
    standard = normal(np.zeros(2), np.eye(2))
    entropy = np.array([normal(m, c).entropy() for m, c in zip(loc, covariance, strict=True)])
    log_p = np.array([standard.logpdf(m) - 0.5 * np.trace(c) for m, c in zip(loc, covariance, strict=True)])
    assert found.closed_form == ("entropy", "kl")
    np.testing.assert_allclose(found.log_p_mean, standard.logpdf(loc), rtol=1e-9)
    np.testing.assert_allclose(found.log_p, log_p, rtol=1e-9)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-9)
    np.testing.assert_allclose(found.kl, -entropy - log_p, rtol=1e-9)
    exact = linear_gaussian_elbo(oracle, torch.from_numpy(loc), torch.from_numpy(covariance[0].copy()), x)
    np.testing.assert_allclose(found.elbo, exact, atol=0.2)  # the reconstruction is drawn
    assert found.log_prob is None


def test_a_mixture_is_averaged_over_draws_whatever_bound_it_registers(float64: None) -> None:
    x, guide = draws(8, 1) + 1, Encoding(1.0, 0.0, 0.7)
    found = latent_scores(Mixture(), guide, x, num_samples=4000)
    assert found.closed_form == ("entropy",)
    grid = np.linspace(-9, 9, 20_001)
    prior = 0.5 * (scipy.stats.norm.pdf(grid, -2) + scipy.stats.norm.pdf(grid, 2))
    for i, mean in enumerate(x[:, 0].tolist()):
        q = scipy.stats.norm.pdf(grid, mean, 0.7)
        log_p = float((q * np.log(prior)).sum() * (grid[1] - grid[0]))
        entropy = float(scipy.stats.norm.entropy(mean, 0.7))
        assert found.log_p[i].item() == pytest.approx(log_p, abs=0.06)
        assert found.kl[i].item() == pytest.approx(-entropy - log_p, abs=0.08)
        assert found.entropy[i].item() == pytest.approx(entropy, rel=1e-9)
        at_mean = math.log(0.5 * (scipy.stats.norm.pdf(mean, -2) + scipy.stats.norm.pdf(mean, 2)))
        assert found.log_p_mean[i].item() == pytest.approx(at_mean, rel=1e-9)
    bounded = latent_scores(Mixture("variational"), guide, x, num_samples=4000)
    assert torch.equal(bounded.kl, found.kl)


def test_a_flow_has_its_entropy_by_draws(float64: None) -> None:
    def guide(x: Tensor, y: Tensor | None = None) -> None:
        base = dist.Normal(x, 0.5).to_event(1)
        with pyro.plate("data", len(x), dim=-1):
            affine = dist.transforms.AffineTransform(1.0, 2.0, event_dim=1)
            pyro.sample("z", dist.TransformedDistribution(base, [affine]))

    x = draws(6, 3)
    found = latent_scores(Latent(), guide, x, num_samples=4000)
    assert found.closed_form == ()
    # z ~ N(1 + 2 x, 1).
    entropy = 3 * float(scipy.stats.norm.entropy())
    log_p = scipy.stats.norm.logpdf(1 + 2 * x.numpy()).sum(-1) - 1.5
    np.testing.assert_allclose(found.entropy, entropy, atol=0.08)
    np.testing.assert_allclose(found.kl, -entropy - log_p, atol=0.35)
    # The distribution has no mean of its own: the average of the draws stands for it.
    np.testing.assert_allclose(
        found.log_p_mean, scipy.stats.norm.logpdf(1 + 2 * x.numpy()).sum(-1), atol=0.35
    )


def test_latents_of_several_sites_count_together(float64: None) -> None:
    x = draws(10, 3)
    found = latent_scores(Layers(), Layers(guide=True), x, num_samples=6000)
    assert found.closed_form == ("entropy", "kl")
    x_ = x.numpy()
    entropy = 3 * float(scipy.stats.norm.entropy(0, 0.5))
    # KL of z_2, and of z_1 given z_2: N(x_3 / 2 + s, 1/4) against N(s, 1), whatever s is.
    top = 0.5 * ((x_[:, :2] / 2) ** 2 + 0.25 - 1 - math.log(0.25)).sum(-1)
    below = 0.5 * ((x_[:, 2] / 2) ** 2 + 0.25 - 1 - math.log(0.25))
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-9)
    np.testing.assert_allclose(found.kl, top + below, rtol=1e-9)
    np.testing.assert_allclose(found.log_p, -(entropy + top + below), rtol=1e-9)
    at_mean = scipy.stats.norm.logpdf(x_[:, :2] / 2).sum(-1) + scipy.stats.norm.logpdf(x_[:, 2] / 2)
    np.testing.assert_allclose(found.log_p_mean, at_mean, atol=0.06)  # the lower mean hangs on draws


def test_a_draw_has_the_law_of_the_posterior(float64: None) -> None:
    x = torch.zeros(4000, 1)
    found = latent_scores(Latent(1), Encoding(0.0, 0.0, 1.0), x, num_samples=3)
    square = -2 * found.log_p_draw - math.log(2 * math.pi)
    assert scipy.stats.kstest(square.numpy(), scipy.stats.chi2(1).cdf).pvalue > 1e-3
    assert float(found.log_p_draw[:100].std()) > 0.1  # data have draws of their own


def test_neither_company_nor_number_of_data_changes_a_score(float64: None) -> None:
    x = draws(50, 3)
    all_, some = (latent_scores(Mixture(), Encoding(), part, num_samples=7) for part in (x, x[:20]))
    for name, column in some.columns().items():
        assert torch.equal(column, all_.columns()[name][:20]), name
    other = torch.cat([x[:20], 5 * draws(30, 3, seed=1)])
    assert torch.equal(latent_scores(Mixture(), Encoding(), other, num_samples=7).kl[:20], some.kl)
    assert not torch.equal(latent_scores(Mixture(), Encoding(), x, num_samples=7, seed=1).elbo, all_.elbo)


def test_factors_and_alignment_never_count(float64: None) -> None:
    x = draws(30, 3)

    class WithFactor(Latent):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            with pyro.plate("data", len(x), dim=-1):
                pyro.factor("penalty", 100 * x.sum(-1))
            return super().forward(x, y)

    plain = latent_scores(Latent(), Encoding(), x)
    for name, column in latent_scores(WithFactor(), Encoding(), x).columns().items():
        assert torch.equal(column, plain.columns()[name]), name

    oracle = LinearGaussianVAE(x_dim=3, z_dim=2)

    class Target:
        log_density = draws(30, seed=1) - 8
        standard_error = torch.ones(30).double()
        embedding = None

    aligned = align(oracle.model, oracle.exact_guide, Target(), gamma=1.0, offset="none")
    bare = latent_scores(oracle.model, oracle.exact_guide, x)
    for name, column in latent_scores(*aligned, x).columns().items():
        assert torch.equal(column, bare.columns()[name]), name


def test_a_bound_on_the_likelihood_is_log_likelihoods(float64: None) -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2)
    x = oracle.model.sample(12)
    found = latent_scores(oracle.model, oracle.exact_guide, x, num_particles=20, seed=4)
    estimate = pvae.log_likelihood(oracle.model, oracle.exact_guide, x, num_particles=20, seed=4)
    assert found.log_prob is not None
    assert torch.equal(found.log_prob, estimate.log_prob)
    assert found.num_particles == 20


def test_a_split_brings_its_protocol_and_its_labels(float64: None) -> None:
    x, y = draws(40, 3).float(), torch.arange(40) % 4
    data = from_tensors(x, test=x, y={"train": y, "test": y})
    model = Latent(label_weight=2.0).double()
    found = latent_scores(model, Encoding(), data.test)
    assert found.conditional
    assert found.protocol is not None
    assert found.protocol["part"] == "test"
    assert torch.equal(found.kl, latent_scores(model, Encoding(), x, y).kl)
    assert not latent_scores(Latent(), Encoding(), data.test).conditional


def test_the_best_label_is_the_one_of_the_highest_bound(float64: None) -> None:
    # z ~ N(4 y, 1) and codes near 4 y: the label can be read off the code.
    y = torch.arange(60) % 3
    x = 4 * y.unsqueeze(-1) + 0.3 * draws(60, 3)
    model, guide = Latent(label_weight=4.0), Encoding()
    assert torch.equal(best_labels(model, guide, x, torch.tensor([0, 1, 2])), y)
    assert torch.equal(best_labels(model, guide, x[y != 1], torch.tensor([2, 0])), y[y != 1])
    assert best_labels(model, guide, x, torch.tensor([1])).tolist() == [1] * 60
    wrong = {part: torch.zeros(60).long() for part in ("train", "test")}
    data = from_tensors(x.float(), test=x.float(), y=wrong)
    assert torch.equal(best_labels(model, guide, data.test, torch.tensor([0, 1, 2])), y)
    with pytest.raises(ValueError, match="labels must have shape"):
        best_labels(model, guide, x, torch.zeros(0))


def test_nothing_is_left_behind(float64: None) -> None:
    model, guide, x = Latent(), Encoding(), draws(20, 3)
    before = torch.get_rng_state()
    first = latent_scores(model, guide, x, num_particles=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert guide.training
    assert guide.dropout.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(latent_scores(model, guide, x, num_particles=3).elbo, first.elbo)


def test_what_it_says(float64: None) -> None:
    found = latent_scores(Latent(), Encoding(), draws(20, 3))
    record = json.loads(json.dumps(found.to_dict()))
    assert record["means"]["kl"] == pytest.approx(float(found.kl.mean()))
    assert record["per_datum"]["elbo"] == found.elbo.tolist()
    assert record["closed_form"] == ["entropy", "kl"]
    assert "log_prob" not in record["per_datum"]
    assert len(found) == record["num_data"] == 20
    assert "nats on 20 data" in str(found)


def test_bad_arguments_are_refused(float64: None) -> None:
    x = draws(5, 3)
    with pytest.raises(ValueError, match="num_samples must be positive"):
        latent_scores(Latent(), Encoding(), x, num_samples=0)
    with pytest.raises(ValueError, match="num_particles must be positive"):
        latent_scores(Latent(), Encoding(), x, num_particles=0)
    bad = x.clone()
    bad[3] = math.nan
    with pytest.raises(ValueError, match=r"log_p_mean must be finite, got nan for datum 3"):
        latent_scores(Latent(), Encoding(), bad)

    def point(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", PointMass(x, event_dim=1))

    with pytest.raises(ValueError, match="has only a surrogate density"):
        latent_scores(Latent(), point, x)


def test_the_bound_brings_the_evidence_of_its_weights(float64: None) -> None:
    x = draws(12, 3)
    found = latent_scores(Latent(), Encoding(0.2, 0.0, 0.1), x, num_particles=60, seed=2)
    bound = pvae.log_likelihood(Latent(), Encoding(0.2, 0.0, 0.1), x, num_particles=60, seed=2)
    assert found.pareto_k is not None
    assert found.ess is not None
    assert torch.equal(found.pareto_k, bound.pareto_k)
    assert torch.equal(found.ess, bound.ess)
    assert found.khat_share == bound.khat_share == found.to_dict()["khat_share"]
    bare = latent_scores(Latent(), Encoding(), x)
    assert math.isnan(bare.khat_share)
    assert bare.to_dict()["khat_share"] is None
