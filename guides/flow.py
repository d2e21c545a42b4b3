r"""Guide made flexible by a conditional flow (Rezende & Mohamed 2015, arXiv:1505.05770v6; couplings of
Dinh et al. 2017, arXiv:1605.08803v3, eq. 4-5).
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.distributions import AffineCoupling
from pvae.nn import CouplingNet, Encoder

__all__ = ["FlowGuide"]


class FlowGuide(nn.Module):
    r"""A diagonal Gaussian pushed through affine couplings that see the encoder's features.

    .. math:: q(z \mid x) = \mathcal N(z_0 \mid \mu(x), \mathrm{diag}\, \sigma^2(x))
              \left| \det \partial z / \partial z_0 \right|^{-1}, \qquad
              z = f_n \circ \dots \circ f_1 (z_0; x)

    The couplings are the identity at the start, where the guide is the diagonal one. Density and
    sampling are both one pass.

    Args:
        encoder: A :class:`pvae.nn.Encoder`; its features are the context of the couplings.
        num_flows: Number of couplings; masks alternate.
        hidden: Width of the couplings' networks.

    Raises:
        ValueError: If ``num_flows`` is not positive or the latent has fewer than two dimensions.
    """

    masks: Tensor

    def __init__(self, encoder: Encoder, num_flows: int = 4, hidden: int = 64) -> None:
        super().__init__()
        z_dim, h_dim = encoder.z_dim, encoder.h_dim
        if num_flows < 1:
            raise ValueError(f"num_flows must be positive, got {num_flows}")
        if z_dim < 2:
            raise ValueError(f"a coupling needs at least two latent dimensions, got {z_dim}")
        self.encoder = encoder
        self.nets = nn.ModuleList(CouplingNet(z_dim, h_dim, hidden) for _ in range(num_flows))
        even = torch.arange(z_dim) % 2 == 0
        masks = torch.stack([even if i % 2 == 0 else ~even for i in range(num_flows)])
        self.register_buffer("masks", masks, persistent=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z`` for ``x``, shape ``(*particles, B, z_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            h = self.encoder.features(x)
            base = dist.Normal(*self.encoder.heads(h)).to_event(1)
            flow = [AffineCoupling(net, mask, h) for net, mask in zip(self.nets, self.masks, strict=True)]
            return pyro.sample("z", dist.TransformedDistribution(base, flow))
