r"""Learnable mixture of diagonal Gaussians as a prior (Dilokthanakul et al. 2016, arXiv:1611.02648v2)."""

from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvae.distributions import NormalMixture

__all__ = ["GaussianMixture"]

_FLOOR = 1e-3


class GaussianMixture(nn.Module):
    r"""A mixture whose weights, means and scales are learned with the model.

    .. math:: p(z) = \sum_k \pi_k \, \mathcal N(z \mid \mu_k, \mathrm{diag}\, \sigma_k^2)

    Starts with equal weights, means drawn from :math:`\mathcal N(0, I)` and unit scales; scales stay
    above 0.001, since a component that shrinks onto one code has unbounded density.

    Args:
        z_dim: Number of latent dimensions.
        components: Number of components K.

    Raises:
        ValueError: If a size is not positive.
    """

    conditional = False

    def __init__(self, z_dim: int, components: int = 10) -> None:
        super().__init__()
        if z_dim < 1 or components < 1:
            raise ValueError(f"z_dim and components must be positive, got {z_dim} and {components}")
        self.z_dim = z_dim
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, z_dim))
        self.raw_scale = nn.Parameter(_softplus_inverse(torch.ones(components, z_dim) - _FLOOR))

    @classmethod
    def from_codes(cls, z: Tensor, components: int = 10, seed: int = 0) -> Self:
        """Fit the starting point to codes by expectation maximisation (scikit-learn).

        Args:
            z: Codes of training data, shape ``(N, z_dim)`` with ``N >= components``.
            components: Number of components.
            seed: Seed of the k-means start.

        Raises:
            ValueError: If ``z`` is not a matrix with at least ``components`` rows.
        """
        if z.ndim != 2 or len(z) < components:
            raise ValueError(f"z must have shape (N, z_dim) with N >= {components}, got {tuple(z.shape)}")
        from sklearn.mixture import GaussianMixture as Fit

        fitted = Fit(components, covariance_type="diag", random_state=seed, reg_covar=1e-4)
        fitted.fit(z.detach().double().cpu().numpy())
        prior = cls(z.shape[-1], components)
        with torch.no_grad():
            prior.logits.copy_(torch.from_numpy(fitted.weights_).log())
            prior.loc.copy_(torch.from_numpy(fitted.means_))
            scale = torch.from_numpy(fitted.covariances_).sqrt()
            prior.raw_scale.copy_(_softplus_inverse(scale.clamp(min=2 * _FLOOR) - _FLOOR))
        return prior.to(z.device)

    def forward(self, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return :math:`p(z)`, with ``batch_shape ()`` and ``event_shape (z_dim,)``.

        Raises:
            ValueError: If ``y`` is given: this prior is unconditional.
        """
        if y is not None:
            raise ValueError("GaussianMixture is unconditional: y must be None")
        return NormalMixture(self.logits, self.loc, F.softplus(self.raw_scale) + _FLOOR)


def _softplus_inverse(value: Tensor) -> Tensor:
    """Solve ``softplus(t) = value`` for positive ``value``."""
    return value + torch.log(-torch.expm1(-value))
