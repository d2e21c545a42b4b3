"""Gaussian mixtures in the plane, labelled by component, with their exact density."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._request import Request
from ._seeds import derive_seed
from ._synthetic import MOST_COMPONENTS, isotropic_log_density, known_source, positive
from .dataset import Source
from .errors import DataError

__all__ = ["GaussianMixture2D", "gaussian_mixture"]


@dataclass(frozen=True)
class GaussianMixture2D:
    r"""Equal mixture of isotropic Gaussians, :math:`p(x) = \frac1K \sum_k \mathcal N(x; c_k, \sigma^2 I)`.

    Args:
        centres: Means of the components, shape ``(K, 2)``, float64.
        std: Their standard deviation.
    """

    centres: Tensor
    std: float

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats, ``(*batch, 2) -> (*batch,)``."""
        components = len(self.centres)
        log_weights = self.centres.new_full((components,), -math.log(components))
        return isotropic_log_density(x, self.centres, log_weights, self.std)

    def draw(self, generator: np.random.Generator, n: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Draw ``n`` points, ``(n, 2)``, and their components, ``(n,)``."""
        component = generator.integers(len(self.centres), size=n)
        return self.centres.numpy()[component] + self.std * generator.standard_normal((n, 2)), component


def gaussian_mixture(
    request: Request,
    *,
    components: int = 8,
    layout: str = "ring",
    radius: float = 2.5,
    std: float = 0.25,
    num_train: int = 10_000,
    num_test: int = 5_000,
) -> Source:
    """Draw from a mixture of isotropic Gaussians in the plane, ``x_shape (2,)``, ``y`` the component.

    Args:
        request: What is asked for; ``valid`` is the size of the validation part (2,000).
        components: Number of components.
        layout: ``"ring"``: centres evenly on a circle; ``"random"``: drawn by ``seed`` from a normal of
            standard deviation ``radius`` in each direction.
        radius: Radius of the circle, or spread of the centres.
        std: Standard deviation of each component.
        num_train: Size of the training part.
        num_test: Size of the test part.
    """
    positive(components=components, most=MOST_COMPONENTS)
    positive(radius=radius, std=std)
    if layout == "ring":
        angle = torch.arange(components, dtype=torch.float64) * (2 * math.pi / components)
        centres = radius * torch.stack((angle.cos(), angle.sin()), -1)
    elif layout == "random":
        generator = np.random.default_rng(derive_seed(request.name, request.seed, "centres"))
        centres = torch.from_numpy(radius * generator.standard_normal((components, 2)))
    else:
        raise DataError(f"layout must be 'ring' or 'random', got {layout!r}")
    truth = GaussianMixture2D(centres, std)
    return known_source(
        request,
        truth,
        num_train=num_train,
        num_test=num_test,
        class_names=tuple(str(component) for component in range(components)),
    )
