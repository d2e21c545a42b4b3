"""Normal likelihood against SciPy; what a learned sigma does."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pvae.likelihoods import Normal

IMAGE = (3, 2, 4)


def test_fixed_sigma_equals_scipy() -> None:
    mean, x = torch.randn(2, 5, *IMAGE, dtype=torch.float64).unbind()
    log_prob = Normal(value=0.25).double()(mean).log_prob(x)
    expected = stats.norm.logpdf(x.numpy(), mean.numpy(), 0.25).sum((1, 2, 3))
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=1e-13)


def test_unit_sigma_is_half_the_squared_error() -> None:
    mean, x = torch.randn(2, 5, 6, dtype=torch.float64).unbind()
    expected = -0.5 * (x - mean).square().sum(-1) - 3 * math.log(2 * math.pi)
    torch.testing.assert_close(Normal()(mean).log_prob(x), expected, rtol=0, atol=1e-12)


def test_sigma_per_channel_equals_scipy() -> None:
    likelihood = Normal("learned", value=0.3, channels=3).double()
    with torch.no_grad():
        likelihood.log_sigma.copy_(torch.tensor([-1.0, 0.0, 0.75]))
    sigma = 1e-3 + np.exp([-1.0, 0.0, 0.75])
    mean, x = torch.randn(2, 5, *IMAGE, dtype=torch.float64).unbind()
    expected = stats.norm.logpdf(x.numpy(), mean.numpy(), sigma[:, None, None]).sum((1, 2, 3))
    np.testing.assert_allclose(likelihood(mean).log_prob(x).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("channels", [None, 3])
def test_learned_sigma_starts_at_its_value(channels: int | None) -> None:
    likelihood = Normal("learned", value=0.2, channels=channels)
    assert likelihood.sigma.shape == (() if channels is None else (3,))
    torch.testing.assert_close(likelihood.sigma.detach(), torch.full_like(likelihood.sigma, 0.2))


def test_fixed_sigma_is_no_parameter_but_is_saved() -> None:
    likelihood = Normal(value=0.4)
    assert list(likelihood.parameters()) == []
    other = Normal(value=1.0)
    other.load_state_dict(likelihood.state_dict())
    assert other.sigma.item() == pytest.approx(0.4)


def test_gradient_of_sigma_vanishes_at_the_root_mean_square_error() -> None:
    mean, x = torch.randn(2, 5, 6, dtype=torch.float64).unbind()
    best = (x - mean).square().mean().sqrt().item()

    def gradient(value: float) -> float:
        likelihood = Normal("learned", value=value).double()
        # The start is held in double precision here.
        likelihood.log_sigma.data.fill_(math.log(value - likelihood.floor))
        (g,) = torch.autograd.grad(likelihood(mean).log_prob(x).sum(), likelihood.log_sigma)
        return g.item()

    assert gradient(best) == pytest.approx(0.0, abs=1e-10)
    assert gradient(0.9 * best) > 1
    assert gradient(1.1 * best) < -1


def test_learned_sigma_stays_above_its_floor_smoothly() -> None:
    likelihood = Normal("learned", floor=0.05)
    with torch.no_grad():
        likelihood.log_sigma.fill_(-10.0)
    assert likelihood.sigma.item() == pytest.approx(0.05, abs=1e-4)
    (gradient,) = torch.autograd.grad(likelihood.sigma, likelihood.log_sigma)
    assert gradient > 0


def test_channels_must_agree() -> None:
    likelihood = Normal("learned", channels=3)
    message = r"x_shape must begin with channels = 3, got \(1, 2, 4\)"
    with pytest.raises(ValueError, match=message):
        likelihood.param_shape((1, 2, 4))
    with pytest.raises(ValueError, match=message):
        likelihood(torch.zeros(5, 1, 2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": "batch"}, "sigma must be 'fixed' or 'learned', got 'batch'"),
        ({"value": 0.0}, "value must be above 0 and floor at least 0, got 0 and 0.001"),
        (
            {"sigma": "learned", "value": 1e-3},
            "value must be above 0.001 and floor at least 0, got 0.001 and 0.001",
        ),
        ({"floor": -1.0}, "value must be above 0 and floor at least 0, got 1 and -1"),
        ({"value": math.nan}, "value must be above 0 and floor at least 0, got nan and 0.001"),
        ({"channels": 3}, "channels must be positive, and None for a fixed sigma, got 3"),
        ({"sigma": "learned", "channels": 0}, "channels must be positive, and None for a fixed sigma, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normal(**arguments)  # type: ignore[arg-type]
