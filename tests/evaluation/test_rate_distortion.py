"""Rate and distortion of linear-Gaussian codes, whose curve is known, and what must hold of any."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pvae.data import from_tensors
from pvae.evaluation import annealed_likelihood, rate_distortion
from pvae.evaluation.rate_distortion import _path
from tests.evaluation.programs import Layers
from tests.evaluation.test_annealing import drawn, layers_log_prob
from tests.inference.programs import LinearModel
from tests.oracles import LinearGaussianVAE, QuadratureModel

pytestmark = pytest.mark.usefixtures("float64")


def exact_point(oracle: LinearGaussianVAE, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(q || p) and E_q[-log p(x | z)] for q proportional to p(z) p(x | z)^beta, a normal."""
    weight, bias = oracle.model.weight.detach(), oracle.model.bias.detach()
    variance = oracle.model.scale.detach() ** 2
    z_dim = weight.shape[1]
    covariance = torch.linalg.inv(torch.eye(z_dim) + beta * weight.T @ weight / variance)
    mean = beta * (x - bias) @ weight / variance @ covariance
    rate = 0.5 * (covariance.trace() + mean.square().sum(-1) - z_dim - torch.logdet(covariance))
    squares = (x - bias - mean @ weight.T).square().sum(-1) + (weight @ covariance @ weight.T).trace()
    return rate, 0.5 * (squares / variance + x.shape[1] * torch.log(2 * math.pi * variance))


def test_the_curve_of_a_linear_gaussian_model() -> None:
    oracle = LinearGaussianVAE(x_dim=4, z_dim=2, scale=0.6)
    x = drawn(oracle, 48)
    betas = (0.1, 0.5, 1.0, 2.0)
    found = rate_distortion(oracle.model, x, betas=betas, num_steps=400)
    for beta, rate, distortion in zip(betas, found.rate, found.distortion, strict=True):
        exact_rate, exact_distortion = exact_point(oracle, x, beta)
        for above in (rate - exact_rate, distortion - exact_distortion):
            error = (above.std() / math.sqrt(len(x))).item()
            assert abs(above.mean()) < max(4 * error, 0.02)
        # The sum is -log of the normaliser, estimated from above, with little noise.
        excess = rate + beta * distortion - (exact_rate + beta * exact_distortion)
        assert -3 * excess.std() / math.sqrt(len(x)) < excess.mean() < 0.05 * max(1, beta)


def test_short_runs_lie_above_the_curve() -> None:
    oracle = LinearGaussianVAE(x_dim=4, z_dim=2, scale=0.3)
    x = drawn(oracle, 200)
    found = rate_distortion(oracle.model, x, betas=(0.5, 1.0), num_steps=4, num_chains=2)
    for beta, rate, distortion in zip((0.5, 1.0), found.rate, found.distortion, strict=True):
        exact_rate, exact_distortion = exact_point(oracle, x, beta)
        excess = rate + beta * distortion - (exact_rate + beta * exact_distortion)
        assert excess.mean() > 3 * excess.std() / math.sqrt(len(x))


def test_at_weight_one_the_sum_is_an_annealed_bound() -> None:
    for model, x, exact in (
        (Layers(), torch.randn(32, 3), layers_log_prob),
        (QuadratureModel().model, drawn(QuadratureModel(), 32), QuadratureModel().log_prob),
    ):
        found = rate_distortion(model, x, betas=(0.2, 1.0), num_steps=300)
        shortfall = exact(x) + (found.rate + found.distortion)[-1]
        error = (shortfall.std() / math.sqrt(32)).item()
        assert abs(shortfall.mean()) < max(3 * error, 0.03)
    alone = rate_distortion(model, x, betas=(1.0,), num_steps=12, num_chains=70)
    annealed = annealed_likelihood(
        model, None, x, start="prior", schedule="power", num_steps=12, num_chains=70
    )
    # Another preliminary run, of one place more, and the same chances.
    torch.testing.assert_close(-(alone.rate + alone.distortion)[0], annealed.log_prob, rtol=0.2, atol=1.0)


