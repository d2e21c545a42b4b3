"""Continuous Bernoulli likelihood of grey values (Loaiza-Ganem & Cunningham 2019, arXiv:1907.06845)."""

from pyro.distributions import TorchDistribution
from torch import Tensor

from pvae import distributions

from .base import Likelihood

__all__ = ["ContinuousBernoulli"]


class ContinuousBernoulli(Likelihood):
    r"""Independent densities on [0, 1], the Bernoulli's with its normalising constant.

    .. math:: p(x \mid z) = \prod_i \frac{\eta_i / 2}{\sinh(\eta_i / 2)} \, e^{\eta_i (x_i - 1/2)}

    The decoder outputs :math:`\eta`, shape ``x_shape``. The log-density is in nats per image on [0, 1].
    """

    values = frozenset({"unit"})

    def forward(self, params: Tensor) -> TorchDistribution:
        r"""Return p(x | z) for :math:`\eta` = ``params``, shape ``(*batch, *x_shape)``."""
        return distributions.ContinuousBernoulli(params).to_event(self._event_dim(params))

    def _supports(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x <= 1)

    def _refusal(self, value: float) -> str:
        return (
            f"ContinuousBernoulli needs x in [0, 1], got values such as {value:.3g}: load the data with "
            "scale='unit', or use Normal"
        )
