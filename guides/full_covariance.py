r"""Amortised full-covariance Gaussian guide (Kingma & Welling 2019, arXiv:1906.02691v3, sec. 2.5.1)."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.nn import Encoder

__all__ = ["FullCovarianceGuide"]


class FullCovarianceGuide(nn.Module):
    r"""Gaussian posteriors whose Cholesky factor is a network's output.

    .. math:: q(z \mid x) = \mathcal N(z \mid \mu(x), L(x) L(x)^\top), \qquad
              L(x) = \mathrm{diag}\, \sigma(x) \, (I + U(x))

    with :math:`U` strictly lower triangular and zero at the start, where the guide is the diagonal one.

    Args:
        encoder: A :class:`pvae.nn.Encoder`: its features feed one more linear head of
            ``z_dim (z_dim - 1) / 2`` outputs.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        z_dim = encoder.z_dim
        self.lower = nn.Linear(encoder.h_dim, z_dim * (z_dim - 1) // 2) if z_dim > 1 else None
        if self.lower is not None:
            nn.init.zeros_(self.lower.weight)
            nn.init.zeros_(self.lower.bias)
        rows, columns = torch.tril_indices(z_dim, z_dim, -1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z`` for ``x``, shape ``(*particles, B, z_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            h = self.encoder.features(x, y)
            loc, scale = self.encoder.heads(h)
            return pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.scale_tril(h, scale)))

    def scale_tril(self, h: Tensor, scale: Tensor) -> Tensor:
        """Build :math:`L`, shape ``(B, z_dim, z_dim)``, from features and diagonal scales."""
        unit = torch.diag_embed(torch.ones_like(scale))
        if self.lower is not None:
            unit[..., self.rows, self.columns] = self.lower(h)
        return scale.unsqueeze(-1) * unit
