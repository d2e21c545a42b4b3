"""A Gaussian mixture in a plane of a larger space, with thin noise across it, of known density.

The synthetic data of DiVAE (Alessi, Ansuini, Rodriguez & Trieste 2025, arXiv:2512.03928v1), as its released
code makes them.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._request import Request
from ._seeds import derive_seed
from ._synthetic import MOST_COMPONENTS, known_source, positive
from .dataset import Source
from .errors import DataError

__all__ = ["EmbeddedMixture", "embedded_mixture"]

# Standard deviation of the padding.
_PADDING_STD = 0.02
# Of the data: the rotation is a square matrix.
_WIDEST = 4_096


@dataclass(frozen=True)
class EmbeddedMixture:
    r"""Equal mixture of diagonal Gaussians in a plane of :math:`\mathbb R^D`, with thin noise across it.

    .. math:: x = R\, (u, w), \quad u \sim p(u) = \frac1K \sum_k \mathcal N(u; m_k, \mathrm{diag}\, s_k^2),
              \quad w \sim \mathcal N(0, \tau^2 I_{D-2})

    with R orthogonal, so that :math:`p(x) = p(u)\, p(w)` at :math:`(u, w) = R^\top x`. Densities are computed
    in double precision, whatever the type of x: in units of :math:`\tau` the digits of R x count for more.

    Args:
        means: :math:`m_k`, shape ``(K, 2)``, float64.
        stds: :math:`s_k`, shape ``(K, 2)``, float64.
        rotation: R, orthogonal, shape ``(D, D)``, float64; its first two columns span the plane.
        padding_std: :math:`\tau`.
    """

    means: Tensor
    stds: Tensor
    rotation: Tensor
    padding_std: float

    def project(self, x: Tensor) -> Tensor:
        """Return the coordinates u of x in the plane, ``(*batch, D) -> (*batch, 2)``.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``D``.
        """
        return self._turn_back(x)[..., :2].to(x.dtype)

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p(x) = log p(u) + log p(w) in nats, ``(*batch, D) -> (*batch,)``.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``D``.
        """
        turned = self._turn_back(x)
        padding = turned[..., 2:] / self.padding_std
        constant = padding.shape[-1] * (math.log(self.padding_std) + 0.5 * math.log(2 * math.pi))
        log_padding = -0.5 * padding.square().sum(-1) - constant
        return (self._log_plane(turned[..., :2]) + log_padding).to(x.dtype)

    def log_density_intrinsic(self, x: Tensor) -> Tensor:
        """Return log p(u) at the coordinates u of x in the plane, ``(*batch, D) -> (*batch,)``.

        In nats per area of the plane; the padding has no part in it.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``D``.
        """
        return self._log_plane(self._turn_back(x)[..., :2]).to(x.dtype)

    def draw(self, generator: np.random.Generator, n: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Draw ``n`` points, ``(n, D)``, and their components, ``(n,)``."""
        component = generator.integers(len(self.means), size=n)
        means, stds = self.means.numpy()[component], self.stds.numpy()[component]
        plane = means + stds * generator.standard_normal((n, 2))
        padding = self.padding_std * generator.standard_normal((n, len(self.rotation) - 2))
        return np.concatenate((plane, padding), 1) @ self.rotation.numpy().T, component

    def _turn_back(self, x: Tensor) -> Tensor:
        dim = len(self.rotation)
        if x.shape[-1:] != (dim,):
            raise ValueError(f"x must have shape (*batch, {dim}), got {tuple(x.shape)}")
        return x.to(torch.float64) @ self.rotation.to(x.device)

    def _log_plane(self, u: Tensor) -> Tensor:
        means, stds = self.means.to(u.device), self.stds.to(u.device)
        squares = ((u.unsqueeze(-2) - means) / stds).square().sum(-1)
        log_norms = stds.log().sum(-1) + math.log(2 * math.pi) + math.log(len(means))
        return torch.logsumexp(-0.5 * squares - log_norms, -1)


def embedded_mixture(
    request: Request,
    *,
    num_components: int = 4,
    dim: int = 50,
    variant: str = "random",
    law: int = 2031965,
    num_train: int = 20_000,
    num_test: int = 5_000,
) -> Source:
    """Draw from a mixture in a random plane of a larger space, ``x_shape (dim,)``, ``y`` the component.

    Across the plane the data have a standard deviation of 0.02. ``data.log_density`` is that of x itself,
    ``data.log_density_intrinsic`` that of its coordinates in the plane, which is what a density of codes or
    of a projection can know.

    Means and standard deviations of ``"random"`` are those of the paper's code for the same seed, rounded to
    multiples of 2^-10. ``num_components``, ``dim`` and ``law`` of its three sets are (8, 50, 6032000),
    (4, 50, 2031965), which is the default, and (12, 30, 14082005). The rotation and the draws of data are our
    own. ``seed`` draws the data alone: sets that differ in it have one distribution.

    Args:
        request: What is asked for; ``valid`` is the size of the validation part (2,000).
        num_components: Number of components.
        dim: Dimension of the data, 3 ... 4096.
        variant: ``"random"``: means normal with standard deviation 4, cut at ±5, standard deviations normal
            around 0.5 with 0.02, cut at 0.4 and 0.6, for each component and direction; ``"ring"``: means
            evenly on a circle of radius 2.5, standard deviations 0.25.
        law: Seed of the means, standard deviations and rotation.
        num_train: Size of the training part.
        num_test: Size of the test part.
    """
    positive(num_components=num_components, most=MOST_COMPONENTS)
    if not 3 <= dim <= _WIDEST:
        raise DataError(f"dim must lie in 3 ... {_WIDEST}, got {dim}")
    if variant == "ring":
        angle = torch.arange(num_components, dtype=torch.float64) * (2 * math.pi / num_components)
        means = 2.5 * torch.stack((angle.cos(), angle.sin()), -1)
        stds = torch.full_like(means, 0.25)
    elif variant == "random":
        generator = torch.Generator().manual_seed(law)
        # In this order and precision, the draws of the paper's code.
        means, stds = (
            torch.randn(num_components, 2, generator=generator, dtype=torch.float32) for _ in range(2)
        )
        means = _rounded((4 * means).clamp(-5, 5))
        stds = _rounded((0.5 + 0.02 * stds).clamp(0.4, 0.6))
    else:
        raise DataError(f"variant must be 'random' or 'ring', got {variant!r}")
    rotation = _rotation(derive_seed(request.name, law, "rotation"), dim)
    truth = EmbeddedMixture(means, stds, rotation, _PADDING_STD)
    return known_source(
        request,
        truth,
        num_train=num_train,
        num_test=num_test,
        class_names=tuple(str(component) for component in range(num_components)),
        log_density_intrinsic=truth.log_density_intrinsic,
    )


def _rounded(values: Tensor) -> Tensor:
    """Round away the last digits, in which the normals that torch draws differ between machines."""
    return (values.double() * 2**10).round() / 2**10


def _rotation(seed: int, dim: int) -> Tensor:
    """Draw an orthogonal matrix uniformly, its determinant of either sign, ``(dim, dim)``."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    # The factors are unique, and uniform, once the diagonal of R is positive.
    return torch.from_numpy(q * np.sign(np.diag(r)))
