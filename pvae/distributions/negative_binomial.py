"""Negative binomial distribution that is right in single precision."""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional as F

from pvae.ops import has_float64

__all__ = ["NegativeBinomial"]


class NegativeBinomial(dist.NegativeBinomial):
    r"""Pyro's ``NegativeBinomial`` with a log-mass computed in double precision.

    .. math:: \log p(x) = \log \Gamma(r + x) - \log \Gamma(r) - \log \Gamma(x + 1)
              + r \log \sigma(-\eta) + x \log \sigma(\eta)

    with :math:`r` the ``total_count`` and :math:`\eta` the ``logits``; the mean is :math:`r e^\eta`. The
    gamma functions cancel as :math:`r` grows, which is the Poisson limit: in single precision the parent is
    0.65 nats off at r = 1e6. Values come back in the precision of the parameters. On devices without
    double precision the parent's accuracy remains. Arguments are the parent's.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, shape of ``value`` broadcast against ``batch_shape``."""
        if self._validate_args:
            self._validate_sample(value)
        dtype = torch.float64 if has_float64(value.device) else value.dtype
        r, eta, x = self.total_count.to(dtype), self.logits.to(dtype), value.to(dtype)
        gammas = torch.lgamma(r + x) - torch.lgamma(r) - torch.lgamma(x + 1.0)
        return (gammas + r * F.logsigmoid(-eta) + x * F.logsigmoid(eta)).to(self.logits.dtype)
