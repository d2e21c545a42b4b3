"""What every likelihood is: the decoder's output in, p(x | z) out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

__all__ = ["Likelihood"]


class Likelihood(nn.Module, ABC):
    r"""Base class of likelihoods: :math:`p(x \mid z)` from the output of a decoder.

    Attributes:
        values: The kinds of values (``Protocol.values`` of a data set) that x may have: of "binary", "unit"
            (grey levels on [0, 1]), "count" and "real".
        event_dim: Number of dimensions of one datum. ``None``, the default, reads it off the decoder's
            output: 3 where that is ``(B, C, H, W)`` or ``(particles, B, C, H, W)``, 1 where it is ``(D,)``,
            ``(B, D)`` or ``(particles, B, D)``. Set it for other shapes or more
            leading dimensions.
        profiled: Whether a parameter is fitted to each training batch. A model calls such a likelihood as
            ``likelihood(params, x)``, and any other as ``likelihood(params)``.
    """

    values: frozenset[str]
    profiled: bool = False
    event_dim: int | None = None

    def param_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of what the decoder must output for one datum of shape ``x_shape``; as many dimensions.

        Raises:
            ValueError: If data of this shape are not possible.
        """
        return tuple(x_shape)

    @abstractmethod
    def forward(self, params: Tensor) -> TorchDistribution:
        """Return :math:`p(x | z)`.

        Args:
            params: Output of a decoder, shape ``(*batch, *param_shape(x_shape))``.

        Returns:
            A distribution with ``batch_shape (*batch)`` and ``event_shape x_shape``, whose draws and mean are
            in the units of x.
        """

    def check(self, x: Tensor) -> None:
        """Refuse data outside the support. Synchronises with the host: for the doors, not for the loop.

        Args:
            x: Data, shape ``(B, *x_shape)``.

        Raises:
            TypeError: If x is not floating-point.
            ValueError: If an entry is outside the support; the sentence names one.
        """
        if not x.is_floating_point():
            raise TypeError(f"{self._name} needs floating-point x, got {x.dtype}")
        outside = ~(self._supports(x) & x.isfinite())
        if outside.any():
            raise ValueError(self._refusal(x[outside][0].item()))

    def check_held_out(self) -> None:
        """Refuse to score held-out data while a parameter is missing. For the doors, not for the loop.

        Raises:
            ValueError: If a parameter is fitted to each training batch and was never measured.
        """

    @abstractmethod
    def _supports(self, x: Tensor) -> Tensor:
        """Whether each entry of ``x`` is in the support, shape of ``x``."""

    @abstractmethod
    def _refusal(self, value: float) -> str:
        """One sentence about a ``value`` outside the support."""

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _event_dim(self, params: Tensor) -> int:
        if self.event_dim is not None:
            return self.event_dim
        if not 1 <= params.ndim <= 5:
            raise ValueError(
                f"{self._name}.event_dim must be set for params with {params.ndim} dimensions, "
                f"got shape {tuple(params.shape)}"
            )
        return 3 if params.ndim > 3 else 1

    def _unstacked(self, params: Tensor, parts: int) -> tuple[Tensor, int]:
        """Make ``parts`` a dimension of its own, ``(*batch, parts * C, ...)`` to ``(*batch, parts, C, ...)``.

        Returns:
            The reshaped tensor and the position of the new dimension, negative.
        """
        dim = -self._event_dim(params)
        if params.shape[dim] % parts:
            raise ValueError(
                f"params must hold {parts} numbers for each entry of x along dimension {dim}, "
                f"got shape {tuple(params.shape)}"
            )
        return params.unflatten(dim, (parts, params.shape[dim] // parts)), dim - 1


def is_count(x: Tensor) -> Tensor:
    """Whether each entry is one of 0, 1, 2, ..."""
    return (x >= 0) & (x == torch.floor(x))


def repeated(x_shape: Sequence[int], times: int) -> tuple[int, ...]:
    """``x_shape`` with ``times`` as many entries along its first dimension."""
    return (times * x_shape[0], *x_shape[1:])
