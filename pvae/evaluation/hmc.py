r"""Hamiltonian Monte Carlo between two densities, many chains at once (Neal 2011, arXiv:1206.1901v1).

.. math:: \log f_\beta(z) = (1 - \beta) \log f_0(z) + \beta \log f_1(z)

One transition draws a momentum, follows Hamilton's equations for a number of leapfrog steps, and accepts the
end or stays. It leaves :math:`f_\beta` invariant and is reversible: run backwards in time it
is itself. Steps are given, never changed by the chain they move.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Noise", "Point", "transition"]

# Steps of a transition are multiplied by one random number of this reach, independent of the state: a mixture
# of reversible transitions is reversible, and no trajectory comes back to its start for being a period long.
_JITTER = 0.2


@dataclass(frozen=True)
class Point:
    """States of K chains for each of B data, with both log-densities and their gradients there.

    Attributes:
        z: States, shape ``(K, B, D)``.
        log_start: :math:`\\log f_0` in nats, shape ``(K, B)``, double precision.
        log_end: :math:`\\log f_1`.
        grad_start: Gradient of ``log_start``, shape ``(K, B, D)``.
        grad_end: Gradient of ``log_end``.
    """

    z: Tensor
    log_start: Tensor
    log_end: Tensor
    grad_start: Tensor
    grad_end: Tensor

    def log_density(self, beta: float) -> Tensor:
        """Log-density on the path, shape ``(K, B)``."""
        return (1 - beta) * self.log_start + beta * self.log_end

    def gradient(self, beta: float) -> Tensor:
        """Gradient on the path, shape ``(K, B, D)``."""
        return (1 - beta) * self.grad_start + beta * self.grad_end

    def where(self, chosen: Tensor, other: "Point") -> "Point":
        """Take the chains that are ``chosen`` ``(K, B)`` from here and the rest from ``other``."""
        wide = chosen.unsqueeze(-1)
        return Point(
            torch.where(wide, self.z, other.z),
            torch.where(chosen, self.log_start, other.log_start),
            torch.where(chosen, self.log_end, other.log_end),
            torch.where(wide, self.grad_start, other.grad_start),
            torch.where(wide, self.grad_end, other.grad_end),
        )


class Noise:
    """Random numbers of chains, from one generator for each block of data: independent of what is batched.

    Args:
        seeds: One seed for each block.
        num_chains: Chains of each datum.
        block: Data of a block; draws are made for all of them, also where fewer are left.
        num_data: Data there are in all blocks together.
        like: A tensor of the chains' device and type.
    """

    def __init__(self, seeds: list[int], num_chains: int, block: int, num_data: int, like: Tensor) -> None:
        self._generators = [torch.Generator(like.device).manual_seed(seed) for seed in seeds]
        self._shape = (num_chains, block)
        self._num_data = num_data
        self._kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype}

    def normal(self, size: int) -> Tensor:
        """Standard normal numbers, shape ``(K, B, size)``."""
        parts = [torch.randn((*self._shape, size), generator=g, **self._kind) for g in self._generators]
        return torch.cat(parts, 1)[:, : self._num_data]

    def uniform(self) -> Tensor:
        """Numbers in [0, 1), shape ``(K, B)``."""
        parts = [torch.rand(self._shape, generator=g, **self._kind) for g in self._generators]
        return torch.cat(parts, 1)[:, : self._num_data]


def transition(
    density: Callable[[Tensor], Point],
    point: Point,
    beta: float,
    step: Tensor,
    num_leapfrog: int,
    noise: Noise,
) -> tuple[Point, Tensor]:
    r"""Move every chain once at temperature ``beta``, at the price of ``num_leapfrog`` gradients.

    Steps differ by dimension, which is a diagonal mass matrix :math:`M = \mathrm{diag}(step^{-2})`.

    Args:
        density: Evaluates both densities at states ``(K, B, D)``.
        point: Where the chains are.
        beta: Place on the path.
        step: Leapfrog steps, shape ``(B, D)``, in the units of z.
        num_leapfrog: Leapfrog steps of a trajectory.
        noise: Random numbers of these chains.

    Returns:
        Where they are after it, and the probability with which each was to move, shape ``(K, B)``. A
        trajectory that ends in a number that is not finite is never accepted.
    """
    step = step * (1 + _JITTER * (2 * noise.uniform() - 1)).unsqueeze(-1)
    momentum = noise.normal(point.z.shape[-1])
    before = point.log_density(beta) - _kinetic(momentum)
    end = point
    momentum = momentum + 0.5 * step * point.gradient(beta)
    for i in range(num_leapfrog):
        end = density(end.z + step * momentum)
        last = i + 1 == num_leapfrog
        momentum = momentum + (0.5 if last else 1.0) * step * end.gradient(beta)
    log_ratio = end.log_density(beta) - _kinetic(momentum) - before
    probability = log_ratio.clamp(max=0).exp().nan_to_num(0.0, 0.0, 0.0)
    return end.where(noise.uniform() < probability, point), probability


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(-1)
