"""A prior of vectors as one of images."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.nn.leading import check_sizes

__all__ = ["ImagePrior"]


class ImagePrior(nn.Module):
    """Any prior of vectors, its draws in the shape of an image.

    So a mixture, or N(0, I), can stand where :class:`pvae.priors.DiffusionPrior` does: over the pseudoinputs
    of a :class:`pvae.models.Ladder`.

    Args:
        prior: Called without arguments, returns a distribution with ``event_shape (z_dim,)``.
        shape: Shape of one draw, with ``z_dim`` entries in all.

    Raises:
        ValueError: If the prior is conditional, or its draws have another number of entries.

    Example:
        >>> from pvae.priors import StandardNormal
        >>> ImagePrior(StandardNormal(49), (1, 7, 7))().event_shape
        torch.Size([1, 7, 7])
    """

    conditional = False

    def __init__(self, prior: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.u_shape = check_sizes("shape", shape)
        if getattr(prior, "conditional", False):
            raise ValueError("prior must be unconditional: nothing gives pseudoinputs a label")
        size = getattr(prior, "z_dim", None)
        if size is not None and size != self.z_dim:
            raise ValueError(f"prior must have the {self.z_dim} entries of {self.u_shape}, got {size}")
        self.prior = prior

    @property
    def z_dim(self) -> int:
        """Number of entries of one draw."""
        return torch.Size(self.u_shape).numel()

    def forward(self, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return the distribution, with ``batch_shape ()`` and ``event_shape shape``."""
        p = self.prior()
        return dist.TransformedDistribution(
            p, [dist.transforms.ReshapeTransform((self.z_dim,), self.u_shape)]
        )
