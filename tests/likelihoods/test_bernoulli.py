"""Bernoulli likelihood against SciPy; its refusals."""

import re

import numpy as np
import pytest
import torch
from scipy import special, stats

from pvae.likelihoods import Bernoulli


def test_log_prob_equals_scipy() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    x = torch.rand(6, 4, dtype=torch.float64).round()
    expected = stats.bernoulli.logpmf(x.numpy(), special.expit(logits.numpy())).sum(-1)
    np.testing.assert_allclose(Bernoulli()(logits).log_prob(x).numpy(), expected, atol=1e-13)


def test_mean_is_the_probability() -> None:
    logits = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    np.testing.assert_allclose(Bernoulli()(logits).mean.numpy(), special.expit(logits.numpy()), atol=1e-15)


def test_grey_values_are_refused_with_the_choices() -> None:
    x = torch.zeros(2, 1, 2, 2)
    Bernoulli().check(x)
    x[1, 0, 1, 0] = 0.373
    message = (
        "Bernoulli needs x in {0, 1}, got grey values such as 0.373: load the data with binarize='dynamic', "
        "'static' or 'threshold', or use ContinuousBernoulli, Normal or DiscretizedLogisticMixture"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Bernoulli().check(x)


def test_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got values such as 16: load the data with binarize='dynamic'"):
        Bernoulli().check(torch.tensor([[0.0, 16.0]]))
