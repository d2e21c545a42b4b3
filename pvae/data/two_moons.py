"""Two interleaved noisy half circles, labelled, with their density by quadrature along the arcs."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._request import Request
from ._synthetic import isotropic_log_density, known_source, positive
from .dataset import Source
from .errors import DataError

__all__ = ["TwoMoons", "two_moons"]

# Noise: the nodes of the density, whose number grows with its inverse, are found in their number's square.
_LEAST = 0.005


@dataclass(frozen=True)
class TwoMoons:
    r"""Noise around two half circles, one turned over and shifted into the other.

    .. math:: p(x) = \frac12 \sum_{m=0}^{1} \frac1\pi \int_0^\pi \mathcal N(x; c_m(t), \sigma^2 I)\, dt

    with :math:`c_0(t) = (\cos t, \sin t)` and :math:`c_1(t) = (1 - \cos t, \tfrac12 - \sin t)`. The
    integrals are Gauss-Legendre sums whose nodes stand closer than half a standard deviation of the noise,
    which leaves a relative error below 1e-10 within five units of the arcs.

    Args:
        noise: Standard deviation of the noise.
    """

    noise: float
    _centres: Tensor = field(init=False, repr=False, compare=False)
    _log_weights: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        nodes, weights = np.polynomial.legendre.leggauss(64 + math.ceil(12 / self.noise))
        arcs = _arcs(np.tile(0.5 * math.pi * (nodes + 1), 2), np.repeat([0, 1], len(nodes)))
        object.__setattr__(self, "_centres", torch.from_numpy(arcs))
        # Weights sum to 2 on [-1, 1]: a quarter of them is a mean over the arc times one half for the moon.
        object.__setattr__(self, "_log_weights", torch.from_numpy(np.log(np.tile(weights, 2) / 4)))

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats, ``(*batch, 2) -> (*batch,)``."""
        return isotropic_log_density(x, self._centres, self._log_weights, self.noise)

    def draw(self, generator: np.random.Generator, n: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Draw ``n`` points, ``(n, 2)``, and their moons, ``(n,)``."""
        moon = generator.integers(2, size=n)
        arc = _arcs(math.pi * generator.random(n), moon)
        return arc + self.noise * generator.standard_normal((n, 2)), moon


def two_moons(
    request: Request, *, noise: float = 0.1, num_train: int = 10_000, num_test: int = 5_000
) -> Source:
    """Draw from two noisy half circles, ``x_shape (2,)``, ``y`` the moon.

    Args:
        request: What is asked for; ``valid`` is the size of the validation part (2,000).
        noise: Standard deviation of the noise, at least 0.005.
        num_train: Size of the training part.
        num_test: Size of the test part.
    """
    positive(noise=noise)
    if noise < _LEAST:
        raise DataError(f"noise must be at least {_LEAST}, got {noise}")
    truth = TwoMoons(noise)
    return known_source(
        request, truth, num_train=num_train, num_test=num_test, class_names=("upper", "lower")
    )


def _arcs(t: NDArray[np.float64], moon: NDArray[np.int64]) -> NDArray[np.float64]:
    """Points of the arcs, ``(n, 2)``, at angles ``t`` of moons 0 or 1."""
    upper = np.stack((np.cos(t), np.sin(t)), -1)
    return np.where(moon[:, None] == 0, upper, np.array([1.0, 0.5]) - upper)
