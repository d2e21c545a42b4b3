"""The guide of a deterministic autoencoder: a point for each datum (X-VAE, arXiv:2607.01275v1)."""

import pyro
import torch
from torch import Tensor

from pvae.distributions import PointMass
from pvae.nn import Encoder

__all__ = ["PointGuide"]


class PointGuide(torch.nn.Module):
    r"""A point mass at the encoder's location, which is the code of x.

    Its program trains an :class:`~pvae.models.Autoencoder`; it has no density, and no likelihood is
    estimated with it.

    Args:
        encoder: A :class:`pvae.nn.Encoder`; its scales are not used.
        noise: Standard deviation of Gaussian noise on the code in training, in the units of z.

    Raises:
        ValueError: If ``noise`` is negative.
    """

    def __init__(self, encoder: Encoder, noise: float = 0.0) -> None:
        super().__init__()
        if noise < 0:
            raise ValueError(f"noise must not be negative, got {noise:g}")
        self.encoder = encoder
        self.noise = noise

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Give ``z`` for ``x``, shape ``(*particles, B, z_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            code, _ = self.encoder(x, y)
            if self.noise and self.training:
                code = code + self.noise * torch.randn_like(code)
            return pyro.sample("z", PointMass(code, event_dim=1))
