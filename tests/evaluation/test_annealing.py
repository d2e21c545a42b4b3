"""Annealed bounds: unbiased weights, below log p(x), tight with steps, at the stated price."""

import json
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from pvae.data import from_tensors
from pvae.evaluation import DefensiveGuide, annealed_likelihood, log_likelihood
from pvae.evaluation.tempering import betas_of
from pvae.guides import FiveGuide, FlowGuide, HVAEGuide, NormalGuide
from pvae.likelihoods import Bernoulli, Normal
from pvae.models import HVAE, VAE
from pvae.nn import LadderSpec, MLPDecoder, MLPEncoder, PairDecoder, PairEncoder
from pvae.priors import DiffusionPrior, StandardNormal, VampPrior
from pvae.testing import check_likelihood_estimator
from tests.evaluation.products import Products
from tests.evaluation.programs import Layers
from tests.inference.programs import LinearGuide, LinearModel
from tests.ladders import jolted, ladder
from tests.oracles import LinearGaussianVAE, QuadratureModel

pytestmark = pytest.mark.usefixtures("float64")


def layers_log_prob(x: Tensor) -> Tensor:
    """Log p(x) of ``Layers``: x is (z_2, z_1) plus noise, all normal."""
    covariance = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 3.0]]) + torch.eye(3)
    return torch.from_numpy(scipy.stats.multivariate_normal(torch.zeros(3), covariance).logpdf(x.numpy()))


def drawn(oracle: Any, num_data: int) -> Tensor:
    """Data of a model, not by the seed that the chains take: they would start at the data's own latents."""
    torch.manual_seed(99)
    return oracle.model.sample(num_data)


def check_unbiased(log_ratio: Tensor) -> None:
    """Weights over p(x) have mean one, here within 4 standard errors that are themselves small."""
    ratio = log_ratio.exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < 0.1
    assert abs(ratio.mean() - 1) < 4 * error


def test_one_step_is_importance_sampling_draw_by_draw() -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(70, 5)
    annealed = annealed_likelihood(model, guide, x, num_chains=70, num_steps=1, seed=3)
    plain = log_likelihood(model, guide, x, num_particles=70, seed=3)
    for name in ("log_prob", "elbo_values", "ess", "particle_error", "pareto_k"):
        torch.testing.assert_close(getattr(annealed, name), getattr(plain, name), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(annealed.start_log_prob, annealed.log_prob)
    assert annealed.gradient_evaluations == 70
    assert annealed.acceptance.isnan().all()
    assert annealed.to_dict()["acceptance"] is None


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize(("num_steps", "num_leapfrog"), [(2, 1), (5, 2)])
def test_weights_have_mean_p_of_x(start: Any, num_steps: int, num_leapfrog: int) -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2, scale=0.8)
    x = drawn(oracle, 3).repeat_interleave(320, 0)
    # One chain for each copy of a datum; steps are found anew for each.
    annealed = annealed_likelihood(
        oracle.model,
        oracle.imperfect_guide,
        x,
        num_chains=1,
        num_steps=num_steps,
        num_leapfrog=num_leapfrog,
        start=start,
    )
    check_unbiased(annealed.log_prob - oracle.log_prob(x))


def test_the_start_is_scored_as_well() -> None:
    oracle = LinearGaussianVAE(x_dim=5, z_dim=3, scale=0.3)
    x = drawn(oracle, 40)
    annealed = annealed_likelihood(oracle.model, oracle.imperfect_guide, x, num_steps=20)
    plain = log_likelihood(oracle.model, oracle.imperfect_guide, x, num_particles=16)
    torch.testing.assert_close(annealed.start_log_prob, plain.log_prob)
    torch.testing.assert_close(annealed.elbo_values, plain.elbo_values)
    assert annealed.gain == pytest.approx(annealed.mean - plain.mean)
    assert annealed.gain > 0
    assert annealed.ess.mean() > plain.ess.mean()


