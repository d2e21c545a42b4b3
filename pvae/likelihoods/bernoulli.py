"""Bernoulli likelihood of binary data."""

import pyro.distributions as dist
from torch import Tensor

from pvae.distributions import IndependentBernoulli

from .base import Likelihood

__all__ = ["Bernoulli"]


class Bernoulli(Likelihood):
    r"""Independent bits.

    .. math:: p(x \mid z) = \prod_i \sigma(\eta_i)^{x_i} \sigma(-\eta_i)^{1 - x_i}

    The decoder outputs the logits :math:`\eta`, shape ``x_shape``.
    """

    values = frozenset({"binary"})

    def forward(self, params: Tensor) -> dist.TorchDistribution:
        """Return p(x | z) for logits ``params``, shape ``(*batch, *x_shape)``."""
        return IndependentBernoulli(params, self._event_dim(params))

    def _supports(self, x: Tensor) -> Tensor:
        return (x == 0) | (x == 1)

    def _refusal(self, value: float) -> str:
        kind = "grey values" if 0 < value < 1 else "values"
        return (
            f"Bernoulli needs x in {{0, 1}}, got {kind} such as {value:.3g}: load the data with "
            "binarize='dynamic', 'static' or 'threshold', or use ContinuousBernoulli, Normal or "
            "DiscretizedLogisticMixture"
        )
