"""Divergences of aggregate posterior and prior, where both are normals and everything is known."""

import json
import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.spatial
import scipy.stats
import torch
from torch import Tensor

from pvae.evaluation import energy_distance, prior_coverage, synthetic_kl

from .programs import Encoding, Latent, Layers


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal_kl(mean: float, scale: float, other_mean: float, other_scale: float, dim: int = 1) -> float:
    ratio = scale / other_scale
    shift = (mean - other_mean) / other_scale
    return 0.5 * dim * (ratio**2 + shift**2 - 1 - 2 * math.log(ratio))


def test_the_divergences_are_those_of_two_normals(float64: None) -> None:
    # x ~ N(0, I), so that the aggregate posterior is N(0.3, 0.6^2 + 0.8^2).
    found = prior_coverage(Latent(2, scale=1.4), Encoding(0.6, 0.3, 0.8), draws(1500, 2), num_prior=3000)
    assert found.posterior_to_prior_low is not None
    forward = normal_kl(0.3, 1.0, 0.0, 1.4, dim=2)
    assert found.posterior_to_prior_low.value < found.posterior_to_prior.value
    assert found.posterior_to_prior_low.value == pytest.approx(forward, abs=0.06)
    assert found.posterior_to_prior.value == pytest.approx(forward, abs=0.06)
    assert found.posterior_to_prior.low < forward < found.posterior_to_prior.high
    reverse = normal_kl(0.0, 1.4, 0.3, 1.0, dim=2)
    assert found.prior_to_posterior.value == pytest.approx(reverse, abs=0.1)
    assert (found.num_data, found.num_prior, found.context_size) == (1500, 3000, 1500)


def test_the_mixture_s_own_divergence_is_what_quadrature_says(float64: None) -> None:
    x = draws(3, 1)
    found = prior_coverage(Latent(1), Encoding(2.0, 0.0, 0.5), x, num_prior=20_000, num_bootstrap=0)
    centres = 2 * x[:, 0].numpy()

    def mixture(z: float) -> float:
        return float(scipy.stats.norm(centres, 0.5).pdf(z).mean())

    def integrand(z: float) -> float:
        p = float(scipy.stats.norm.pdf(z))
        return p * math.log(p / mixture(z)) if p > 0 else 0.0

    exact = scipy.integrate.quad(integrand, -8, 8, limit=200)[0]
    assert found.prior_to_posterior.value == pytest.approx(exact, rel=0.05)
    assert math.isnan(found.prior_to_posterior.low)


def test_the_two_bounds_enclose_the_truth_when_posteriors_are_narrow(float64: None) -> None:
    x = draws(200, 3)
    found = prior_coverage(Latent(3), Encoding(1.0, 0.0, 0.05), x)  # aggregate N(0, 1 + 0.05^2): nearly 0
    truth = normal_kl(0.0, math.sqrt(1 + 0.05**2), 0.0, 1.0, dim=3)
    assert found.posterior_to_prior_low is not None
    assert found.posterior_to_prior_low.value < truth < found.posterior_to_prior.value
    assert found.posterior_to_prior.value > 1  # saturated: rate minus log N
    assert found.prior_to_posterior.value > 1
    assert abs(found.energy.value) < 0.05  # while the samples hardly differ


def test_given_labels_the_divergence_is_within_them(float64: None) -> None:
    y = (torch.arange(600) % 2).double()
    x = draws(600, 2) + 3 * y.unsqueeze(-1)
    # Within a label both are N(3 y, 1); the codes' marginal is that of the prior in either case.
    model, guide = Latent(2, label_weight=3.0), Encoding(0.6, 0.0, 0.8)
    moved = prior_coverage(model, guide, x, y, num_bootstrap=0)
    aligned = prior_coverage(Latent(2, label_weight=1.8), guide, x, y, num_bootstrap=0)
    assert aligned.posterior_to_prior.value == pytest.approx(0, abs=0.1)
    # Label 1 has codes around 1.8 where its prior has 3: half of the data are that far off.
    assert moved.posterior_to_prior.value == pytest.approx(
        0.5 * normal_kl(1.8, 1.0, 3.0, 1.0, dim=2), abs=0.2
    )
    assert moved.prior_to_posterior.value == pytest.approx(
        0.5 * normal_kl(1.8, 1.0, 3.0, 1.0, dim=2), abs=0.3
    )
    assert moved.context_size == 300
    alone = prior_coverage(model, guide, x[:20], torch.arange(20) / 10, num_bootstrap=0)
    assert alone.posterior_to_prior_low is None
    assert "posterior_to_prior_low" not in alone.measures()
    assert alone.context_size == 1


def test_several_sites_count_together(float64: None) -> None:
    found = prior_coverage(Layers(), Layers(guide=True), draws(60, 3), num_bootstrap=10)
    assert found.posterior_to_prior.value > 0
    assert math.isfinite(found.prior_to_posterior.value)


