"""The decoder's planes against PixelCNN++'s parametrisation; refusals."""

import numpy as np
import pytest
import torch
from scipy import special

from pvae.likelihoods import DiscretizedLogisticMixture


@pytest.mark.parametrize(("channels", "planes"), [(1, 3), (2, 6), (3, 10), (4, 15)])
def test_channels_are_read_off_the_number_of_planes(channels: int, planes: int) -> None:
    likelihood = DiscretizedLogisticMixture(5, levels=8)
    assert likelihood.param_shape((channels, 2, 3)) == (5 * planes, 2, 3)
    assert likelihood(torch.randn(4, 5 * planes, 2, 3)).event_shape == (channels, 2, 3)


def test_log_prob_equals_pixelcnn() -> None:
    """Means, log-scales and tanh coefficients as PixelCNN++ has them, on pixels in [-1, 1]."""
    likelihood = DiscretizedLogisticMixture(2, levels=256)
    params = torch.randn(4, 20, 2, 2, dtype=torch.float64)
    x = (torch.rand(4, 3, 2, 2, dtype=torch.float64) * 255).round() / 255
    group = params.numpy().reshape(4, 2, 10, 2, 2)
    y = 2 * x.numpy() - 1
    mean, log_scale, a = group[:, :, 1:4].copy(), group[:, :, 4:7], np.tanh(group[:, :, 7:10])
    mean[:, :, 1] += a[:, :, 0] * y[:, None, 0]
    mean[:, :, 2] += a[:, :, 1] * y[:, None, 0] + a[:, :, 2] * y[:, None, 1]
    centre = np.broadcast_to(y[:, None], mean.shape)
    upper = np.where(centre > 0.9999, 1.0, special.expit((centre + 1 / 255 - mean) * np.exp(-log_scale)))
    lower = np.where(centre < -0.9999, 0.0, special.expit((centre - 1 / 255 - mean) * np.exp(-log_scale)))
    terms = np.log(upper - lower).sum(2) + special.log_softmax(group[:, :, 0], axis=1)
    expected = special.logsumexp(terms, axis=1).sum((1, 2))
    # Log-scales of a few units are squeezed by up to exp(-2) on the side of +5.
    log_prob = likelihood(params).log_prob(x)
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=5e-3)


def test_log_scale_has_a_smooth_floor() -> None:
    likelihood = DiscretizedLogisticMixture(1, levels=256)
    params = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    params[0, 2] = -30.0
    scale = likelihood(params).scale.item()
    assert scale == pytest.approx(0.5 * np.exp(-7.0), rel=1e-4)


def test_data_off_the_grid_are_refused() -> None:
    likelihood = DiscretizedLogisticMixture(levels=256)
    likelihood.check(torch.arange(256).reshape(1, 1, 16, 16) / 255)
    with pytest.raises(
        ValueError, match=r"on the grid k/255 in \[0, 1\], got values such as 0\.5012: .*levels"
    ):
        likelihood.check(torch.full((1, 1, 2, 2), 0.5012))
    with pytest.raises(ValueError, match="got values such as 17"):
        likelihood.check(torch.full((1, 1, 2, 2), 17.0))
    DiscretizedLogisticMixture(levels=17).check(torch.arange(17).reshape(1, 1, 17, 1) / 16)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_components must be positive, got 0"):
        DiscretizedLogisticMixture(0)
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        DiscretizedLogisticMixture(levels=1)
    with pytest.raises(ValueError, match=r"needs images \(C, H, W\), got \(64,\)"):
        DiscretizedLogisticMixture().param_shape((64,))


@pytest.mark.parametrize("shape", [(4, 9, 2, 2), (4, 8, 2, 2), (4, 2, 2, 2), (4, 0, 2, 2), (2, 2)])
def test_bad_params(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"params must have shape \(\*batch, 2 n, H, W\), n = 3 for grey"):
        DiscretizedLogisticMixture(2)(torch.zeros(shape))
