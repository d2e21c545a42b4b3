"""Coordinates in which one sample has mean 0 and covariance I."""

import torch
from torch import Tensor

__all__ = ["whitened"]


def whitened(reference: Tensor, *samples: Tensor) -> tuple[Tensor, ...]:
    """Take samples to coordinates where the reference has the moments 0 and 1.

    Args:
        reference: Points, shape ``(n, d)``, ``n >= 2``.
        *samples: Points, shape ``(m, d)``, each.

    Returns:
        The samples, in double precision on the CPU. A direction in which the reference does not move keeps
        a scale of its own. A reference of fewer than two points a dimension, whose covariance says little,
        sets the scales of single dimensions alone.
    """
    reference = reference.detach().cpu().double()
    loc = reference.mean(0)
    if len(reference) < 2 * reference.shape[1]:
        spread = reference.std(0)
        spread = spread.clamp(min=1e-5 * float(spread.max().clamp(min=1e-15)))
        return tuple((sample.detach().cpu().double() - loc) / spread for sample in samples)
    value, vector = torch.linalg.eigh(torch.cov(reference.T).reshape(reference.shape[1], -1))
    root = value.clamp(min=1e-10 * float(value.max().clamp(min=1e-30))).rsqrt()
    return tuple((sample.detach().cpu().double() - loc) @ vector * root for sample in samples)
