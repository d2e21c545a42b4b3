"""Negative binomial likelihood of counts with more spread than the Poisson's."""

from collections.abc import Sequence
from typing import Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pvae import distributions
from pvae.ops import soft_clamp

from .base import Likelihood, is_count, repeated
from .poisson import LOG_RATE_RANGE

__all__ = ["NegativeBinomial"]


class NegativeBinomial(Likelihood):
    r"""Independent counts with mean :math:`m` and variance :math:`m + m^2 / r`.

    .. math:: p(x \mid z) = \prod_i \frac{\Gamma(r + x_i)}{\Gamma(r)\, x_i!}
              \left( \frac{r}{r + m_i} \right)^{r} \left( \frac{m_i}{r + m_i} \right)^{x_i}

    The decoder outputs :math:`\log m`, shape ``x_shape``; with predicted dispersion, shape ``(2 C, ...)``
    for x of shape ``(C, ...)``, it outputs :math:`\log r` after it. Both are kept smoothly within the range
    of the Poisson's log-rates.

    Args:
        dispersion: ``"shared"``: one :math:`r`, a parameter that starts at 1. ``"predicted"``: one for each
            entry of x, from the decoder.

    Raises:
        ValueError: If ``dispersion`` is another word.
    """

    values = frozenset({"count"})

    def __init__(self, dispersion: Literal["shared", "predicted"] = "shared") -> None:
        super().__init__()
        if dispersion not in ("shared", "predicted"):
            raise ValueError(f"dispersion must be 'shared' or 'predicted', got {dispersion!r}")
        self.dispersion = dispersion
        if dispersion == "shared":
            self.log_total_count = nn.Parameter(torch.zeros(()))

    def param_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of x; with predicted dispersion twice as many entries along its first dimension."""
        return repeated(x_shape, 1 if self.dispersion == "shared" else 2)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return p(x | z) for ``params`` of shape ``(*batch, *param_shape(x_shape))``."""
        log_total_count: Tensor
        if self.dispersion == "shared":
            log_mean, log_total_count = params, self.log_total_count
        else:
            stacked, dim = self._unstacked(params, 2)
            log_mean, log_total_count = stacked.unbind(dim)
        log_mean = soft_clamp(log_mean, *LOG_RATE_RANGE)
        log_total_count = soft_clamp(log_total_count, *LOG_RATE_RANGE)
        return distributions.NegativeBinomial(
            log_total_count.exp(), logits=log_mean - log_total_count
        ).to_event(self._event_dim(params))

    def _supports(self, x: Tensor) -> Tensor:
        return is_count(x)

    def _refusal(self, value: float) -> str:
        return (
            f"NegativeBinomial needs x in {{0, 1, 2, ...}}, got values such as {value:.3g}: load the data "
            "with scale='count'"
        )
