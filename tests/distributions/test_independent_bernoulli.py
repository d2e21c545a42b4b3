"""Independent bits against SciPy, enumeration, and Pyro's own two nested distributions."""

import itertools

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats

from pvae.distributions import IndependentBernoulli
from tests.distributions.tracing import assert_traceable


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_log_prob_equals_scipy(dtype: torch.dtype, spread: float) -> None:
    logits = spread * torch.randn(5, 2, 3, dtype=dtype)
    x = (torch.rand(5, 2, 3) < 0.5).to(dtype)
    each = special.log_expit(np.where(x > 0, 1.0, -1.0) * logits.double().numpy())
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    log_prob = IndependentBernoulli(logits, 2).log_prob(x)
    np.testing.assert_allclose(log_prob.numpy(), each.sum((1, 2)), rtol=tolerance, atol=tolerance)


def test_masses_of_all_images_sum_to_one() -> None:
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64).view(16, 2, 2)
    d = IndependentBernoulli(torch.randn(2, 2, dtype=torch.float64), 2)
    masses = d.log_prob(x).exp()
    assert masses.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close((masses[:, None, None] * x).sum(0), d.mean)
    entropy = -(masses * masses.log()).sum()
    torch.testing.assert_close(d.entropy(), entropy)
    torch.testing.assert_close(d.variance, d.mean * (1 - d.mean))


def test_samples_follow_the_masses() -> None:
    torch.manual_seed(0)
    d = IndependentBernoulli(torch.tensor([-1.0, 0.3, 2.0]), 1)
    x = d.sample(torch.Size([40_000]))
    code = (x @ torch.tensor([4.0, 2.0, 1.0])).long()
    values = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    expected = 40_000 * d.log_prob(values).double().exp()
    observed = np.bincount(code.numpy(), minlength=8)
    assert stats.chisquare(observed, (expected / expected.sum() * 40_000).numpy()).pvalue > 1e-3


def test_shapes_broadcast_and_expand_without_a_copy() -> None:
    logits = torch.randn(4, 1, 5, 2, 3)
    d = IndependentBernoulli(logits, 2)
    assert (d.batch_shape, d.event_shape, d.event_dim) == ((4, 1, 5), (2, 3), 2)
    wide = d.expand((4, 6, 5))
    assert wide.logits.data_ptr() == logits.data_ptr()
    assert wide.sample((7,)).shape == (7, 4, 6, 5, 2, 3)
    x = torch.ones(5, 2, 3)
    assert d.log_prob(x).shape == (4, 1, 5)
    torch.testing.assert_close(wide.log_prob(x), d.log_prob(x).expand(4, 6, 5))


def test_value_and_gradient_equal_those_of_nested_distributions() -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    x = (torch.rand(4, 7) < 0.5).double()
    nested = dist.Bernoulli(logits=logits).to_event(1).log_prob(x)
    ours = IndependentBernoulli(logits, 1).log_prob(x)
    torch.testing.assert_close(ours, nested, rtol=1e-13, atol=1e-13)
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (ours, nested)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("logits_shape", "shape"), [((9, 7, 4, 4), (7, 4, 4)), ((7, 4, 4), (9, 7, 4, 4))])
def test_without_gradients_it_is_the_same_to_the_bit(
    dtype: torch.dtype, logits_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    d = IndependentBernoulli(30 * torch.randn(logits_shape, dtype=dtype), 2)
    x = (torch.rand(shape) < 0.5).to(dtype)
    with torch.no_grad():
        found = d.log_prob(x)
    assert torch.equal(found, d.log_prob(x))


def test_it_is_traceable() -> None:
    def log_prob(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return IndependentBernoulli(logits, 1).log_prob(x)

    first, other = (
        (torch.randn(4, 7, requires_grad=True), (torch.rand(4, 7) < 0.5).float()) for _ in range(2)
    )
    assert_traceable(log_prob, first, other)


def test_what_it_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"event_dim must lie in 1 \.\.\. 2, got 3"):
        IndependentBernoulli(torch.zeros(4, 7), 3)
    with pytest.raises(ValueError, match="event_dim must lie in"):
        IndependentBernoulli(torch.zeros(4, 7), 0)
    with pytest.raises(ValueError, match="support"):
        IndependentBernoulli(torch.zeros(4, 7), 1, validate_args=True).log_prob(torch.full((4, 7), 0.5))
    with pytest.raises(ValueError, match="logits"):
        IndependentBernoulli(torch.full((4,), torch.nan), 1, validate_args=True)
