"""Figures of a Jacobian posterior against the linear case, whose figures are known."""

import json
import math
import warnings
from typing import Any

import pytest
import torch

from pvae.data import from_tensors
from pvae.evaluation import JacobianReport, jacobian_report
from pvae.guides import FiveGuide, NormalGuide
from pvae.nn import MLPEncoder
from tests.guides.five import data, linear_pair, single, small

pytestmark = pytest.mark.usefixtures("float64")


def at_the_mode(w: torch.Tensor, sigma: float, stretch: float = 1.0) -> tuple[FiveGuide, torch.Tensor]:
    covariance = torch.linalg.inv(torch.eye(w.shape[1]) + w.T @ w / sigma**2)
    guide = FiveGuide(*linear_pair(stretch * covariance @ w.T / sigma**2, w, sigma, "fixed"))
    return guide, covariance


def test_figures_at_the_mode_of_a_linear_model() -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 3)
    guide, covariance = at_the_mode(w, 0.1)
    x = torch.randn(500, 3) @ w.T + 0.1 * torch.randn(500, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = jacobian_report(guide, x, num_data=500)
    assert report.health == pytest.approx(1 - covariance.trace().item() / 3, rel=1e-6)
    assert report.inconsistency == pytest.approx(0, abs=1e-6)
    assert report.half_log_det == pytest.approx(
        0.5 * torch.logdet(covariance - covariance @ covariance).item()
    )
    assert report.residual == pytest.approx(5 / 8, rel=0.1)
    assert (report.active, report.z_dim, report.num_data) == (3, 3, 500)
    assert report.problems == ()
    assert "3 of 3 latents active" in str(report)
    assert f"half log det {report.half_log_det:.2f} (in the loss" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["problems"] == []


def test_each_problem_is_told_with_its_figure() -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 3)
    w[:, 2] = 1e-3
    guide, _ = at_the_mode(w, 0.1, stretch=0.5)
    x = torch.randn(50, 3) @ w.T + 0.1 * torch.randn(50, 8)
    with pytest.warns(RuntimeWarning) as said:
        report = jacobian_report(guide, x)
    assert isinstance(report, JacobianReport)
    assert [str(w.message) for w in said] == list(report.problems)
    assert report.problems[0].startswith(f"tr(J G) / d is {report.health:.2f} < 0.8")
    assert report.problems[1].startswith(f"J G differs from I - Sigma_L by {report.inconsistency:.2f} > 0.3")
    assert report.problems[3].startswith("1 of 3 latents are not active")
    assert report.problems[2].startswith(f"squared residuals are {report.residual:.2f} > 2.0")


def test_figures_of_a_curved_model_are_those_of_autograd() -> None:
    model, guide = small(channels=1)
    model.likelihood.log_sigma.data += 0.3
    x, scale = data(3), torch.tensor([0.5, 2.0])
    report = jacobian_report(guide, x, prior_scale=scale, warn=False)
    sigma, found = float(model.likelihood.sigma.detach()), []
    for each in x:
        z = guide.location(each)
        j = torch.autograd.functional.jacobian(guide.location, each).reshape(2, 6)
        g = torch.autograd.functional.jacobian(guide.reconstruction, z).reshape(6, 2)
        laplace = torch.linalg.inv(torch.diag(scale**-2) + g.T @ g / sigma**2) / scale.outer(scale)
        product = torch.diag(1 / scale) @ j @ g @ torch.diag(scale)
        found.append(
            torch.stack(
                [
                    product.trace() / 2,
                    0.5 * torch.logdet(sigma**2 * j @ j.T),
                    (product - torch.eye(2) + laplace).norm() / math.sqrt(2),
                    ((each - guide.reconstruction(z)) / sigma).square().mean(),
                ]
            ).detach()
        )
    ours = (report.health, report.half_log_det, report.inconsistency, report.residual)
    assert torch.stack(found).mean(0).tolist() == pytest.approx(ours)