def check_tightens(
    model: nn.Module, guide: nn.Module, x: Tensor, exact: Tensor, start: Any, most: int = 300
) -> None:
    """Below log p(x) within 3 standard errors, nearer with steps, and at last within 0.05 nats."""
    shortfalls = []
    for num_steps in (4, most):
        annealed = annealed_likelihood(model, guide, x, num_steps=num_steps, start=start)
        gap = exact - annealed.log_prob
        assert gap.mean() > -3 * gap.std() / math.sqrt(len(x))
        shortfalls.append(gap.square().mean())
    assert shortfalls[1] < shortfalls[0]
    assert abs(gap.mean()) < 0.05


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_linear_gaussian(start: Any) -> None:
    oracle = LinearGaussianVAE(x_dim=6, z_dim=4, scale=0.7)
    x = drawn(oracle, 32)
    check_tightens(oracle.model, oracle.imperfect_guide, x, oracle.log_prob(x), start)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_a_bent_posterior_against_quadrature(start: Any) -> None:
    oracle = QuadratureModel(0.7)
    x = drawn(oracle, 32)
    check_tightens(oracle.model, oracle.imperfect_guide, x, oracle.log_prob(x), start, most=150)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_two_levels_one_of_them_scalar(start: Any) -> None:
    x = 1.5 * torch.randn(32, 3)
    check_tightens(Layers(), Layers(guide=True), x, layers_log_prob(x), start)


def test_the_exact_posterior_costs_nothing() -> None:
    oracle = LinearGaussianVAE(x_dim=4, z_dim=3, y_dim=2)
    y = torch.randn(9, 2)
    x = oracle.model.sample(9, y)
    for guide in (oracle.exact_guide, DefensiveGuide(oracle.model, oracle.exact_guide, 1e-9)):
        annealed = annealed_likelihood(oracle.model, guide, x, y, num_steps=8, num_chains=5)
        # Along the whole path the density is that of the posterior, wherever the chains go.
        torch.testing.assert_close(annealed.log_prob, oracle.log_prob(x, y), rtol=0, atol=1e-5)
        assert annealed.conditional
    assert "log p(x | y)" in str(annealed)
    assert "from the guide, proposal defensive" in str(annealed)


def test_a_narrow_guide_is_helped_where_weights_fail() -> None:
    oracle = LinearGaussianVAE(x_dim=6, z_dim=4, scale=0.5)
    guide, x = oracle.widened_guide(0.4), drawn(oracle, 32)
    exact = oracle.log_prob(x)
    plain = log_likelihood(oracle.model, guide, x, num_particles=2000).log_prob - exact
    annealed = annealed_likelihood(oracle.model, guide, x, num_steps=200).log_prob - exact
    assert plain.mean() < -0.3
    assert annealed.mean() > 0.3 * plain.mean()