def test_more_rate_buys_less_distortion() -> None:
    oracle = QuadratureModel()
    found = rate_distortion(oracle.model, drawn(oracle, 32), num_steps=200)
    assert found.betas.tolist() == [0.03, 0.1, 0.3, 1.0, 3.0]
    assert (found.rate.mean(1).diff() > 0).all()
    assert (found.distortion.mean(1).diff() < 0).all()
    assert found.rate.mean(1)[0] > -0.05


def test_places() -> None:
    at, places = _path((0.1, 1.0, 8.0), 16)
    assert places[at].tolist() == [0.1, 1.0, 8.0]
    assert len(places) == 17
    assert (places.diff() > 0).all()
    # Crowded at either end, and as many as there are steps.
    for betas in ((1e-9, 1e-8, 1.0), (1.0, 1.001, 1.002), (0.2, 0.3, 0.4)):
        at, places = _path(betas, 3)
        assert at == [1, 2, 3]
        assert places[1:].tolist() == list(betas)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": ()}, "betas must be positive"),
        ({"betas": (0.0, 1.0)}, "betas must be positive"),
        ({"betas": (1.0, 0.5)}, "betas must rise strictly"),
        ({"betas": (0.5, 1.0), "num_steps": 1}, "num_steps must be at least the number of betas 2, got 1"),
        ({"num_chains": 0}, "num_chains must be positive, got 0"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rate_distortion(LinearModel(), torch.randn(4, 5), **settings)


def test_batches_change_nothing_and_nothing_is_left_behind() -> None:
    model, x = LinearModel().train(), torch.randn(40, 5)
    before = [torch.get_rng_state(), *(p.clone() for p in model.parameters())]
    whole = rate_distortion(model, x, num_steps=8, num_chains=2)
    after = [torch.get_rng_state(), *model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.training
    for other in (
        rate_distortion(model, x, num_steps=8, num_chains=2, batch_size=32),
        rate_distortion(model, x[:7], num_steps=8, num_chains=2),
    ):
        n = other.rate.shape[1]
        torch.testing.assert_close(other.rate, whole.rate[:, :n], rtol=0, atol=1e-9)
        torch.testing.assert_close(other.distortion, whole.distortion[:, :n], rtol=0, atol=1e-9)


def test_it_prints_one_line_and_goes_into_json() -> None:
    data = from_tensors(torch.randn(20, 5), name="noise")
    found = rate_distortion(LinearModel().float(), data.train, betas=(0.5, 1.0), num_steps=4)
    (_, rate, distortion), _ = found.curve
    assert "\n" not in str(found)
    assert f"{rate:.2f} ±" in str(found)
    assert f"buy {distortion:.2f}" in str(found)
    row = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert row["points"][0]["rate"] == rate
    assert row["protocol"]["hash"]
    one = rate_distortion(LinearModel(), torch.randn(1, 5), betas=(1.0,), num_steps=2)
    assert one.to_dict()["points"][0]["rate_error"] is None


def test_every_point_carries_the_evidence_of_its_weights() -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2, scale=0.5)
    x = oracle.model.sample(6)
    fine, coarse = (
        rate_distortion(oracle.model, x, betas=(0.3, 1.0), num_steps=steps, num_chains=40)
        for steps in (200, 2)
    )
    for found in (fine, coarse):
        assert found.ess.shape == found.pareto_k.shape == found.rate.shape
        assert bool(((found.ess >= 1) & (found.ess <= 40 + 1e-9)).all())
    assert bool((fine.ess.mean(1) > coarse.ess.mean(1)).all())
    assert max(coarse.khat_shares) > max(fine.khat_shares)
    assert "more steps" in str(coarse)
    assert coarse.to_dict()["khat_share"] == coarse.khat_shares
    few = rate_distortion(oracle.model, x, betas=(1.0,), num_steps=5, num_chains=4)
    assert few.to_dict()["khat_share"] == [None]
    assert "k-hat" not in str(few)
