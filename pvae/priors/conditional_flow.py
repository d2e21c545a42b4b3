r"""Prior that a label chooses, behind a flow (De 2025, arXiv:2511.08946v3)."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.distributions import FlowNormal
from pvae.nn import MLP, LabelEmbedding
from pvae.ops import soft_clamp

__all__ = ["ConditionalFlowPrior"]

_LOG_SCALE_RANGE = (-7.0, 5.0)


class ConditionalFlowPrior(nn.Module):
    r"""A Gaussian that depends on the label, behind an invertible map.

    .. math:: f(z; y) \sim \mathcal N(\mu_p(y), \mathrm{diag}\, \sigma_p^2(y)), \qquad
              z = f^{-1}(\mu_p(y) + \sigma_p(y)\, \epsilon; y)

    It starts as :math:`f^{-1}` of a standard normal, :math:`f` being the identity at the start of a
    :class:`CouplingFlow`. The log-scale is kept smoothly between -7 and 5.

    Where the decoder sees y, this prior does not enlarge the set of densities p(x given y): model and guide
    pushed through f are the same programs with a Gaussian prior and the decoder
    :math:`g \circ f^{-1}`. What it changes is the family of posteriors, and how easily both are found.

    The paper and its code draw codes from :math:`\mathcal N(\mu_p, \sigma_p^2)` and leave
    :math:`f^{-1}` out: those are draws of :meth:`base`, not of this prior.

    Args:
        z_dim: Number of latent dimensions.
        labels: Embedding of y.
        flow: Has ``condition(context)``, which returns the transform from z to u: a :class:`CouplingFlow`, a
            :class:`ZukoFlow` or one of Pyro's conditional transform modules. ``None`` for the identity, which
            leaves a learned Gaussian p(z given y).
        flow_context: Whether the flow sees the embedding; if not it is called with ``None``.
        hidden: Widths of the hidden layers between embedding and :math:`\mu_p, \log \sigma_p`.

    Attributes:
        z_dim: Number of latent dimensions.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive, or that of the flow's z or context is another.
    """

    conditional = True

    def __init__(
        self,
        z_dim: int,
        labels: LabelEmbedding,
        flow: nn.Module | None = None,
        flow_context: bool = True,
        hidden: tuple[int, ...] = (64,),
    ) -> None:
        super().__init__()
        context_dim = labels.dim if flow_context else 0
        for name, wanted in (("z_dim", z_dim), ("context_dim", context_dim)):
            came = getattr(flow, name, wanted)
            if came != wanted:
                raise ValueError(f"flow must have {name} = {wanted}, got {came}")
        self.z_dim = z_dim
        self.labels = labels
        self.flow: Any = flow
        self.flow_context = flow_context
        # Both heads in one matrix: rows [0, z_dim) give the location, the others the log-scale.
        self.heads = MLP(labels.dim, 2 * z_dim, hidden, "silu")
        nn.init.zeros_(self.heads.out.weight)
        with torch.no_grad():
            self.heads.out.bias[:z_dim] = 0.0
            self.heads.out.bias[z_dim:] = _soft_clamp_inverse(0.0, *_LOG_SCALE_RANGE)

    def forward(self, y: Tensor) -> dist.TorchDistribution:
        r"""Return :math:`p(z \mid y)`, with the labels' batch shape and ``event_shape (z_dim,)``.

        Args:
            y: Labels as ``labels`` takes them: class numbers ``(*batch,)`` or attributes ``(*batch, size)``.

        Raises:
            ValueError: If there are none.
        """
        h = self._embed(y)
        loc, scale = self._loc_and_scale(h)
        if self.flow is None:
            return dist.Normal(loc, scale).to_event(1)
        return FlowNormal(loc, scale, self.flow.condition(h if self.flow_context else None))

    def base(self, y: Tensor) -> dist.TorchDistribution:
        """Return the distribution of :math:`u = f(z)`, the Gaussian itself, with the same shapes."""
        return dist.Normal(*self._loc_and_scale(self._embed(y))).to_event(1)

    def _embed(self, y: Tensor | None) -> Tensor:
        if y is None:
            raise ValueError("y must be given: ConditionalFlowPrior is conditional")
        return self.labels(y)

    def _loc_and_scale(self, h: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.heads(h).chunk(2, dim=-1)
        return loc, soft_clamp(log_scale, *_LOG_SCALE_RANGE).exp()


def _soft_clamp_inverse(value: float, low: float, high: float) -> float:
    """Solve ``soft_clamp(t, low, high) = value``."""
    inner = math.log(math.expm1(high - value))
    return low + math.log(math.expm1(high - low - inner))
