r"""Guide with Laplace's covariance, in Gauss-Newton form (Sorrenson et al. 2025, arXiv:2506.01522v1)."""

import pyro
import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor, nn

from pvae.distributions import laplace_normal

from .tied import TiedGuide

__all__ = ["LaplaceGuide"]


class LaplaceGuide(TiedGuide):
    r"""A normal around the encoder's location with the covariance that decoder, noise and prior imply there.

    .. math:: q(z \mid x) = \mathcal N(z \mid f(x), \Sigma_L), \qquad
              \Sigma_L = \left(\mathrm{diag}\,\tau^{-2} + g'(f(x))^\top g'(f(x)) / \sigma^2\right)^{-1}

    It has no covariance parameters either, and unlike :class:`FiveGuide` it can represent a latent that the
    decoder ignores, whose posterior is the prior. Density and gradient are exact, through both networks; the
    price is a decoder Jacobian of ``z_dim`` forward-mode passes in every step. With a linear decoder and a
    normal prior its optimum is probabilistic PCA.

    Args:
        encoder: As in :class:`FiveGuide`.
        decoder: The model's decoder, held and not owned. Gradients are taken of its derivative: its layers
            must allow that as the encoder's must.
        likelihood: The model's likelihood, ``Normal`` (any sigma) or, experimentally, ``Bernoulli``.
        prior_scale: Standard deviation :math:`\tau` of z under the prior, positive, a number or ``(z_dim,)``.
        trained: Whether gradients will be taken; ``False`` for a proposal in an evaluation, where a decoder
            with LayerNorm is right too.

    Raises:
        TypeError: For another likelihood.
        ValueError: If ``prior_scale`` is not positive, or a network has derivatives that are wrong or
            missing.
    """

    prior_scale: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: nn.Module,
        *,
        prior_scale: float | Tensor = 1.0,
        trained: bool = True,
    ) -> None:
        super().__init__(encoder, decoder, likelihood, differentiate_decoder=trained)
        scale = torch.as_tensor(prior_scale)
        if scale.shape not in ((), (self.z_dim,)) or not bool((scale > 0).all()):
            raise ValueError(
                f"prior_scale must be positive, a number or of shape ({self.z_dim},), got {prior_scale}"
            )
        weight = next(encoder.parameters(), torch.zeros(()))
        self.register_buffer("prior_scale", scale.to(weight), persistent=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z`` for ``x``, shape ``(*particles, B, z_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.posterior(x, y))

    def posterior(self, x: Tensor, y: Tensor | None = None) -> MultivariateNormal:
        """Return :math:`q(z | x)` for ``x`` ``(B, *x_shape)``, outside of any program."""
        return laplace_normal(
            self.location(x, y), lambda z: self.reconstruction(z, y), self.noise(x, y), self.prior_scale
        )
