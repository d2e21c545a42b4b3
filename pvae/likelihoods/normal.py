"""Normal likelihood with one variance, or one for each channel."""

import math
from collections.abc import Sequence
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .base import Likelihood

__all__ = ["Normal"]


class Normal(Likelihood):
    r"""Independent normals around the decoder's output, which is the mean of x.

    .. math:: p(x \mid z) = \prod_i \mathcal N(x_i \mid \hat x_i, \sigma^2)

    Args:
        sigma: ``"fixed"``: :math:`\sigma` is ``value``. ``"learned"``: it is a parameter,
            :math:`\sigma = \mathrm{floor} + e^{\rho}`, that starts at ``value``.
        value: :math:`\sigma`, or where it starts, in the units of x.
        channels: Where given, :math:`\sigma` is learned for each channel of x ``(channels, ...)`` alone.
        floor: Infimum of a learned :math:`\sigma`: data with a constant background have unbounded density.

    Raises:
        ValueError: If ``sigma`` is another word, ``value`` is not positive or not above the floor,
            ``floor`` is negative, or ``channels`` is not positive or is given for a fixed sigma.
    """

    values = frozenset({"unit", "count", "real"})

    def __init__(
        self,
        sigma: Literal["fixed", "learned"] = "fixed",
        value: float = 1.0,
        channels: int | None = None,
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        if sigma not in ("fixed", "learned"):
            raise ValueError(f"sigma must be 'fixed' or 'learned', got {sigma!r}")
        if channels is not None and (sigma == "fixed" or channels < 1):
            raise ValueError(f"channels must be positive, and None for a fixed sigma, got {channels}")
        least = floor if sigma == "learned" else 0.0
        if floor < 0 or not value > least:
            raise ValueError(
                f"value must be above {least:g} and floor at least 0, got {value:g} and {floor:g}"
            )
        self.mode = sigma
        self.channels = channels
        self.floor = floor
        if sigma == "learned":
            size = () if channels is None else (channels,)
            self.log_sigma = nn.Parameter(torch.full(size, math.log(value - floor)))
        else:
            self.register_buffer("fixed_sigma", torch.tensor(float(value)))

    @property
    def sigma(self) -> Tensor:
        r""":math:`\sigma` in the units of x, shape ``()`` or ``(channels,)``."""
        if self.mode == "learned":
            return self.floor + self.log_sigma.exp()
        return self.get_buffer("fixed_sigma")

    def param_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of x.

        Raises:
            ValueError: If sigma is per channel and x has another number of channels.
        """
        if self.channels not in (None, x_shape[0]):
            raise ValueError(f"x_shape must begin with channels = {self.channels}, got {tuple(x_shape)}")
        return tuple(x_shape)

    def forward(self, params: Tensor) -> dist.TorchDistribution:
        """Return p(x | z) for means ``params``, shape ``(*batch, *x_shape)``."""
        event_dim = self._event_dim(params)
        sigma = self.sigma
        if self.channels is not None:
            self.param_shape(params.shape[params.ndim - event_dim :])
            sigma = sigma.reshape(self.channels, *(1,) * (event_dim - 1))
        return dist.Normal(params, sigma).to_event(event_dim)

    def _supports(self, x: Tensor) -> Tensor:
        return x.isfinite()

    def _refusal(self, value: float) -> str:
        return f"Normal needs finite x, got {value}"
