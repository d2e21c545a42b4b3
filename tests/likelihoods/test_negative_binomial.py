"""Negative binomial likelihood: mean and dispersion as the decoder gives them; refusals."""

import numpy as np
import pytest
import torch
from scipy import stats

from pvae.likelihoods import NegativeBinomial


def scipy_log_prob(x: np.ndarray, mean: np.ndarray, r: np.ndarray | float) -> np.ndarray:
    return stats.nbinom.logpmf(x, r, r / (r + mean))


def test_shared_dispersion_equals_scipy() -> None:
    likelihood = NegativeBinomial().double()
    with torch.no_grad():
        likelihood.log_total_count.fill_(0.7)
    log_mean = torch.randn(5, 4, dtype=torch.float64)
    x = torch.poisson(torch.full((5, 4), 3.0, dtype=torch.float64))
    expected = scipy_log_prob(x.numpy(), np.exp(log_mean.numpy()), np.exp(0.7)).sum(-1)
    p = likelihood(log_mean)
    np.testing.assert_allclose(p.log_prob(x).detach().numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(p.mean.detach().numpy(), np.exp(log_mean.numpy()), rtol=1e-4)


def test_predicted_dispersion_equals_scipy() -> None:
    # Two channels: log-means are planes 0 and 1, log-dispersions planes 2 and 3.
    params = torch.randn(5, 4, 2, 3, dtype=torch.float64)
    x = torch.poisson(torch.full((5, 2, 2, 3), 3.0, dtype=torch.float64))
    mean, r = np.exp(params.numpy()[:, :2]), np.exp(params.numpy()[:, 2:])
    expected = scipy_log_prob(x.numpy(), mean, r).sum((1, 2, 3))
    p = NegativeBinomial("predicted")(params)
    np.testing.assert_allclose(p.log_prob(x).numpy(), expected, atol=1e-3)
    np.testing.assert_allclose(p.mean.numpy(), mean, rtol=1e-4)


def test_other_values_are_refused() -> None:
    NegativeBinomial().check(torch.tensor([[0.0, 1.0, 255.0]]))
    with pytest.raises(ValueError, match=r"needs x in {0, 1, 2, \.\.\.}, got values such as 0\.373"):
        NegativeBinomial().check(torch.tensor([[0.0, 0.373]]))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dispersion must be 'shared' or 'predicted', got 'gene'"):
        NegativeBinomial("gene")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"params must hold 2 numbers for each entry of x .* got shape \(2, 11\)"
    ):
        NegativeBinomial("predicted")(torch.zeros(2, 11))
