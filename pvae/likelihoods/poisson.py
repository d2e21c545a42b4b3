"""Poisson likelihood of counts."""

import pyro.distributions as dist
from torch import Tensor

from pvae.ops import soft_clamp

from .base import Likelihood, is_count

__all__ = ["LOG_RATE_RANGE", "Poisson"]

#: Range of log-rates, approached smoothly: an exponential in single precision overflows beyond 88.
LOG_RATE_RANGE = (-15.0, 15.0)


class Poisson(Likelihood):
    r"""Independent counts.

    .. math:: p(x \mid z) = \prod_i \frac{\lambda_i^{x_i} e^{-\lambda_i}}{x_i!}

    The decoder outputs :math:`\log \lambda`, shape ``x_shape``, kept smoothly within
    :data:`LOG_RATE_RANGE`.
    """

    values = frozenset({"count"})

    def forward(self, params: Tensor) -> dist.TorchDistribution:
        """Return p(x | z) for log-rates ``params``, shape ``(*batch, *x_shape)``."""
        rate = soft_clamp(params, *LOG_RATE_RANGE).exp()
        return dist.Poisson(rate).to_event(self._event_dim(params))

    def _supports(self, x: Tensor) -> Tensor:
        return is_count(x)

    def _refusal(self, value: float) -> str:
        return (
            f"Poisson needs x in {{0, 1, 2, ...}}, got values such as {value:.3g}: load the data with "
            "scale='count'"
        )
