r"""Amortised diagonal Gaussian guide (Kingma & Welling 2014, arXiv:1312.6114v10, eq. 9)."""

import inspect
from typing import Any, Literal

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pvae.distributions import AnalyticEntropyNormal
from pvae.nn import Encoder

__all__ = ["NormalGuide", "takes_labels"]


class NormalGuide(nn.Module):
    r"""Independent Gaussian posteriors.

    .. math:: q(z \mid x, y) = \mathcal N(z \mid \mu(x, y), \mathrm{diag}\, \sigma^2(x, y))

    Args:
        encoder: Maps ``(B, *x_shape)``, and the labels where there are any, to ``(loc, scale)``, each
            ``(B, z_dim)``. An encoder that is no :class:`pvae.nn.Encoder` is given the labels where it has an
            argument ``y``.
        entropy: What stands for log q(z) in a training bound: ``"sampled"``, its value at the draw, or
            ``"analytic"``, its mean (:class:`pvae.distributions.AnalyticEntropyNormal`: other figures,
            same gradient; not for importance-weighted objectives). Evaluation always takes the density.

    Raises:
        ValueError: If ``entropy`` is another word.
    """

    def __init__(self, encoder: nn.Module, entropy: Literal["sampled", "analytic"] = "sampled") -> None:
        super().__init__()
        if entropy not in ("sampled", "analytic"):
            raise ValueError(f"entropy must be 'sampled' or 'analytic', got {entropy!r}")
        self.encoder = encoder
        self.entropy = entropy

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z`` for ``x``, shape ``(*particles, B, z_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            sees_y = y is not None and takes_labels(self.encoder)
            loc, scale = self.encoder(x, y) if sees_y else self.encoder(x)
            if self.entropy == "analytic":
                return pyro.sample("z", AnalyticEntropyNormal(loc, scale))
            return pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def takes_labels(encoder: Any) -> bool:
    """Whether an encoder has a place for labels: one of ours, or one with an argument ``y``."""
    if isinstance(encoder, Encoder):
        return True
    return "y" in inspect.signature(getattr(encoder, "forward", encoder)).parameters
