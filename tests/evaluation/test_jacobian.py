"""Figures of a Jacobian posterior against the linear case, whose figures are known."""

import json
import warnings
from typing import Any

import pytest
import torch

from pvae.evaluation import JacobianReport, jacobian_report
from pvae.guides import FiveGuide, NormalGuide
from pvae.nn import MLPEncoder
from tests.guides.five import data, linear_pair, small

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
