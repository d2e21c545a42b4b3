"""Discretised logistic mixture likelihood of images (Salimans et al. 2017, arXiv:1701.05517v1, sec. 2)."""

import math
from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pvae import distributions
from pvae.ops import soft_clamp

from .base import Likelihood

__all__ = ["DiscretizedLogisticMixture"]

# Of the log-scale on pixels scaled to [-1, 1]; the lower end is PixelCNN++'s, who clamp hard.
_LOG_SCALE_RANGE = (-7.0, 5.0)


class DiscretizedLogisticMixture(Likelihood):
    """Exact probabilities of images with a few hundred grey levels.

    See :class:`pvae.distributions.DiscretizedLogisticMixture`. For images with C channels the decoder outputs
    K groups of ``1 + 2 C + C (C - 1) / 2`` planes, 3 K in all for grey and 10 K for RGB. A group holds the
    logit, the means and the log-scales (of pixels scaled to [-1, 1]; log-scales are kept smoothly above -7),
    and the coefficients of the means on the channels before (through tanh).

    Args:
        num_components: Number K of logistics for each pixel.
        levels: Number of grey levels; x has the values ``k / (levels - 1)``.

    Raises:
        ValueError: If a number is too small.
    """

    values = frozenset({"unit"})
    event_dim = 3

    def __init__(self, num_components: int = 10, levels: int = 256) -> None:
        super().__init__()
        if num_components < 1:
            raise ValueError(f"num_components must be positive, got {num_components}")
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.num_components = num_components
        self.levels = levels

    def param_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape ``(3 K, H, W)`` for grey images, ``(10 K, H, W)`` for RGB.

        Raises:
            ValueError: If ``x_shape`` is not ``(C, H, W)``.
        """
        if len(x_shape) != 3:
            raise ValueError(f"DiscretizedLogisticMixture needs images (C, H, W), got {tuple(x_shape)}")
        return (self.num_components * _numbers(x_shape[0]), *x_shape[1:])

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return p(x | z) for ``params`` of shape ``(*batch, *param_shape(x_shape))``.

        Raises:
            ValueError: If no number of channels goes with the shape of ``params``.
        """
        numbers, rest = divmod(params.shape[-3], self.num_components) if params.ndim >= 3 else (0, 0)
        channels = (math.isqrt(8 * numbers + 1) - 3) // 2
        if channels < 1 or rest or _numbers(channels) != numbers:
            raise ValueError(
                f"params must have shape (*batch, {self.num_components} n, H, W), n = 3 for grey and n = 10 "
                f"for RGB images, got {tuple(params.shape)}"
            )
        planes = params.unflatten(-3, (self.num_components, numbers))
        logits = planes[..., 0, :, :]
        loc, log_scale, raw = planes[..., 1:, :, :].split(
            [channels, channels, numbers - 1 - 2 * channels], -3
        )
        # From pixels on [-1, 1] to pixels on [0, 1]: half the scale, around 1/2.
        return distributions.DiscretizedLogisticMixture(
            logits,
            loc=0.5 + 0.5 * loc,
            scale=0.5 * soft_clamp(log_scale, *_LOG_SCALE_RANGE).exp(),
            coefficients=torch.tanh(raw),
            levels=self.levels,
        )

    def _supports(self, x: Tensor) -> Tensor:
        return distributions.LevelGrid(self.levels).check(x)

    def _refusal(self, value: float) -> str:
        return (
            f"DiscretizedLogisticMixture needs x on the grid k/{self.levels - 1} in [0, 1], got values such "
            f"as {value:.6g}: load the data with scale='unit' and without dequantisation, and set levels "
            "to the number of grey levels"
        )


def _numbers(channels: int) -> int:
    """Numbers that one component needs for one pixel: logit, means, log-scales, coefficients."""
    return 1 + 2 * channels + channels * (channels - 1) // 2
