r"""Discretised logistic mixture (Salimans et al. 2017, PixelCNN++, arXiv:1701.05517v1, sec. 2.1 and 2.2)."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from pvae.ops import sample_categorical

__all__ = ["DiscretizedLogisticMixture", "LevelGrid"]


class DiscretizedLogisticMixture(TorchDistribution):
    r"""Images whose pixels are mixtures of logistics, rounded to ``levels`` equally spaced values.

    With :math:`\delta = 1 / (levels - 1)` the spacing of the grid on [0, 1], a pixel with channels
    :math:`x_1, \dots, x_C` has

    .. math::
        P(x) = \sum_k \pi_k \prod_c \left[ \sigma\!\left(\frac{x_c + \delta/2 - m_{kc}}{s_{kc}}\right)
               - \sigma\!\left(\frac{x_c - \delta/2 - m_{kc}}{s_{kc}}\right) \right],
        \quad m_{kc} = \mu_{kc} + \sum_{j < c} a_{kcj} \left( x_j - \tfrac12 \right)

    where the bins of the levels 0 and 1 reach to :math:`\mp\infty`: the masses of all levels sum to one.
    The means are PixelCNN++'s: its green mean is red's linear function on pixels scaled to [-1, 1], which
    is the same as on the centred :math:`x - 1/2`. The mixture index is shared by the channels of a pixel.

    The mass of a bin :math:`(a, b)` of the standard logistic is computed by the identity

    .. math:: \log[\sigma(b) - \sigma(a)] = \log\sigma(b) + \log\sigma(-a) + \log(1 - e^{-(b - a)})

    in which nothing cancels, however small the scale or far the tail: no approximation by the density in
    mid-bin is needed.

    Args:
        logits: Unnormalised log-weights, shape ``(*batch, K, H, W)``.
        loc: :math:`\mu`, in the units of x, shape ``(*batch, K, C, H, W)``.
        scale: :math:`s`, positive, in the units of x, shape ``(*batch, K, C, H, W)``.
        coefficients: :math:`a`, shape ``(*batch, K, C (C - 1) / 2, H, W)``, in the order 21, 31, 32, ...;
            ``None`` for none (independent channels given the index).
        levels: Number of grey levels, at least 2.
        validate_args: Whether arguments and values are checked; Pyro's setting if ``None``.

    Raises:
        ValueError: If the shapes do not agree, or there are fewer than two levels.
    """

    has_rsample = False
    arg_constraints = {  # noqa: RUF012
        "logits": constraints.real,
        "loc": constraints.real,
        "scale": constraints.positive,
    }

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        coefficients: Tensor | None = None,
        levels: int = 256,
        validate_args: bool | None = None,
    ) -> None:
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        _check_shapes(logits, loc, scale, coefficients)
        parts = [part for part in (loc, scale, coefficients) if part is not None]
        batch = torch.broadcast_shapes(logits.shape[:-3], *(part.shape[:-4] for part in parts))
        self.logits, self.loc, self.scale, self.coefficients = logits, loc, scale, coefficients
        self.levels = levels
        super().__init__(batch, loc.shape[-3:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=3)
    def support(self) -> constraints.Constraint:
        """Images on the grid ``k / (levels - 1)``."""
        return constraints.independent(LevelGrid(self.levels), 3)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "DiscretizedLogisticMixture":
        """Return the distribution with its parameters expanded to ``batch_shape``."""
        new = self._get_checked_instance(DiscretizedLogisticMixture, _instance)
        batch = torch.Size(batch_shape)
        new.logits = self.logits.expand(batch + self.logits.shape[-3:])
        new.loc = self.loc.expand(batch + self.loc.shape[-4:])
        new.scale = self.scale.expand(batch + self.scale.shape[-4:])
        coefficients = self.coefficients
        if coefficients is not None:
            coefficients = coefficients.expand(batch + coefficients.shape[-4:])
        new.coefficients = coefficients
        new.levels = self.levels
        super(DiscretizedLogisticMixture, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw images on the grid, shape ``(*sample_shape, *batch_shape, C, H, W)``."""
        with torch.no_grad():
            lead = (*sample_shape, *self.batch_shape)
            index = sample_categorical(self.logits.expand(*lead, *self.logits.shape[-3:]), dim=-3)

            def chosen(part: Tensor) -> Tensor:
                # (*lead, K, n, H, W) to (*lead, n, H, W)
                part = part.expand(*lead, *part.shape[-4:])
                at = index[..., None, None, :, :].expand(*lead, 1, *part.shape[-3:])
                return part.gather(-4, at).squeeze(-4)

            loc, scale = chosen(self.loc), chosen(self.scale)
            coefficients = None if self.coefficients is None else chosen(self.coefficients)
            x: list[Tensor] = []
            for c in range(self.event_shape[0]):
                u = torch.rand((*lead, *self.event_shape[1:]), dtype=loc.dtype, device=loc.device)
                logistic = torch.logit(u, eps=torch.finfo(u.dtype).eps)
                y = _conditional_loc(loc, coefficients, x) + scale[..., c, :, :] * logistic
                x.append((y * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1))
            return torch.stack(x, dim=-3)

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log-mass in nats of images on the grid (others count as the level next to them).

        Args:
            value: Shape ``(*batch, C, H, W)``, in [0, 1].

        Returns:
            Shape ``(*batch)``.
        """
        if self._validate_args:
            self._validate_sample(value)
        level = (value * (self.levels - 1)).round().unsqueeze(-4)
        x = (level / (self.levels - 1)).unbind(-3)
        log_mass = torch.log_softmax(self.logits, dim=-3)
        for c in range(len(x)):
            loc = _conditional_loc(self.loc, self.coefficients, x[:c])
            log_mass = log_mass + self._log_mass(level[..., c, :, :], loc, self.scale[..., c, :, :])
        return torch.logsumexp(log_mass, dim=-3).sum((-2, -1))

    def _log_mass(self, level: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """Log-mass of a level under one logistic; arguments broadcast."""
        width = 1.0 / ((self.levels - 1) * scale)  # b - a
        lower = ((level - 0.5) / (self.levels - 1) - loc) / scale
        first, last = level <= 0, level >= self.levels - 1
        above = F.logsigmoid(-lower).masked_fill(first, 0.0)
        below = F.logsigmoid(lower + width).masked_fill(last, 0.0)
        inside = torch.log(-torch.expm1(-width)).masked_fill(first | last, 0.0)
        return above + below + inside

    @property
    def mean(self) -> Tensor:
        r"""Mean image in the units of x, shape ``(*batch_shape, C, H, W)``.

        Exact for the first channel, so for grey images. For a later channel it is the weighted sum over
        components of that channel's exact mean given the component's means of the channels before it:
        exact but for the rounding and clipping in :math:`\mathrm E[x_c \mid x_{<c}]`, otherwise linear.

        The cost is that of ``levels`` evaluations of every component's distribution function.
        """
        weights = torch.softmax(self.logits, dim=-3)
        means: list[Tensor] = []
        for c in range(self.event_shape[0]):
            loc = _conditional_loc(self.loc, self.coefficients, means)
            means.append(self._level_mean(loc, self.scale[..., c, :, :]))
        mean = torch.stack([(weights * m).sum(-3) for m in means], dim=-3)
        return mean.expand(self._extended_shape())

    def _level_mean(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Exact mean of one rounded logistic: the sum over the edges between levels of the mass above."""
        step = 1.0 / (self.levels - 1)
        total = torch.zeros_like(loc + scale)
        for edge in range(self.levels - 1):
            total = total + torch.sigmoid((loc - (edge + 0.5) * step) / scale)
        return total * step