def test_a_prior_of_another_scale_is_the_same_model_in_other_units() -> None:
    torch.manual_seed(0)
    w, sigma, scale = torch.randn(8, 3), 0.3, torch.tensor([0.1, 2.0, 30.0])
    covariance = torch.linalg.inv(torch.diag(scale**-2) + w.T @ w / sigma**2)
    guide = FiveGuide(*linear_pair(covariance @ w.T / sigma**2, w, sigma, "fixed"))
    x = torch.randn(50, 3) * scale @ w.T + sigma * torch.randn(50, 8)
    report = jacobian_report(guide, x, prior_scale=scale, warn=False)
    posterior = covariance / scale.outer(scale)
    assert report.inconsistency == pytest.approx(0, abs=1e-9)
    assert report.health == pytest.approx(1 - posterior.trace().item() / 3)
    assert report.active == int((torch.linalg.eigvalsh(posterior) < 0.9).sum())
    own_units = guide.posterior(x[:1]).exact().covariance_matrix[0]
    assert report.half_log_det == pytest.approx(0.5 * torch.logdet(own_units).item())


def test_the_value_in_the_loss_is_that_of_an_isotropic_normal() -> None:
    # Two latents: the mean of log(a v1^2 + b v2^2) is known, 2 log((sqrt a + sqrt b) / 2) + log 2 - gamma.
    a = torch.tensor([[0.3, 0.0, 0.0, 0.0], [0.0, 0.02, 0.0, 0.0]])
    sigma, x = 0.5, torch.randn(40, 4)
    choices: list[dict[str, Any]] = [{}, {"probe": "data"}]
    for options in choices:
        guide = FiveGuide(*linear_pair(a, a.T, sigma, "fixed"), **options)
        report = jacobian_report(guide, x, warn=False)
        assert report.half_log_det == pytest.approx(math.log(0.3 * 0.02 * sigma**2))
        wanted = 2 * math.log(0.16 * sigma)
        assert report.half_log_det_surrogate == pytest.approx(wanted, abs=4 * 1.3 / math.sqrt(280))
    exact: list[dict[str, Any]] = [{"logdet": "exact"}, {"logdet": "pinv"}]
    for options in exact:
        report = jacobian_report(FiveGuide(*linear_pair(a, a.T, sigma, "fixed"), **options), x, warn=False)
        assert report.half_log_det_surrogate == pytest.approx(report.half_log_det)


def test_the_value_in_the_loss_of_a_free_form_flow_is_the_trace() -> None:
    a = torch.tensor([[0.3, 0.0, 0.0, 0.0], [0.0, 0.02, 0.0, 0.0]])
    parts = linear_pair(a, 2 * a.T, 0.5, "fixed")
    guide = FiveGuide(*parts, objective="fif", directions="rademacher")
    report = jacobian_report(guide, torch.randn(5, 4), warn=False)
    assert report.half_log_det_surrogate == pytest.approx(2 * math.log(0.5) + 2 * (0.3**2 + 0.02**2))
    assert report.half_log_det == pytest.approx(math.log(0.3 * 0.02 * 0.5**2))


def test_nothing_is_active_where_nothing_is_finite() -> None:
    _, guide = small()
    next(guide.encoder.parameters()).data.fill_(math.nan)
    report = jacobian_report(guide, data(), warn=False)
    assert (report.active, math.isnan(report.health)) == (0, True)
    assert len(report.problems) == 4


def test_only_the_data_looked_at_are_taken_from_a_split() -> None:
    x = torch.rand(30, 1, 2, 3)
    split = from_tensors(x, y=torch.arange(30) % 3).train
    guide = single()[1]
    report = jacobian_report(guide, split, num_data=4, warn=False)
    assert report == jacobian_report(guide, x[:4].float(), warn=False)


def test_the_guide_is_left_as_it_was() -> None:
    _, guide = small()
    state = torch.get_rng_state()
    report = jacobian_report(guide, data(9), num_data=4, warn=False)
    assert report.num_data == 4
    assert guide.training
    assert torch.equal(torch.get_rng_state(), state)


def test_what_has_no_such_posterior_is_refused() -> None:
    normal: Any = NormalGuide(MLPEncoder((1, 2, 3), 2))
    with pytest.raises(TypeError, match=r"guide must have a method posterior.*got NormalGuide"):
        jacobian_report(normal, data())
    with pytest.raises(ValueError, match="num_data must be positive, got 0"):
        jacobian_report(small()[1], data(), num_data=0)
