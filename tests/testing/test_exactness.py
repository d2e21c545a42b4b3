"""At the exact guide every bound is log p(x); at a diagonal one bounds rise with K and stay below."""

import math
from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO

import pvae
from pvae.inference import ELBO
from tests.oracles import DiscreteModel, LinearGaussianVAE, QuadratureModel

EXACT: list[tuple[str, Any]] = [
    ("isotropic", LinearGaussianVAE(x_dim=6, z_dim=3, scale=0.3)),
    ("diagonal", LinearGaussianVAE(x_dim=3, z_dim=2, scale=torch.tensor([0.3, 0.5, 0.8]))),
    ("discrete", DiscreteModel()),
]
REPARAMETERISED = EXACT[:2]


def ids(cases: list[tuple[str, Any]]) -> Any:
    return pytest.mark.parametrize("oracle", [oracle for _, oracle in cases], ids=[name for name, _ in cases])


@ids(EXACT)
@pytest.mark.parametrize("num_particles", [1, 10, 1000])
def test_log_likelihood_is_exact_per_datum_at_the_exact_guide(oracle: Any, num_particles: int) -> None:
    x = oracle.model.sample(40)
    estimate = pvae.log_likelihood(oracle.model, oracle.exact_guide, x, num_particles=num_particles)
    exact = oracle.log_prob(x)
    for values in (estimate.log_prob, estimate.elbo_values):
        assert (values - exact).abs().max().item() < 1e-10
    assert (estimate.ess - num_particles).abs().max().item() < 1e-6
    assert not (estimate.pareto_k > 0).any()
    assert estimate.monte_carlo_error < 1e-10


def test_log_likelihood_is_exact_with_labels() -> None:
    oracle = LinearGaussianVAE(y_dim=2)
    y = torch.randn(40, 2, dtype=torch.float64)
    x = oracle.model.sample(40, y)
    estimate = pvae.log_likelihood(oracle.model, oracle.exact_guide, x, y, num_particles=10, batch_size=7)
    assert (estimate.log_prob - oracle.log_prob(x, y)).abs().max().item() < 1e-10


@ids(REPARAMETERISED)
@pytest.mark.parametrize("kind", ["elbo", "iwae", "dreg"])
@pytest.mark.parametrize("num_particles", [1, 10, 1000])
def test_our_objective_is_exact_at_the_exact_guide(oracle: Any, kind: Any, num_particles: int) -> None:
    x = oracle.model.sample(8)
    objective = ELBO(kind, num_particles=num_particles)
    bound = objective.terms(oracle.model, oracle.exact_guide, x).bound
    exact = oracle.log_prob(x)
    assert (bound - exact).abs().max().item() < 1e-10
    loss = objective.loss(oracle.model, oracle.exact_guide, x)
    assert loss == pytest.approx(-exact.sum().item(), abs=1e-9)


@ids(REPARAMETERISED)
@pytest.mark.parametrize("num_particles", [1, 10])
def test_stock_pyro_is_exact_at_the_exact_guide(oracle: Any, num_particles: int) -> None:
    x = oracle.model.sample(8)
    objective = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    loss = objective.loss(oracle.model, oracle.exact_guide, x)
    assert loss == pytest.approx(-oracle.log_prob(x).sum().item(), abs=1e-9)


@pytest.mark.parametrize("kind", ["elbo", "mean_field"])
def test_our_objective_averages_to_the_exact_elbo_at_a_diagonal_guide(kind: Any) -> None:
    oracle = LinearGaussianVAE(x_dim=5, z_dim=2, scale=0.3)
    guide, x = oracle.mean_field_guide, oracle.model.sample(4)
    copies = x.repeat(2000, 1)
    with torch.no_grad():
        bound = ELBO(kind).terms(oracle.model, guide, copies).bound.reshape(2000, 4)
    error = bound.std(0) / math.sqrt(len(bound))
    assert ((bound.mean(0) - oracle.guide_elbo(guide, x)).abs() < 5 * error).all()


@pytest.mark.parametrize(
    "oracle",
    [
        LinearGaussianVAE(x_dim=6, z_dim=3, scale=0.3),
        LinearGaussianVAE(scale=torch.tensor([0.3, 0.5, 0.8]), seed=5),
    ],
    ids=["isotropic", "diagonal"],
)
def test_bounds_rise_with_particles_and_stay_below_at_a_diagonal_guide(oracle: LinearGaussianVAE) -> None:
    x = oracle.model.sample(8)
    exact, guide = oracle.log_prob(x), oracle.mean_field_guide
    means, errors = [], []
    assert (exact - oracle.guide_elbo(guide, x)).mean() > 0.1
    for num_particles in (1, 10, 1000):
        estimate = pvae.log_likelihood(oracle.model, guide, x.repeat(64, 1), num_particles=num_particles)
        gap = estimate.log_prob.reshape(64, 8) - exact
        means.append(gap.mean().item())
        errors.append(gap.std().item() / math.sqrt(gap.numel()))
    elbo_gap = (oracle.guide_elbo(guide, x) - exact).mean().item()
    assert abs(means[0] - elbo_gap) < 5 * errors[0]
    for low, high in ((0, 1), (1, 2)):
        assert means[high] - means[low] > 3 * math.hypot(errors[low], errors[high])
    assert means[2] < 5 * errors[2]
    assert (gap.mean(0) < 5 * gap.std(0) / 8).all()


def test_bounds_rise_with_particles_on_a_curved_model() -> None:
    oracle = QuadratureModel()
    x = oracle.model.sample(8)
    exact = oracle.log_prob(x)
    gaps = []
    for num_particles in (1, 10, 1000):
        estimate = pvae.log_likelihood(
            oracle.model, oracle.imperfect_guide, x.repeat(32, 1), num_particles=num_particles
        )
        gaps.append((estimate.log_prob.reshape(32, 8) - exact).mean().item())
    assert gaps[0] < gaps[1] < gaps[2] < 0.02
    assert gaps[2] > -0.05


def test_factors_and_scales_change_no_value() -> None:
    from pvae.testing.programs import AlignedGuide, AlignedModel, ScaledGuide, ScaledModel

    oracle = LinearGaussianVAE()
    model, guide, x = oracle.model, oracle.exact_guide, oracle.model.sample(8)
    exact = oracle.log_prob(x)
    pairs = [
        (AlignedModel(model, marked=True), AlignedGuide(guide)),
        (AlignedModel(model, marked=False), guide),
        (ScaledModel(model), ScaledGuide(guide)),
    ]
    for changed_model, changed_guide in pairs:
        estimate = pvae.log_likelihood(changed_model, changed_guide, x, num_particles=10)
        assert (estimate.log_prob - exact).abs().max().item() < 1e-10
