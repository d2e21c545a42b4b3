r"""Guide of the two-level hierarchical VAE (Tomczak & Welling 2018, arXiv:1705.07120v5, sec. 4)."""

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pvae.nn import PairEncoder

__all__ = ["HVAEGuide"]


class HVAEGuide(nn.Module):
    r"""Diagonal Gaussians, the upper latent first.

    .. math:: q(z_1, z_2 \mid x) = q(z_2 \mid x) \, q(z_1 \mid x, z_2)

    Args:
        encoder: Maps ``(B, *x_shape)`` to ``loc`` and ``scale`` of :math:`q(z_2 \mid x)`: what a
            :class:`pvae.priors.VampPrior` of the model holds.
        below: Maps x and :math:`z_2` to those of :math:`q(z_1 \mid x, z_2)`.

    Raises:
        ValueError: If the two disagree about the size of :math:`z_2`.
    """

    def __init__(self, encoder: nn.Module, below: PairEncoder) -> None:
        super().__init__()
        size = getattr(encoder, "z_dim", below.given_dim)
        if size != below.given_dim:
            raise ValueError(
                f"encoder and below must have the same size of z_2, got {size} and {below.given_dim}"
            )
        self.encoder = encoder
        self.below = below

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z_2`` and ``z_1`` for ``x``; return ``z_1``, shape ``(*particles, B, z_1_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            loc, scale = self.encoder(x)
            z_2 = pyro.sample("z_2", dist.Normal(loc, scale).to_event(1))
            loc, scale = self.below(x, z_2)
            return pyro.sample("z_1", dist.Normal(loc, scale).to_event(1))
