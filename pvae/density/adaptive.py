"""How many neighbours a point shares its density with: a likelihood-ratio test for each count."""

import math

import numpy as np
from numpy.typing import NDArray

from .neighbours import Floats, Neighbours

__all__ = ["LEAST", "Counts", "adaptive_counts", "likelihood_ratio"]

Counts = NDArray[np.int64]

LEAST = 3
"""The first count tested, and so the least that is returned."""


def adaptive_counts(near: Neighbours, log_radii: Floats, dim: float, threshold: float) -> Counts:
    """Return the first k at which a point and its (k+1)-th neighbour j differ in density, at most K - 1.

    Args:
        near: The K nearest data of each point, shapes ``(M, K)``.
        log_radii: Logarithms of the data's own neighbour distances, shape ``(N, K)``.
        dim: D of the volumes.
        threshold: :func:`likelihood_ratio` above which the densities differ.

    Returns:
        Shape ``(M,)``, int64, between 3 and ``K - 1``.
    """
    most = near.radii.shape[1] - 1
    counts = np.full(len(near.radii), most, dtype=np.int64)
    rows = np.arange(len(counts))
    for k in range(LEAST, most):
        other = log_radii[near.index[rows, k], k - 1]
        differ = likelihood_ratio(np.log(near.radii[rows, k - 1]) - other, k, dim) > threshold
        counts[rows[differ]] = k
        rows = rows[~differ]
    return counts


def likelihood_ratio(log_ratio: Floats, count: int, dim: float) -> Floats:
    r"""Twice the log-likelihood ratio of a density for each of two points against one for both.

    From the volumes V of the first k neighbours, or the ratio of the distances r to the last of them,

    .. math:: T_k = 2 k \left[ 2 \log \tfrac{V_i + V_j}{2} - \log V_i - \log V_j \right]
        = 4 k \log \cosh \left( \tfrac{D}{2} \log \tfrac{r_i}{r_j} \right)

    of which the second form cannot overflow.

    Args:
        log_ratio: :math:`\log(r_i / r_j)`, any shape.
        count: k.
        dim: D.

    Returns:
        Shape of ``log_ratio``; chi-squared with one degree of freedom where the densities are equal.
    """
    half = np.abs(0.5 * dim * log_ratio)
    # log cosh a = |a| + log(1 + e^{-2|a|}) - log 2
    ratio: Floats = 4 * count * (half + np.log1p(np.exp(-2 * half)) - math.log(2))
    return ratio
