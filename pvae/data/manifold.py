"""Noisy curved manifolds: a VAE's own model with a known decoder, with its density and its posteriors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._request import Request
from ._synthetic import known_source, positive
from .dataset import Source
from .errors import DataError

__all__ = ["Manifold", "Saddle", "SineManifold", "manifold", "saddle"]

# The first latent is cut where the normal density is below 1e-26 of its peak.
_REACH = 11.0
# No sample has a latent beyond this.
_FAR = 8.0
# Length of the manifold, per unit of the first latent, over the noise.
_FINEST = 1e4
# Rows times nodes held at once.
_BUDGET = 1_000_000


@dataclass(frozen=True)
class Manifold(ABC):
    r"""A latent :math:`z \sim \mathcal N(0, I)` decoded by a known g, with isotropic noise.

    .. math:: p(x) = \int \mathcal N(z_1; 0, 1)\, p(x \mid z_1)\, dz_1, \qquad
              x \mid z \sim \mathcal N(g(z), \sigma^2 I)

    g is linear in every latent but the first, so that p(x | z₁) has a closed form. The integral is a
    trapezoid sum on [-11, 11] with nodes closer than half the noise along the manifold; for smooth integrands
    that vanish at both ends its error falls faster than any power of the spacing. Further out than 10 along
    the first axis, where no sample reaches, the density is a lower bound. Sums are in double precision,
    whatever the type of x.

    Args:
        noise: Standard deviation :math:`\sigma` of the noise.

    Attributes:
        z_dim: Number of latents.
        x_dim: Number of coordinates.
    """

    noise: float
    z_dim: ClassVar[int]
    x_dim: ClassVar[int]

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Return g(z), ``(*batch, z_dim) -> (*batch, x_dim)``."""

    @abstractmethod
    def speed(self) -> float:
        """Return a bound on the length of g's derivative in the first latent, where samples are."""

    @abstractmethod
    def log_slice(self, first: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | z₁) in nats for z₁ ``(K,)`` and x ``(n, x_dim)``, shape ``(n, K)``."""

    @abstractmethod
    def slice_moments(self, first: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of z given z₁ and x, ``(n, K, z_dim)`` and ``(K, z_dim, z_dim)``."""

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats, ``(*batch, x_dim) -> (*batch,)``.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``x_dim``.
        """
        return self._by_rows(x, lambda rows: (self._log_joint(rows).logsumexp(-1),))[0]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of p(z | x), ``(*batch, z_dim)`` and ``(*batch, z_dim, z_dim)``.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``x_dim``.
        """
        mean, covariance = self._by_rows(x, self._moments)
        return mean, covariance

    def draw(self, generator: np.random.Generator, n: int) -> tuple[NDArray[np.float64], None]:
        """Draw ``n`` points, ``(n, x_dim)``."""
        z = torch.from_numpy(generator.standard_normal((n, self.z_dim)))
        return self.decode(z).numpy() + self.noise * generator.standard_normal((n, self.x_dim)), None

    def _nodes(self, like: Tensor) -> Tensor:
        num = 2 * math.ceil(_REACH * 2 * self.speed() / self.noise) + 1
        return torch.linspace(-_REACH, _REACH, num, dtype=torch.float64, device=like.device)

    def _log_joint(self, rows: Tensor) -> Tensor:
        """Logarithm of each node's share of p(x), ``(n, x_dim) -> (n, K)``."""
        first = self._nodes(rows)
        log_spacing = math.log(2 * _REACH / (len(first) - 1))
        log_weights = log_spacing - 0.5 * (first.square() + math.log(2 * math.pi))
        return self.log_slice(first, rows) + log_weights

    def _moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._log_joint(rows).softmax(-1).unsqueeze(-2)
        means, covariances = self.slice_moments(self._nodes(rows), rows)
        mean = weights @ means
        away = means - mean
        within = (weights @ covariances.flatten(1)).unflatten(-1, (self.z_dim, self.z_dim)).squeeze(-3)
        return mean.squeeze(-2), (away * weights.mT).mT @ away + within

    def _by_rows(self, x: Tensor, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        """Compute for some points at a time, and give the results the shape and type of x."""
        if x.shape[-1:] != (self.x_dim,):
            raise ValueError(f"x must have shape (*batch, {self.x_dim}), got {tuple(x.shape)}")
        rows = x.reshape(-1, self.x_dim).to(torch.float64)
        chunks = [compute(chunk) for chunk in rows.split(max(1, _BUDGET // len(self._nodes(rows))))]
        results = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
        return [result.to(x.dtype).reshape(x.shape[:-1] + result.shape[1:]) for result in results]


@dataclass(frozen=True)
class SineManifold(Manifold):
    r"""A sine curve in the plane, :math:`g(z) = (z, \sin(\pi z / 2))`.

    Args:
        noise: Standard deviation of the noise.
    """

    z_dim = 1
    x_dim = 2

    def decode(self, z: Tensor) -> Tensor:
        """Return the point of the curve, ``(*batch, 1) -> (*batch, 2)``."""
        return torch.cat((z, (0.5 * math.pi * z).sin()), -1)

    def speed(self) -> float:
        """Return the speed of the curve where it is fastest."""
        return math.hypot(1, math.pi / 2)

    def log_slice(self, first: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | z) in nats."""
        x1, x2 = x.T.unsqueeze(-1)
        squares = (x1 - first).square() + (x2 - (0.5 * math.pi * first).sin()).square()
        return -squares / (2 * self.noise**2) - math.log(2 * math.pi * self.noise**2)

    def slice_moments(self, first: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z itself and no variance."""
        return first.expand(len(x), -1).unsqueeze(-1), torch.zeros_like(first).reshape(-1, 1, 1)


@dataclass(frozen=True)
class Saddle(Manifold):
    r"""A saddle in space, :math:`g(z) = (z_1, z_2, a z_1 z_2)`, whose posteriors are not diagonal.

    The pull-back metric :math:`g'^\top g'` has :math:`a^2 z_1 z_2` off its diagonal: the latents are
    correlated given x with the sign of :math:`-z_1 z_2`, and no rotation of z removes that everywhere.

    Args:
        noise: Standard deviation :math:`\sigma` of the noise.
        curvature: :math:`a`.
    """

    curvature: float = 1.0
    z_dim = 2
    x_dim = 3

    def decode(self, z: Tensor) -> Tensor:
        """Return the point of the surface, ``(*batch, 2) -> (*batch, 3)``."""
        return torch.cat((z, self.curvature * z.prod(-1, keepdim=True)), -1)

    def speed(self) -> float:
        """Return the length of g's derivative in the first latent at the largest second one."""
        return math.hypot(1, self.curvature * _FAR)

    def log_slice(self, first: Tensor, x: Tensor) -> Tensor:
        r"""Return log p(x | z₁) in nats: :math:`(x_2, x_3) \sim \mathcal N(0, v v^\top + \sigma^2 I)` with
        :math:`v = (1, a z_1)`.
        """
        x1, x2, x3 = x.T.unsqueeze(-1)
        slope, total = self._slice(first)
        length = 1 + slope.square()
        # Along v and across it, so that large squares are not subtracted from one another.
        along, across = x2 + slope * x3, slope * x2 - x3
        squares = ((x1 - first).square() + across.square() / length) / self.noise**2
        squares = squares + along.square() / (length * total)
        return -0.5 * (squares + total.log() + 3 * math.log(2 * math.pi)) - 2 * math.log(self.noise)

    def slice_moments(self, first: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z₁ without variance, and z₂ as linear regression has it."""
        _, x2, x3 = x.T.unsqueeze(-1)
        slope, total = self._slice(first)
        second = (x2 + slope * x3) / total
        variance = torch.stack((torch.zeros_like(total), self.noise**2 / total), -1)
        return torch.stack((first.expand_as(second), second), -1), variance.diag_embed()

    def _slice(self, first: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.curvature * first
        return slope, 1 + slope.square() + self.noise**2


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
    return known_source(request, _checked(SineManifold(noise)), num_train=num_train, num_test=num_test)


def saddle(
    request: Request,
    *,
    curvature: float = 1.0,
    noise: float = 0.1,
    num_train: int = 10_000,
    num_test: int = 5_000,
) -> Source:
    """Draw from a noisy saddle, ``x_shape (3,)``, without labels.

    Args:
        request: What is asked for; ``valid`` is the size of the validation part (2,000).
        curvature: Factor of the third coordinate, z₁ z₂.
        noise: Standard deviation of the noise.
        num_train: Size of the training part.
        num_test: Size of the test part.
    """
    positive(curvature=curvature, noise=noise)
    truth = _checked(Saddle(noise, curvature))
    return known_source(request, truth, num_train=num_train, num_test=num_test)


def _checked(truth: Manifold) -> Manifold:
    """Refuse noise that is too thin for the sums of the density, whose number of nodes grows as it falls."""
    least = truth.speed() / _FINEST
    if truth.noise < least:
        raise DataError(f"noise must be at least {least:.2g}, got {truth.noise}")
    return truth