def test_energy_is_the_definition_and_scipys(float64: None) -> None:
    a, b = draws(40, 3), draws(60, 3, seed=1) * 1.5 + 0.3
    distance = scipy.spatial.distance.cdist
    within_a = distance(a, a).sum() / (40 * 39)
    within_b = distance(b, b).sum() / (60 * 59)
    assert energy_distance(a, b) == pytest.approx(2 * distance(a, b).mean() - within_a - within_b, abs=1e-12)
    # In one dimension; SciPy's has each point as its own partner too.
    u, v = a[:, :1], b[:, :1]
    own = distance(u, u).sum() / (40 * 39 * 40) + distance(v, v).sum() / (60 * 59 * 60)
    theirs = scipy.stats.energy_distance(u[:, 0].numpy(), v[:, 0].numpy()) ** 2
    assert energy_distance(u, v) == pytest.approx(theirs - own, abs=1e-12)


def test_energy_tells_samples_apart_in_units_of_the_prior(float64: None) -> None:
    x = draws(400, 3)
    near = prior_coverage(Latent(), Encoding(0.6, 0.0, 0.8), x).energy
    assert near.low < 0 < near.high
    assert abs(near.null) < 0.05
    far = prior_coverage(Latent(), Encoding(0.6, 1.0, 0.8), x).energy
    assert far.low > 0.3
    # Ten times the scale everywhere, noise and all: nothing has changed.
    wide = prior_coverage(Latent(scale=10.0), Encoding(6.0, 10.0, 8.0), x).energy
    assert wide.value == pytest.approx(far.value, rel=1e-9)
    few = prior_coverage(Latent(), Encoding(0.6, 1.0, 0.8), x, max_points=50).energy
    assert few.value != far.value
    assert few.value == pytest.approx(far.value, rel=0.5)


def test_synthetic_divergences_are_those_of_normals(float64: None) -> None:
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    truth = dist.Normal(torch.ones(2), 0.5).to_event(1)
    found = synthetic_kl(prior, truth, num_samples=20_000)
    forward, reverse = normal_kl(1.0, 0.5, 0.0, 1.0, dim=2), normal_kl(0.0, 1.0, 1.0, 0.5, dim=2)
    assert abs(found.truth_to_prior - forward) < 4 * found.truth_to_prior_error
    assert abs(found.prior_to_truth - reverse) < 4 * found.prior_to_truth_error
    assert found.truth_to_prior_error < 0.02
    assert json.loads(json.dumps(found.to_dict()))["num_samples"] == 20_000
    assert "frame-dependent" in str(found)
    assert synthetic_kl(prior, truth, num_samples=10) == synthetic_kl(prior, truth, num_samples=10)


def test_nothing_is_left_behind_and_the_same_seed_gives_the_same(float64: None) -> None:
    model, guide, x = Latent(), Encoding(), draws(40, 3)
    before = torch.get_rng_state()
    first = prior_coverage(model, guide, x, num_bootstrap=5)
    synthetic_kl(dist.Normal(torch.zeros(1), 1.0).to_event(1), dist.Normal(torch.ones(1), 1.0).to_event(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert guide.training
    torch.manual_seed(5)
    assert prior_coverage(model, guide, x, num_bootstrap=5) == first
    assert prior_coverage(model, guide, x, num_bootstrap=5, seed=1) != first


def test_what_it_says(float64: None) -> None:
    found = prior_coverage(Latent(), Encoding(), draws(40, 3), num_bootstrap=5)
    record = json.loads(json.dumps(found.to_dict()))
    assert record["measures"]["energy"]["null"] == found.energy.null
    assert record["measures"]["prior_to_posterior"]["null"] is None
    assert len(found.to_markdown().splitlines()) == 2 + 4
    assert "energy distance" in str(found)
    assert "on 40 data" in str(found)


def test_bad_arguments_are_refused(float64: None) -> None:
    model, guide, x = Latent(), Encoding(), draws(5, 3)
    with pytest.raises(ValueError, match="x must be at least 2, got 1"):
        prior_coverage(model, guide, x[:1])
    with pytest.raises(ValueError, match="num_prior must be at least 2, got 1"):
        prior_coverage(model, guide, x, num_prior=1)
    with pytest.raises(ValueError, match="num_bootstrap must not be negative"):
        prior_coverage(model, guide, x, num_bootstrap=-1)
    with pytest.raises(ValueError, match="a and b must have the same width"):
        energy_distance(x, x[:, :2])
    one, two = (dist.Normal(torch.zeros(d), 1.0).to_event(1) for d in (1, 2))
    with pytest.raises(ValueError, match=r"must have the same event_shape, got \(1,\) and \(2,\)"):
        synthetic_kl(one, two)
    with pytest.raises(ValueError, match=r"prior must be one distribution, got a batch of shape \(3,\)"):
        synthetic_kl(one.expand([3]), one)
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        synthetic_kl(one, one, num_samples=1)
    assert np.isfinite(energy_distance(x, x + 1))
