"""Continuous Bernoulli likelihood: one density for each pixel, summed; its refusals."""

import math

import pytest
import torch
from scipy import integrate

from pvae.likelihoods import ContinuousBernoulli


def test_log_prob_equals_quadrature() -> None:
    eta = [-4.0, 0.0, 1e-4, 9.0]
    x = [0.1, 0.6, 0.9, 1.0]
    expected = sum(
        e * v - math.log(integrate.quad(lambda t, e=e: math.exp(e * t), 0, 1, epsrel=1e-12)[0])
        for e, v in zip(eta, x, strict=True)
    )
    params = torch.tensor(eta, dtype=torch.float64).reshape(1, 1, 2, 2)
    data = torch.tensor(x, dtype=torch.float64).reshape(1, 1, 2, 2)
    assert ContinuousBernoulli()(params).log_prob(data).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("value", [-0.01, 1.004, 16.0])
def test_values_outside_the_unit_interval_are_refused(value: float) -> None:
    ContinuousBernoulli().check(torch.tensor([[0.0, 0.373, 1.0]]))
    with pytest.raises(
        ValueError, match=rf"needs x in \[0, 1\], got values such as {value:.3g}: .* scale='unit'"
    ):
        ContinuousBernoulli().check(torch.tensor([[0.5, value]]))
