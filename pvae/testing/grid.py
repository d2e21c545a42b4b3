r"""Quadrature over one or two real dimensions, and the probability integral transform on its nodes.

The substitution :math:`u = c + s \sinh(\frac\pi2 \sinh t)` (Takahasi & Mori 1974) under the trapezoidal
rule: it converges geometrically for analytic densities and reaches the tails of a Cauchy.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .statistics import location

__all__ = ["Grid"]

_SPAN = 3.0
_NODES = {1: 8001, 2: 481}
_CHUNK = 2**16


class Grid:
    """Nodes that have settled on one density over ``dim`` real dimensions, for each element of a batch.

    Args:
        log_prob: Log-density: takes ``u``, shape ``(nodes, *batch, dim)``, gives shape ``(nodes, *batch)``.
        start: Points near the density, shape ``(num_samples, *batch, dim)`` with ``dim`` 1 or 2.
    """

    def __init__(self, log_prob: Callable[[Tensor], Tensor], start: Tensor) -> None:
        self.dim = start.shape[-1]
        self.num_nodes = _NODES[self.dim]
        self.t = torch.linspace(-_SPAN, _SPAN, self.num_nodes, dtype=torch.float64)
        self._log_prob = log_prob
        self.centre, self.scale = location(start)
        for _ in range(6):
            self._fill()
            centre, scale = self._settled()
            change = ((centre - self.centre).abs() / self.scale).max() + (
                scale / self.scale
            ).log().abs().max()
            if not change > 0.1:
                break
            self.centre, self.scale = centre, scale

    @property
    def integral(self) -> Tensor:
        """Integral of the density, shape ``(*batch)``."""
        return self.mass.sum(tuple(range(self.dim)))

    @property
    def coarse_integral(self) -> Tensor:
        """The same rule with twice the step: its distance from :attr:`integral` bounds the error."""
        every = (slice(None, None, 2),) * self.dim
        return self.mass[every].sum(tuple(range(self.dim))) * 2**self.dim

    @property
    def entropy(self) -> Tensor:
        """Minus the integral of ``p log p``, shape ``(*batch)``."""
        terms = torch.where(self.mass > 0, self.mass * self.log_density, 0.0)
        return -terms.sum(tuple(range(self.dim)))

    def uniforms(self, u: Tensor) -> Tensor:
        """Map ``u``, shape ``(num_samples, *batch, dim)``, to what the density makes uniform on the cube.

        The first coordinate goes through its distribution function, the second through its own given
        the first (Rosenblatt 1952).
        """
        t = torch.asinh(torch.asinh((u - self.centre) / self.scale) * 2 / math.pi)
        columns = []
        for index in range(math.prod(self.centre.shape[:-1])):
            mass = self.mass.reshape(*self.mass.shape[: self.dim], -1)[..., index]
            place = ((t.reshape(len(t), -1, self.dim)[:, index] + _SPAN) / (self.t[1] - self.t[0])).clamp(
                0, self.num_nodes - 1.001
            )
            columns.append(_rosenblatt(mass, place))
        return torch.stack(columns, 1).reshape(u.shape)

    def _fill(self) -> None:
        step = self.t[1] - self.t[0]
        inner = math.pi / 2 * self.t.sinh()
        node, slope = inner.sinh(), inner.cosh() * math.pi / 2 * self.t.cosh()
        index = torch.cartesian_prod(*[torch.arange(self.num_nodes)] * self.dim).reshape(-1, self.dim)
        view = (len(index),) + (1,) * (self.centre.ndim - 1) + (self.dim,)
        u = node[index].reshape(view)
        parts = [self._log_prob(self.centre + self.scale * part) for part in u.split(_CHUNK)]
        log_prob = torch.cat(parts)
        log_weight = (
            slope[index].log().sum(-1).reshape(view[:-1]) + self.scale.log().sum(-1) + self.dim * step.log()
        )
        shape = (self.num_nodes,) * self.dim + log_prob.shape[1:]
        self.log_density = log_prob.reshape(shape)
        self.mass = (log_prob + log_weight).exp().reshape(shape)

    def _settled(self) -> tuple[Tensor, Tensor]:
        """Median and spread of each coordinate under the mass on the nodes."""
        centres, scales = [], []
        inner = math.pi / 2 * self.t.sinh()
        for axis in range(self.dim):
            marginal = self.mass.sum([d for d in range(self.dim) if d != axis]) if self.dim > 1 else self.mass
            total = marginal.cumsum(0) / marginal.sum(0)
            low, middle, high = (
                inner[(total < level).sum(0).clamp(max=self.num_nodes - 1)].sinh()
                for level in (0.16, 0.5, 0.84)
            )
            centres.append(self.centre[..., axis] + self.scale[..., axis] * middle)
            scales.append(self.scale[..., axis] * ((high - low) / 2).clamp(min=1e-3))
        return torch.stack(centres, -1), torch.stack(scales, -1)


def _cumulative(mass: Tensor) -> Tensor:
    """Trapezoidal distribution function along the last axis, zero at its first node."""
    return torch.cat([torch.zeros_like(mass[..., :1]), ((mass[..., 1:] + mass[..., :-1]) / 2).cumsum(-1)], -1)


def _interpolate(table: Tensor, place: Tensor) -> Tensor:
    low = place.long()
    return torch.lerp(table[low], table[low + 1], place - low)


def _rosenblatt(mass: Tensor, place: Tensor) -> Tensor:
    """Uniforms of samples at fractional node positions ``place``, shape ``(num_samples, dim)``."""
    if mass.ndim == 1:
        total = _cumulative(mass)
        return (_interpolate(total, place[:, 0]) / total[-1]).unsqueeze(-1)
    along = _cumulative(mass.sum(1))
    rows = _cumulative(mass)
    row, column = place.long().unbind(-1)
    part = (place - place.long()).unbind(-1)
    ends = [torch.lerp(rows[row + i, column], rows[row + i, column + 1], part[1]) for i in (0, 1)]
    totals = [rows[row + i, -1] for i in (0, 1)]
    given = torch.lerp(ends[0], ends[1], part[0]) / torch.lerp(totals[0], totals[1], part[0]).clamp(
        min=1e-300
    )
    return torch.stack([_interpolate(along, place[:, 0]) / along[-1], given], -1)
