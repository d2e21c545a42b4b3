r"""Guide made flexible by a conditional flow (Rezende & Mohamed 2015, arXiv:1505.05770v6; couplings of
Dinh et al. 2017, arXiv:1605.08803v3, eq. 4-5).
"""

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pvae.nn import Encoder
from pvae.priors import CouplingFlow

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
        num_flows: Number of couplings; their masks alternate.
        hidden: Width of the couplings' networks.

    Raises:
        ValueError: If ``num_flows`` is not positive or the latent has fewer than two dimensions.
    """

    def __init__(self, encoder: Encoder, num_flows: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.encoder = encoder
        self.flow = CouplingFlow(encoder.z_dim, num_flows, encoder.h_dim, hidden)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z`` for ``x``, shape ``(*particles, B, z_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            h = self.encoder.features(x, y)
            base = dist.Normal(*self.encoder.heads(h)).to_event(1)
            # The couplings one by one: composed, the log-determinant would run through them once more.
            return pyro.sample("z", dist.TransformedDistribution(base, self.flow.condition(h).parts))
