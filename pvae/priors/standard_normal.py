r"""Standard normal prior (Kingma & Welling 2014, arXiv:1312.6114v10, sec. 3)."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["StandardNormal"]


class StandardNormal(nn.Module):
    r"""The prior without parameters.

    .. math:: p(z) = \mathcal N(z \mid 0, I)

    Args:
        z_dim: Number of latent dimensions.

    Raises:
        ValueError: If ``z_dim`` is not positive.
    """

    conditional = False
    loc: Tensor

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        if z_dim < 1:
            raise ValueError(f"z_dim must be positive, got {z_dim}")
        self.z_dim = z_dim
        # A buffer, so that the distribution follows the module's device and dtype.
        self.register_buffer("loc", torch.zeros(z_dim), persistent=False)

    def forward(self, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return :math:`p(z)`, with ``batch_shape ()`` and ``event_shape (z_dim,)``.

        Raises:
            ValueError: If ``y`` is given: this prior is unconditional.
        """
        if y is not None:
            raise ValueError("StandardNormal is unconditional: y must be None")
        return dist.Normal(self.loc, self.loc.new_ones(())).to_event(1)