class LevelGrid(constraints.Constraint):
    """The grid ``k / (levels - 1)``, ``k = 0, ..., levels - 1``, to within a hundredth of its spacing."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each entry is on the grid, shape of ``value``."""
        level = value * (self.levels - 1)
        nearest = level.round().clamp(0, self.levels - 1)
        return (level - nearest).abs() <= 0.01


def _conditional_loc(loc: Tensor, coefficients: Tensor | None, before: Sequence[Tensor]) -> Tensor:
    """Location of the next channel given those ``before`` it: ``(..., C, H, W)`` to ``(..., H, W)``."""
    c = len(before)
    m = loc[..., c, :, :]
    if coefficients is not None:
        first = c * (c - 1) // 2
        for j, x in enumerate(before):
            m = m + coefficients[..., first + j, :, :] * (x - 0.5)
    return m


def _check_shapes(logits: Tensor, loc: Tensor, scale: Tensor, coefficients: Tensor | None) -> None:
    fits = logits.ndim >= 3 and loc.ndim >= 4
    if fits:
        components, *plane = logits.shape[-3:]
        channels = loc.shape[-3]
        pairs = channels * (channels - 1) // 2
        expected = [(loc, channels), (scale, channels)]
        if coefficients is not None:
            expected.append((coefficients, pairs))
        fits = all(part.shape[-4:] == (components, size, *plane) for part, size in expected)
    if not fits:
        came = [None if part is None else tuple(part.shape) for part in (logits, loc, scale, coefficients)]
        raise ValueError(
            "logits, loc, scale, coefficients must have shapes (*batch, K, H, W), (*batch, K, C, H, W), "
            f"(*batch, K, C, H, W), (*batch, K, C (C - 1) / 2, H, W), got {', '.join(map(str, came))}"
        )
