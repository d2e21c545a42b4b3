"""A noisy curve in the plane: a VAE's own model with a known decoder, and its density by quadrature."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._request import Request
from ._synthetic import isotropic_log_density, known_source, positive
from .dataset import Source

__all__ = ["SineManifold", "manifold"]

# The latent axis is cut where the normal density is below 1e-26 of its peak.
_REACH = 11.0


@dataclass(frozen=True)
class SineManifold:
    r"""A latent :math:`z \sim \mathcal N(0, 1)` decoded to a sine curve, with isotropic noise.

    .. math:: p(x) = \int \mathcal N(z; 0, 1)\, \mathcal N(x; g(z), \sigma^2 I)\, dz, \qquad
              g(z) = (z, \sin(\pi z / 2))

    The integral is a trapezoid sum on [-11, 11] with nodes closer than half the noise along the
    curve; for smooth integrands that vanish at both ends its error falls faster than any power of the
    spacing. Further out than 10 along the first axis, where no sample reaches, the value is a lower bound.

    Args:
        noise: Standard deviation of the noise.
    """

    noise: float
    _z: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The curve is at most sqrt(1 + (pi / 2)^2) < 1.87 times as fast as z.
        nodes = 2 * math.ceil(_REACH / (self.noise / (2 * 1.87))) + 1
        object.__setattr__(self, "_z", torch.linspace(-_REACH, _REACH, nodes, dtype=torch.float64))

    def decode(self, z: Tensor) -> Tensor:
        """Return the point of the curve, ``(*batch,) -> (*batch, 2)``."""
        return torch.stack((z, (0.5 * math.pi * z).sin()), -1)

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats, ``(*batch, 2) -> (*batch,)``."""
        spacing = float(self._z[1] - self._z[0])
        log_weights = -0.5 * self._z.square() + math.log(spacing / math.sqrt(2 * math.pi))
        return isotropic_log_density(x, self.decode(self._z), log_weights, self.noise)

    def draw(self, generator: np.random.Generator, n: int) -> tuple[NDArray[np.float64], None]:
        """Draw ``n`` points, ``(n, 2)``."""
        z = torch.from_numpy(generator.standard_normal(n))
        return self.decode(z).numpy() + self.noise * generator.standard_normal((n, 2)), None


def manifold(
    request: Request, *, noise: float = 0.1, num_train: int = 10_000, num_test: int = 5_000
) -> Source:
    """Draw from a noisy sine curve, ``x_shape (2,)``, without labels.

    Args:
        request: What is asked for; ``valid`` is the size of the validation part (2,000).
        noise: Standard deviation of the noise.
        num_train: Size of the training part.
        num_test: Size of the test part.
    """
    positive(noise=noise)
    truth = SineManifold(noise)
    return known_source(request, truth, num_train=num_train, num_test=num_test)
