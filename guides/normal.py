r"""Amortised diagonal Gaussian guide (Kingma & Welling 2014, arXiv:1312.6114v10, eq. 9)."""

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

__all__ = ["NormalGuide"]


class NormalGuide(nn.Module):
    r"""Independent Gaussian posteriors.

    .. math:: q(z \mid x) = \mathcal N(z \mid \mu(x), \mathrm{diag}\, \sigma^2(x))

    Args:
        encoder: Maps ``(B, *x_shape)`` to ``(loc, scale)``, each ``(B, z_dim)``.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z`` for ``x``, shape ``(*particles, B, z_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            loc, scale = self.encoder(x)
            return pyro.sample("z", dist.Normal(loc, scale).to_event(1))
