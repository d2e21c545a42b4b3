"""Regret of guides whose distance from the best of their family is known in closed form."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from pvae.evaluation import inference_gaps, likelihood_regret
from pvae.guides import FlowGuide
from pvae.likelihoods import Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal
from pvae.testing import LinearGaussianVAE
from pvae.testing.linear_gaussian import LinearGaussianGuide
from tests.inference.programs import LinearGuide, LinearModel

from .programs import Encoding, Latent, Layers
from .traces import everything

QUICK: dict[str, Any] = {"num_steps": 120, "num_particles": 200}
SHORT: dict[str, Any] = {"num_steps": 10, "num_particles": 20}


def oracle() -> LinearGaussianVAE:
    weight = torch.tensor([[1.0, 0.9], [0.8, 1.0], [0.2, -0.1]])
    return LinearGaussianVAE(x_dim=3, z_dim=2, scale=0.5, weight=weight)


def data(exact: LinearGaussianVAE, num: int = 16) -> Tensor:
    torch.manual_seed(1)
    return exact.model.sample(num)


def moved(guide: LinearGaussianGuide, by: float) -> LinearGaussianGuide:
    with torch.no_grad():
        guide.bias.add_(by)
    return guide


def test_of_the_exact_posterior_it_is_zero() -> None:
    exact = oracle()
    strange = torch.cat([data(exact, 4), 10 + data(exact, 4)])
    found = likelihood_regret(exact.model, exact.exact_guide, strange, num_steps=60)
    assert found.family == "full"
    # But for what Adam makes of rounding errors: its steps do not shrink with the gradient.
    assert float(found.regret.abs().max()) < 0.02
    torch.testing.assert_close(found.elbo, exact.log_prob(strange))


def test_of_the_best_diagonal_it_is_zero_and_of_a_shifted_one_the_planted_gap() -> None:
    exact = oracle()
    x = data(exact)
    best = likelihood_regret(exact.model, exact.mean_field_guide, x, **QUICK)
    assert best.family == "diagonal"
    assert float(best.regret.abs().max()) < 0.1
    guide = moved(exact.mean_field_guide, 0.7)
    found = likelihood_regret(exact.model, guide, x, **QUICK)
    loc, covariance = exact.posterior(x)
    top = exact.elbo(loc, (1 / torch.linalg.inv(covariance).diagonal()).diag(), x)
    planted = top - exact.guide_elbo(guide, x)
    assert planted.min() > 1
    assert bool(((found.regret - planted).abs() < 5 * found.error + 0.1).all())


def test_strange_data_regret_more_where_the_encoder_has_not_been() -> None:
    # The guide is right at the mean of the data alone, and its error grows with the distance.
    exact = oracle()
    guide = exact.mean_field_guide
    with torch.no_grad():
        guide.weight.mul_(0.7)
    x = data(exact, 12)
    near, far = (likelihood_regret(exact.model, guide, each, **SHORT) for each in (x, 4 * x))
    assert far.regret.mean() > 8 * near.regret.mean() > 0


def test_it_is_the_amortisation_gap_of_the_other_report() -> None:
    exact = oracle()
    x, guide = data(exact, 12), moved(exact.widened_guide(0.6), 0.5)
    gaps = inference_gaps(
        exact.model, guide, x, num_data=None, num_steps=120, num_particles=400, num_bootstrap=0, max_full=0
    )
    found = likelihood_regret(exact.model, guide, x, **QUICK)
    torch.testing.assert_close(found.regret, gaps.amortisation_gap, rtol=0, atol=0.8)
    assert float(found.regret.mean()) == pytest.approx(float(gaps.amortisation_gap.mean()), abs=0.2)


def test_several_sites_are_adjusted_together(float64: None) -> None:
    # z_2's posterior given x is not the guide's: its mean is off.
    found = likelihood_regret(Layers(), Layers(guide=True), torch.randn(6, 3), **QUICK)
    assert found.family == "conditional"
    assert float(found.regret.mean()) > 0.1
    assert bool((found.regret > -5 * found.error - 0.05).all())


def test_other_families_have_a_gaussian_in_their_place(float64: None) -> None:
    torch.manual_seed(0)
    model = VAE(StandardNormal(2), MLPDecoder(2, (5,), hidden=(8,)), Normal())
    guide = FlowGuide(MLPEncoder((5,), 2, hidden=(8,)), num_flows=1, hidden=8)
    found = likelihood_regret(model, guide, torch.randn(3, 5), **SHORT)
    assert found.family == "other"
    assert bool(found.regret.isfinite().all())


def test_data_do_not_depend_on_one_another(float64: None) -> None:
    model, guide, x = Latent(), Encoding(0.5, 0.2, 0.4), torch.randn(7, 3)
    every = likelihood_regret(model, guide, x, **SHORT)
    first = likelihood_regret(model, guide, x[:3], **SHORT)
    torch.testing.assert_close(every.regret[:3], first.regret)


def test_it_changes_nothing_and_follows_its_seed() -> None:
    torch.manual_seed(0)
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(5, 5)
    guide.train()
    model.double()
    guide.double()
    x = x.double()
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()])
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    before = everything(model, guide, optimizer=optimizer)
    first = likelihood_regret(model, guide, x, **SHORT)
    assert everything(model, guide, optimizer=optimizer) == before
    assert torch.equal(likelihood_regret(model, guide, x, **SHORT).regret, first.regret)
    assert not torch.equal(likelihood_regret(model, guide, x, seed=1, **SHORT).regret, first.regret)
    record = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert record["per_datum"]["regret"] == first.regret.tolist()
    assert str(first).startswith("likelihood regret ")


def test_bad_arguments_are_named() -> None:
    model, guide, x = Latent(), Encoding(), torch.randn(3, 3)
    with pytest.raises(ValueError, match="num_steps must be at least 2, got 1"):
        likelihood_regret(model, guide, x, num_steps=1)
    with pytest.raises(ValueError, match="step_particles must be even and positive, got 3"):
        likelihood_regret(model, guide, x, step_particles=3)
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        likelihood_regret(model, guide, x, learning_rate=0.0)
