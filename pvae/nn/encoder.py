"""What every encoder is: features of x, then a location and a scale of z."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvae.ops import soft_clamp

from .labels import LabelEmbedding, embedded
from .leading import check_size, check_sizes

__all__ = ["LOG_VAR_RANGE", "Encoder"]

#: Range of the log-variances that :meth:`Encoder.heads` returns, approached smoothly: standard deviations
#: between 0.0009 and 20 in the units of z.
LOG_VAR_RANGE = (-14.0, 6.0)


class Encoder(nn.Module, ABC):
    r"""Base class of encoders: ``forward = heads(features(x))``.

    A subclass defines :meth:`features`. Its layers must let the reverse mode through a forward-mode
    derivative (a guide may need both), which LayerNorm, BatchNorm in training mode and InstanceNorm
    get wrong without an error; GroupNorm is right.

    Args:
        x_shape: Shape of one datum.
        z_dim: Size of z.
        h_dim: Size of the features.
        labels: Embedding of the labels that the encoder sees beside x; ``None`` for x alone.

    Attributes:
        x_shape: Shape of one datum.
        z_dim: Size of z.
        h_dim: Size of the features.
        labels: The embedding, or ``None``.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive.
    """

    def __init__(
        self, x_shape: Sequence[int], z_dim: int, h_dim: int, labels: LabelEmbedding | None = None
    ) -> None:
        super().__init__()
        self.x_shape = check_sizes("x_shape", x_shape)
        self.z_dim = check_size("z_dim", z_dim)
        self.h_dim = check_size("h_dim", h_dim)
        self.labels = labels
        # Both heads in one matrix: rows [0, z_dim) give the location, the others the log-variance.
        self.head = nn.Linear(self.h_dim, 2 * self.z_dim)

    @abstractmethod
    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Map ``x`` ``(*batch, *x_shape)``, and the labels if it sees them, to ``(*batch, h_dim)``."""

    def context(self, y: Tensor | None) -> Tensor | None:
        """Embed the labels, shape ``(*batch, labels.dim)``; an encoder of x alone passes them over.

        Raises:
            ValueError: If the encoder sees labels and none are given.
        """
        return None if self.labels is None else embedded(self.labels, y, type(self).__name__)

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map features to the location and scale of z.

        The scale is :math:`e^{v / 2}`, the log-variance :math:`v` kept smoothly within
        :data:`LOG_VAR_RANGE`.

        Args:
            h: Features, shape ``(*batch, h_dim)``.

        Returns:
            ``loc`` and ``scale``, each ``(*batch, z_dim)``.
        """
        loc, log_var = self.head(h).chunk(2, dim=-1)
        return loc, torch.exp(0.5 * soft_clamp(log_var, *LOG_VAR_RANGE))

    def location(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return ``loc`` of :meth:`forward` alone, shape ``(*batch, z_dim)``, without the work for the scale.

        Args:
            x: Data, shape ``(*batch, *x_shape)``.
            y: Labels; an encoder of x alone passes them over.

        Raises:
            ValueError: As :meth:`forward`.
        """
        head = self.head
        return F.linear(self.features(x, y), head.weight[: self.z_dim], head.bias[: self.z_dim])

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x`` ``(*batch, *x_shape)`` to ``loc`` and ``scale``, each ``(*batch, z_dim)``.

        Args:
            x: Data.
            y: Labels; an encoder of x alone passes them over.

        Raises:
            ValueError: If the rightmost dimensions of ``x`` are not ``x_shape``, or the encoder sees labels
                and none are given.
        """
        return self.heads(self.features(x, y))
