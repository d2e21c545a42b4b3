"""Gated linear layer, from the VampPrior's code (Tomczak & Welling 2018, arXiv:1705.07120v5)."""

import math

from torch import Tensor, nn

__all__ = ["GatedLinear", "he_normal_"]


class GatedLinear(nn.Module):
    r"""Linear map times a sigmoid gate.

    .. math:: h = (W x + a) \odot \sigma(V x + b)

    Args:
        in_dim: Size of ``x``.
        out_dim: Size of ``h``.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        # W and V in one matrix, so that one product serves both.
        self.linear = nn.Linear(in_dim, 2 * out_dim)
        he_normal_(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``(*batch, in_dim)`` to ``(*batch, out_dim)``."""
        return self.gate(self.linear(x))

    def gate(self, both: Tensor) -> Tensor:
        """Gate the linear map's output ``(*batch, 2 * out_dim)``, ``(*batch, out_dim)``."""
        value, gate = both.chunk(2, dim=-1)
        # Written out, as F.glu has no derivative in reverse over forward mode.
        return value * gate.sigmoid()


def he_normal_(linear: nn.Linear) -> None:
    """Draw the weights anew from N(0, 2 / fan_in); the bias stays as it is."""
    nn.init.normal_(linear.weight, std=math.sqrt(2.0 / linear.in_features))
