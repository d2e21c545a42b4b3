"""Deterministic autoencoder as a Pyro program, for the engine of all others (X-VAE, arXiv:2607.01275v1)."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .vae import VAE

__all__ = ["Autoencoder"]


class Autoencoder(VAE):
    r"""A decoder under a flat prior: with a guide that is a point, the loss is minus :math:`\log p(x \mid
    z)`.

    With a ``Normal`` likelihood that is the squared error. It is no model of x: a flat prior has no density,
    and :func:`pvae.log_likelihood` refuses the guide.

    Args:
        decoder: Maps ``(*batch, z_dim)`` to ``(*batch, *likelihood.param_shape(x_shape))``.
        likelihood: What the reconstruction is measured by.
        code_l2: Weight of :math:`\|z\|^2` in the loss, in nats (the penalty of RAE, Ghosh et al. 2020): it
            ties down the scale of the code, which is otherwise free.

    Raises:
        ValueError: If ``code_l2`` is negative.
    """

    def __init__(self, decoder: nn.Module, likelihood: nn.Module, code_l2: float = 0.0) -> None:
        if code_l2 < 0:
            raise ValueError(f"code_l2 must not be negative, got {code_l2:g}")
        super().__init__(_Flat(int(decoder.z_dim), code_l2), decoder, likelihood)  # type: ignore[arg-type]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program on ``x``, shape ``(B, *x_shape)``."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.observation(self.decoder(z), x), obs=x)


class _Flat(nn.Module):
    """Log-density 0 everywhere, or that of the normal whose quadratic part is the penalty."""

    conditional = False
    loc: Tensor
    scale: Tensor

    def __init__(self, z_dim: int, code_l2: float) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.code_l2 = code_l2
        scale = 1.0 if code_l2 == 0 else math.sqrt(0.5 / code_l2)
        # Both lie on the device: a number made a tensor at every step would be sent there at every step.
        self.register_buffer("loc", torch.zeros(z_dim), persistent=False)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        normal = dist.Normal(self.loc, self.scale).to_event(1)
        # The mask leaves nothing of the density; a draw, which a first check of the program makes, is
        # harmless.
        return normal if self.code_l2 else normal.mask(False)
