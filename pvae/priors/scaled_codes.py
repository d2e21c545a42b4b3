r"""Draws from a prior with its spread scaled, for generation (X-VAE, arXiv:2607.01275v1, abstract)."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from torch import Tensor

__all__ = ["ScaleMode", "ScaledCodes"]

ScaleMode = Literal["within", "global"]


class ScaledCodes:
    r"""A sampler that spreads draws of a prior more or less widely than the prior does.

    With a draw :math:`z = c + e`, its component's mean and the deviation from it, and
    :math:`\bar m` the prior's mean,

    .. math:: z_f = c + f e \quad (\text{within}), \qquad z_f = \bar m + f (z - \bar m) \quad (\text{global})

    so f multiplies standard deviations. The same seed gives the same c and e for every f; f = 0 gives exactly
    a component's mean, or the prior's. Not a density: f never enters training or a likelihood.

    Args:
        parts: Draws c and e for a sample shape, each ``(*sample_shape, z_dim)``.
        mean: Mean of the prior, shape ``(z_dim,)``.
        scale: The factor f, not negative.
        mode: Which of the two.

    Raises:
        ValueError: If ``scale`` is negative or not finite, or ``mode`` is unknown.
    """

    def __init__(
        self,
        parts: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
        mean: Tensor,
        scale: float,
        mode: ScaleMode = "within",
    ) -> None:
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale must be finite and not negative, got {scale}")
        if mode not in get_args(ScaleMode):
            raise ValueError(f"mode must be 'within' or 'global', got {mode!r}")
        self.mean, self.scale, self.mode = mean, scale, mode
        self._parts = parts

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw z, shape ``(*sample_shape, z_dim)``."""
        centre, deviation = self._parts(sample_shape)
        if self.mode == "within":
            return centre + self.scale * deviation
        return self.mean + self.scale * (centre + deviation - self.mean)
