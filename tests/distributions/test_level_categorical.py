"""Levels as numbers: draws, moments, and Pyro's own density."""

import copy

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats

from pvae.distributions import LevelCategorical
from tests.distributions.tracing import assert_traceable, host_syncs


def test_log_prob_equals_scipy() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64)
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 2.0], dtype=torch.float64)
    expected = special.log_softmax(logits.numpy(), -1)[np.arange(6), x.long().numpy()]
    np.testing.assert_allclose(LevelCategorical(logits=logits).log_prob(x).numpy(), expected, atol=1e-14)


def test_moments_are_sums_over_levels() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64)
    d = LevelCategorical(logits=logits)
    weights, levels = special.softmax(logits.numpy(), -1), np.arange(7)
    np.testing.assert_allclose(d.mean.numpy(), weights @ levels, atol=1e-13)
    np.testing.assert_allclose(d.variance.numpy(), weights @ levels**2 - (weights @ levels) ** 2, atol=1e-12)


def test_samples_follow_the_masses_as_floats() -> None:
    logits = torch.randn(2, 4)
    x = LevelCategorical(logits=logits).sample(torch.Size([10000]))
    assert x.dtype == torch.float32
    for d in range(2):
        count = np.bincount(x[:, d].long().numpy(), minlength=4)
        assert stats.chisquare(count, 10000 * special.softmax(logits[d].double().numpy())).pvalue > 1e-3


def test_shapes_and_expand() -> None:
    d = LevelCategorical(logits=torch.randn(3, 5))
    wide = d.expand(torch.Size([2, 3]))
    assert isinstance(wide, LevelCategorical)
    assert wide.sample(torch.Size([4])).shape == (4, 2, 3)
    assert wide.mean.shape == wide.variance.shape == (2, 3)
    assert d.to_event(1).mean.shape == (3,)


def test_traceable() -> None:
    inputs = [(torch.randn(4, 3, 5), torch.randint(5, (4, 3)).float()) for _ in range(2)]
    inputs[0][0].requires_grad_()
    assert_traceable(lambda logits, x: LevelCategorical(logits=logits).to_event(1).log_prob(x), *inputs)
    d = LevelCategorical(logits=torch.randn(3, 5), validate_args=False)
    assert host_syncs(lambda: (d.sample(), d.mean, d.variance)) == []


def test_deepcopy_and_kind() -> None:
    d = LevelCategorical(logits=torch.randn(3, 5))
    assert torch.equal(copy.deepcopy(d).mean, d.mean)
    assert isinstance(d, dist.Categorical)


def test_validation() -> None:
    d = LevelCategorical(logits=torch.zeros(3), validate_args=True)
    for value in (0.5, 3.0, -1.0):
        with pytest.raises(ValueError, match="support"):
            d.log_prob(torch.tensor(value))