def networks(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model of the library, moved off its start, and data."""
    torch.manual_seed(1)
    if kind == "ladder":
        spec = LadderSpec((1, 8, 8), scales=((4, 1), (2, 1)), channels=4, z_channels=1)
        both = ladder(spec, u=2, likelihood=Bernoulli())
        jolted(*both, size=0.1)
        return *both, (torch.rand(6, 1, 8, 8) < 0.5).double()
    x = torch.rand(6, 5)
    encoder: Any = MLPEncoder((5,), 2, hidden=(8,))
    built: tuple[Any, Any]
    if kind == "hvae":
        below = MLPEncoder((2,), 3, hidden=(8,))
        decoder = PairDecoder((3, 2), (5,), hidden=8)
        built = (
            HVAE(VampPrior(encoder, torch.rand(4, 5)), below, decoder, Normal(value=0.7)),
            HVAEGuide(encoder, PairEncoder((5,), 2, 3, hidden=8)),
        )
    else:
        likelihood, net = Normal(value=0.7), MLPDecoder(2, (5,), hidden=(8,), activation="tanh")
        model = VAE(StandardNormal(2), net, likelihood)
        if kind == "five":
            encoder = MLPEncoder((5,), 2, hidden=(8,), activation="tanh")
        guides = {"normal": NormalGuide, "flow": FlowGuide}
        built = (
            model,
            FiveGuide(encoder, net, likelihood) if kind == "five" else guides[kind](encoder),
        )
    jolted(*built, size=0.2)
    return *built, x


@pytest.mark.parametrize("kind", ["normal", "flow", "five", "hvae", "ladder"])
def test_models_and_guides_of_the_library(kind: str) -> None:
    model, guide, x = networks(kind)
    annealed = annealed_likelihood(model, guide, x, num_steps=20, num_chains=8)
    plain = log_likelihood(model, guide, x, num_particles=8)
    # Scored at any z as the guide scores its own draws.
    torch.testing.assert_close(annealed.start_log_prob, plain.log_prob)
    torch.testing.assert_close(annealed.elbo_values, plain.elbo_values)
    better = log_likelihood(model, guide, x, num_particles=500)
    error = math.hypot(better.monte_carlo_error, annealed.monte_carlo_error)
    assert annealed.mean > better.mean - 4 * error - 0.05
    assert annealed.acceptance.min() > 0.3


def test_the_kit_finds_nothing() -> None:
    def annealed(
        model: Any, guide: Any, x: Tensor, y: Any = None, *, num_particles: int, **settings: Any
    ) -> Any:
        return annealed_likelihood(
            model, guide, x, y, num_chains=min(num_particles, 10), num_steps=2, **settings
        )

    # Not those with a discrete model or an ELBO, nor what tests here show.
    skipped = (
        "lower bound",
        "exact guide",
        "tightens with K",
        "known tail",
        "batch size",
        "datum independence",
    )
    report = check_likelihood_estimator(annealed, skip=skipped)
    applied = {"reproducible", "side effects", "training-only factors", "training scales", "labels"}
    assert applied | {"stored variance"} <= set(report.applied)


@pytest.mark.parametrize("batch_size", [1, 40])
def test_batches_change_nothing(batch_size: int) -> None:
    model, guide, x = LinearModel(ladder=True), LinearGuide(ladder=True), torch.randn(70, 5)
    reference = annealed_likelihood(model, guide, x, num_steps=6, num_chains=3)
    other = annealed_likelihood(model, guide, x, num_steps=6, num_chains=3, batch_size=batch_size)
    alone = annealed_likelihood(model, guide, x[:5], num_steps=6, num_chains=3)
    torch.testing.assert_close(other.log_prob, reference.log_prob, rtol=0, atol=1e-9)
    torch.testing.assert_close(alone.log_prob, reference.log_prob[:5], rtol=0, atol=1e-9)
    assert annealed_likelihood(model, guide, x[:5], num_steps=6, num_chains=3, seed=1).mean != alone.mean


@pytest.mark.parametrize("num_steps", [1, 4, 150])
def test_the_cost_is_as_stated(num_steps: int) -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(64, 5)
    with Products(model.decoder, guide.encoder) as rows:
        annealed = annealed_likelihood(model, guide, x, num_chains=5, num_steps=num_steps)
    # Four runs of the model at the door, on one or two data and particles, and where there are many
    # steps a few to record them.
    stated, door = 64 * annealed.gradient_evaluations, 2 + 2 + 4 + 1
    recording = 64 * 5 * 8 if num_steps == 150 else 0
    assert door <= rows[0] - stated <= door + recording
    # The guide: its density once, the draws of both runs once, and the door.
    assert rows[1] <= 64 * 3 + door + 2


def test_places_on_the_path() -> None:
    words: tuple[Any, ...] = ("linear", "sigmoid", "power")
    for word in words:
        betas = betas_of(word, 7)
        assert (betas[0].item(), betas[-1].item(), len(betas)) == (0, 1, 8)
        assert (betas.diff() > 0).all()
        assert betas_of(word, 1).tolist() == [0, 1]
    sigmoid = betas_of("sigmoid", 10).diff()
    assert sigmoid[0] == pytest.approx(sigmoid[-1].item())
    assert sigmoid[0] < 0.3 * sigmoid[5]
    oracle = LinearGaussianVAE()
    x, path = oracle.model.sample(3), [0.0, 0.2, 0.7, 1.0]
    annealed = annealed_likelihood(oracle.model, oracle.exact_guide, x, schedule=path)
    assert annealed.num_steps == 3


def observed(site: Any) -> Any:
    """A model with one latent, normal noise around it."""

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", site)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return program


def test_latents_that_are_not_real_are_refused() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.LogNormal(x, 1.0))

    with pytest.raises(ValueError, match="model site 'z' must be real, got support Greater"):
        annealed_likelihood(observed(dist.Gamma(2.0, 1.0)), guide, torch.randn(4))
    with pytest.raises(ValueError, match="guide site 'z' must be real, got support Greater"):
        annealed_likelihood(observed(dist.Normal(0.0, 1.0)), guide, torch.randn(4))


class Zero(nn.Module):
    def forward(self, y: Tensor, gamma: Tensor) -> Tensor:
        return torch.zeros_like(y)


def test_densities_that_are_no_densities_are_refused() -> None:
    prior = DiffusionPrior(Zero(), (2,), num_steps=4)
    model, guide = VAE(prior, MLPDecoder(2, (5,)), Normal()), NormalGuide(MLPEncoder((5,), 2))
    starts: tuple[Any, ...] = ("guide", "prior")
    for start in starts:
        with pytest.raises(
            ValueError, match="'z' has only an estimate of its density, which has no gradient"
        ):
            annealed_likelihood(model, guide, torch.randn(4, 5), start=start)
    with (
        prior.using("vlb", num_times=2),
        pytest.raises(ValueError, match="'z' has only a stochastic lower bound"),
    ):
        annealed_likelihood(model, guide, torch.randn(4, 5))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_chains": 0}, ValueError, "num_chains must be positive, got 0"),
        ({"num_steps": 0}, ValueError, "num_steps must be positive, got 0"),
        ({"num_leapfrog": 0}, ValueError, "num_leapfrog must be positive, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be positive, got 0"),
        ({"schedule": "cubic"}, ValueError, "schedule must be 'sigmoid', 'linear', 'power' or numbers"),
        ({"schedule": [0.0, 0.5, 0.5, 1.0]}, ValueError, "schedule must rise strictly from 0 to 1"),
        ({"schedule": [0.1, 1.0]}, ValueError, "schedule must rise strictly from 0 to 1"),
        ({"start": "middle"}, ValueError, "start must be 'guide' or 'prior', got 'middle'"),
        ({"guide": None}, ValueError, "guide must be given where chains start from it, got None"),
        ({"x": [1.0]}, TypeError, "x must be a tensor or a split such as data.test, got list"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], error: Any, message: str) -> None:
    given: dict[str, Any] = {"guide": LinearGuide(), "x": torch.randn(4, 5)} | settings
    guide, x = given.pop("guide"), given.pop("x")
    with pytest.raises(error, match=message):
        annealed_likelihood(LinearModel(), guide, x, **given)


def test_a_model_without_latents_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    with pytest.raises(ValueError, match="model must have a latent to be annealed, got none"):
        annealed_likelihood(model, None, torch.randn(4), start="prior")


def test_a_latent_that_x_does_not_hang_on() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    x = torch.randn(4)
    annealed = annealed_likelihood(model, None, x, start="prior", num_steps=3)
    torch.testing.assert_close(annealed.log_prob, dist.Normal(0.0, 1.0).log_prob(x))


def test_it_prints_one_line_and_goes_into_json() -> None:
    data = from_tensors(torch.randn(20, 5), name="noise")
    model, guide = LinearModel().float(), LinearGuide().float()
    annealed = annealed_likelihood(model, guide, data.train, num_chains=40, num_steps=2)
    line = str(annealed)
    assert "\n" not in line
    assert f"log p(x) >= {annealed.mean:.2f} ± {annealed.standard_error:.2f} nats" in line
    assert "AIS, 40 chains of 2 steps from the guide, on 20 data" in line
    assert annealed.protocol is not None
    assert annealed.protocol["hash"] in line
    assert "k-hat > 0.38" in line
    row = json.loads(json.dumps(annealed.to_dict(), allow_nan=False))
    assert row["log_likelihood"] == annealed.mean
    assert (row["num_chains"], row["num_steps"], row["num_leapfrog"]) == (40, 2, 2)
    assert row["per_datum"]["start_log_prob"] == annealed.start_log_prob.tolist()
