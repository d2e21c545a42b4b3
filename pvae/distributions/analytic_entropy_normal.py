r"""Diagonal normal that enters an ELBO by its entropy in closed form (De 2025, arXiv:2511.08946)."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor

__all__ = ["AnalyticEntropyNormal"]


class AnalyticEntropyNormal(dist.Independent):
    r"""Diagonal normal over z whose part in an ELBO is the expectation of its log-density.

    .. math:: \mathbb E_q \log q(z) = -\mathcal H[q]
              = -\sum_j \Bigl( \log \sigma_j + \tfrac12 \log 2 \pi e \Bigr)

    ``log_prob`` is exact, and is all that an evaluation asks for. :meth:`score_parts` puts
    :math:`-\mathcal H` in the place of log q at the draw, so that :class:`pvae.inference.ELBO` estimates
    KL(q || p) by :math:`-\mathcal H - \log p(z)`. This changes the spread of the figure that is reported,
    in either direction (sampled, it is exactly zero at q = p). It does not change the
    gradient: along a reparameterised draw, log q(z) and :math:`-\mathcal H` differ by a function of the noise
    alone.

    A mean of log q is no log q: inside the logarithm of an importance-weighted objective it would give no
    bound, and those objectives refuse it.

    Args:
        loc: Mean, shape ``(*batch, z_dim)``.
        scale: Standard deviations, positive, shape ``(*batch, z_dim)``.
        validate_args: Whether arguments and values are checked; Pyro's setting if ``None``.

    Attributes:
        analytic_entropy: True: the entropy term of :meth:`score_parts` is a mean over z in value too.

    Example:
        >>> import torch
        >>> q = AnalyticEntropyNormal(torch.zeros(5, 2), torch.ones(5, 2))
        >>> q.expand([3, 5]).score_parts(q.rsample()).entropy_term.shape
        torch.Size([3, 5])
    """

    analytic_entropy = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(dist.Normal(loc, scale, validate_args=validate_args), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "AnalyticEntropyNormal":
        """Return the same normals, broadcast to ``batch_shape``."""
        new = self._get_checked_instance(AnalyticEntropyNormal, _instance)
        return super().expand(batch_shape, _instance=new)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return log q(x) in nats, no score function, and minus the entropy, in the shape of log q(x)."""
        log_prob = self.log_prob(x)
        return ScoreParts(log_prob, 0, (-self.entropy()).expand_as(log_prob))
