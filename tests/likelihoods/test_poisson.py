"""Poisson likelihood against SciPy, within the range of its rates; refusals."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pvae.likelihoods import Poisson


def test_log_prob_equals_scipy() -> None:
    log_rate = torch.randn(5, 4, dtype=torch.float64)
    x = torch.poisson(torch.full((5, 4), 3.0, dtype=torch.float64))
    expected = stats.poisson.logpmf(x.numpy(), np.exp(log_rate.numpy())).sum(-1)
    np.testing.assert_allclose(Poisson()(log_rate).log_prob(x).numpy(), expected, atol=1e-3)
    # Exactly, at the rates that the squeeze gives.
    p = Poisson()(log_rate)
    expected = stats.poisson.logpmf(x.numpy(), p.mean.numpy()).sum(-1)
    np.testing.assert_allclose(p.log_prob(x).numpy(), expected, atol=1e-12)


def test_mean_is_the_exponential_within_the_range() -> None:
    log_rate = torch.tensor([[-5.0, 0.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(Poisson()(log_rate).mean, log_rate.exp(), rtol=1e-4, atol=0)
    huge = Poisson()(torch.tensor([[1e3]])).mean.item()
    assert huge == pytest.approx(math.exp(15.0), rel=1e-4)


@pytest.mark.parametrize("value", [-1.0, 0.373])
def test_other_values_are_refused(value: float) -> None:
    Poisson().check(torch.tensor([[0.0, 1.0, 255.0]]))
    with pytest.raises(
        ValueError, match=rf"needs x in {{0, 1, 2, \.\.\.}}, got values such as {value:.3g}: .*scale='count'"
    ):
        Poisson().check(torch.tensor([[0.0, value]]))
