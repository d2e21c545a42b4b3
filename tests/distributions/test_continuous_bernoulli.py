"""Continuous Bernoulli against quadrature, at every size of logit and in both precisions."""

import copy
import math

import numpy as np
import pyro
import pytest
import torch
from scipy import integrate, stats

from pvae.distributions import ContinuousBernoulli
from tests.distributions.tracing import assert_traceable, host_syncs

LOGITS = [
    -700.0,
    -60.0,
    -17.0,
    -3.0,
    -1.001,
    -0.999,
    -0.1,
    -1e-3,
    -1e-8,
    0.0,
    1e-6,
    0.02,
    0.999,
    1.001,
    5.0,
    40.0,
]


def normaliser(eta: float) -> float:
    """Log of the integral of exp(eta (x - 1)) for eta > 0, of exp(eta x) otherwise."""
    shift = 1.0 if eta > 0 else 0.0
    # The mass sits within 1 / |eta| of one end: tell the rule where.
    near = abs(eta) > 1 and [shift - math.copysign(min(0.5, 5 / abs(eta)), eta)]
    value, _ = integrate.quad(
        lambda x: math.exp(eta * (x - shift)), 0, 1, epsabs=0, epsrel=1e-12, points=near or None
    )
    return math.log(value)


@pytest.mark.parametrize("eta", LOGITS)
def test_log_prob_equals_quadrature(eta: float) -> None:
    x = np.array([0.0, 1e-3, 0.3, 0.5, 0.77, 1.0])
    expected = eta * (x - (1.0 if eta > 0 else 0.0)) - normaliser(eta)
    log_prob = ContinuousBernoulli(torch.tensor(eta, dtype=torch.float64)).log_prob(torch.from_numpy(x))
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", LOGITS)
def test_mean_equals_quadrature(eta: float) -> None:
    shift = 1.0 if eta > 0 else 0.0
    near = abs(eta) > 1 and [shift - math.copysign(min(0.5, 5 / abs(eta)), eta)]
    scale = math.exp(-normaliser(eta))
    expected, _ = integrate.quad(
        lambda x: x * math.exp(eta * (x - shift)) * scale, 0, 1, epsrel=1e-12, points=near or None
    )
    mean = ContinuousBernoulli(torch.tensor(eta, dtype=torch.float64)).mean.item()
    assert mean == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_single_precision_is_right_everywhere() -> None:
    grid = torch.logspace(-9, 3, 2001, dtype=torch.float64)
    eta = torch.cat([-grid, grid]).float()
    x = torch.rand(len(eta))
    single, double = ContinuousBernoulli(eta), ContinuousBernoulli(eta.double())
    error = (single.log_prob(x).double() - double.log_prob(x.double())).abs()
    # A few roundings of the larger of the terms, eta / 2.
    assert (error <= 3e-7 * (1 + eta.abs())).all()
    assert (single.mean.double() - double.mean).abs().max() < 5e-7


def test_gradient_of_log_prob_is_x_minus_the_mean() -> None:
    eta = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(0, 1, len(LOGITS), dtype=torch.float64)
    density = ContinuousBernoulli(eta)
    (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), eta)
    torch.testing.assert_close(gradient, (x - density.mean).detach(), rtol=0, atol=1e-12)


def test_gradient_is_finite_for_huge_logits_in_single_precision() -> None:
    eta = torch.tensor([-1e30, -1e4, 1e4, 1e30], requires_grad=True)
    (gradient,) = torch.autograd.grad(ContinuousBernoulli(eta).log_prob(torch.tensor(0.5)).sum(), eta)
    torch.testing.assert_close(gradient, torch.tensor([0.5, 0.5, -0.5, -0.5]), rtol=0, atol=1e-3)


def test_second_derivative() -> None:
    eta = torch.tensor([-3.0, -1.0001, -0.9999, 0.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    x = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e, t: ContinuousBernoulli(e).log_prob(t), (eta, x))
    assert torch.autograd.gradgradcheck(lambda e: ContinuousBernoulli(e).log_prob(x.detach()), (eta,))
    assert torch.autograd.gradcheck(lambda e: ContinuousBernoulli(e).mean, (eta,))


@pytest.mark.parametrize("eta", [-1e3, -30.0, -2.0, -1e-3, 0.0, 1e-9, 0.7, 12.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_follow_the_density(eta: float, dtype: torch.dtype) -> None:
    x = ContinuousBernoulli(torch.tensor(eta, dtype=dtype)).sample(torch.Size([4000])).double().numpy()
    assert ((x >= 0) & (x <= 1)).all()
    # Distribution function of the truncated exponential, from the end where the mass is.
    sign = -1.0 if eta > 0 else 1.0
    rate = max(abs(eta), 1e-12)
    law = stats.truncexpon(b=rate, scale=1 / rate)
    assert stats.kstest(x if sign > 0 else 1 - x, law.cdf).pvalue > 1e-3


def test_shapes_and_expand() -> None:
    density = ContinuousBernoulli(torch.randn(3, 1))
    wide = density.expand(torch.Size([2, 3, 4]))
    assert isinstance(wide, ContinuousBernoulli)
    assert wide.sample(torch.Size([5])).shape == (5, 2, 3, 4)
    assert wide.mean.shape == (2, 3, 4)
    x = torch.rand(2, 3, 4)
    torch.testing.assert_close(wide.log_prob(x), density.log_prob(x))
    assert density.to_event(2).log_prob(torch.rand(7, 3, 1)).shape == (7,)


def test_traceable() -> None:
    inputs = [(torch.randn(4, 3), torch.rand(4, 3)) for _ in range(2)]
    inputs[0][0].requires_grad_()
    assert_traceable(lambda e, x: ContinuousBernoulli(e).to_event(1).log_prob(x), *inputs)
    density = ContinuousBernoulli(torch.randn(3), validate_args=False)
    assert host_syncs(lambda: (density.sample(), density.mean)) == []


def test_deepcopy() -> None:
    density = ContinuousBernoulli(torch.randn(3))
    assert torch.equal(copy.deepcopy(density).mean, density.mean)


def test_validation() -> None:
    with pyro.validation_enabled(True):
        with pytest.raises(ValueError, match="logits"):
            ContinuousBernoulli(torch.tensor(math.nan))
        with pytest.raises(ValueError, match="support"):
            ContinuousBernoulli(torch.zeros(())).log_prob(torch.tensor(1.5))
