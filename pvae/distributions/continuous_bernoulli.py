r"""Continuous Bernoulli distribution (Loaiza-Ganem & Cunningham 2019, arXiv:1907.06845)."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["ContinuousBernoulli"]


class ContinuousBernoulli(TorchDistribution):
    r"""Density on [0, 1] proportional to :math:`p^x (1 - p)^{1 - x}`.

    With :math:`\eta` the logit of :math:`p` and :math:`h = \eta / 2`,

    .. math:: \log p(x) = \eta \, (x - \tfrac12) - \log \frac{\sinh h}{h},
              \qquad \mathrm E\, x = \tfrac12 + \tfrac12 \left( \coth h - \frac1h \right)

    PyTorch's class works from clamped probabilities: in single precision it is 0.23 nats off at
    :math:`\eta = -20` and 4.1 at -1000. Here everything is a function of the logit: a series around
    zero, exponentials of negative numbers elsewhere; accurate for every logit.

    Args:
        logits: :math:`\eta`, any shape.
        validate_args: Whether arguments and values are checked; Pyro's setting if ``None``.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012
    support = constraints.unit_interval
    has_rsample = False

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "ContinuousBernoulli":
        """Return the distribution with its parameters expanded to ``batch_shape``."""
        new = self._get_checked_instance(ContinuousBernoulli, _instance)
        new.logits = self.logits.expand(batch_shape)
        super(ContinuousBernoulli, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw x by inverting the distribution function, shape ``(*sample_shape, *batch_shape)``."""
        with torch.no_grad():
            u = torch.rand(
                self._extended_shape(sample_shape), dtype=self.logits.dtype, device=self.logits.device
            )
            # Solved for -|eta|, where nothing overflows, and mirrored. Under the floor the density is
            # uniform to within rounding.
            rate = self.logits.abs().clamp(min=torch.finfo(u.dtype).eps)
            x = (-torch.log1p(u * torch.expm1(-rate)) / rate).clamp(0.0, 1.0)
            return torch.where(self.logits > 0, 1.0 - x, x)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, shape of ``value`` broadcast against ``batch_shape``."""
        if self._validate_args:
            self._validate_sample(value)
        return self.logits * (value - 0.5) - _log_sinhc(0.5 * self.logits)

    @property
    def mean(self) -> Tensor:
        """Mean of x, shape ``batch_shape``."""
        return 0.5 + 0.5 * _langevin(0.5 * self.logits)


# log(sinh h / h) = sum_n _SERIES[n - 1] h^2n for |h| < pi; the terms left out are under 2e-17 at |h| = 1/2.
_SERIES = (
    1 / 6,
    -1 / 180,
    1 / 2835,
    -1 / 37800,
    1 / 467775,
    -691 / 3831077250,
    2 / 127702575,
    -3617 / 2605132530000,
    43867 / 350813659321125,
)
_SMALL = 0.5


def _log_sinhc(h: Tensor) -> Tensor:
    r""":math:`\log(\sinh h / h)`, even and smooth, zero at zero."""
    small = h.abs() < _SMALL
    square = h.masked_fill(~small, 0.0).square()
    series = torch.zeros_like(square)
    for coefficient in reversed(_SERIES):
        series = (series + coefficient) * square
    # Each branch is given harmless numbers where the other is taken, lest its gradient be NaN there.
    a = h.abs().masked_fill(small, 1.0)
    return torch.where(small, series, a + torch.log(-torch.expm1(-2.0 * a)) - torch.log(2.0 * a))


def _langevin(h: Tensor) -> Tensor:
    r""":math:`\coth h - 1 / h`, odd and smooth: the derivative of :func:`_log_sinhc`."""
    small = h.abs() < _SMALL
    near = h.masked_fill(~small, 0.0)
    square = near.square()
    series = torch.zeros_like(square)
    for n, coefficient in reversed(list(enumerate(_SERIES, start=1))):
        series = series * square + 2 * n * coefficient
    far = h.masked_fill(small, 1.0)
    return torch.where(small, series * near, 1.0 / torch.tanh(far) - 1.0 / far)
