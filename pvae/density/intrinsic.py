"""Intrinsic dimension from the two nearest neighbours (Facco et al. 2017, doi:10.1038/s41598-017-11873-y)."""

import math
from typing import Literal

import numpy as np

from .neighbours import Floats

__all__ = ["two_nn"]


def two_nn(radii: Floats, *, method: Literal["fit", "mle"] = "fit", fraction: float = 0.9) -> float:
    r"""Estimate the dimension of the manifold on which the data lie.

    Where the density hardly changes up to the second neighbour, :math:`\mu = r_2 / r_1` has
    :math:`P(\mu > t) = t^{-D}`, whatever the density.

    Args:
        radii: Distances to the nearest neighbours, shape ``(N, k)``, ``k`` at least 2, ascending.
        method: ``"fit"``: line through the origin of :math:`-\log(1 - i/N)` on the sorted
            :math:`\log \mu_{(i)}`; ``"mle"``: :math:`(N - 1) / \sum_i \log \mu_i`.
        fraction: Share of the data, those of smallest :math:`\mu`, that the line is fitted to: the largest
            ratios come from sparse regions, where the density changes.

    Returns:
        The dimension, a positive number, not rounded.

    Raises:
        ValueError: If a setting does not fit, a distance to a first neighbour is zero, or all first and
            second neighbours are equally far, as on a grid.
    """
    if radii.ndim != 2 or radii.shape[1] < 2 or len(radii) < 3:
        raise ValueError(
            f"radii must have shape (N, k) with N at least 3 and k at least 2, got {radii.shape}"
        )
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    if method not in ("fit", "mle"):
        raise ValueError(f"method must be 'fit' or 'mle', got {method!r}")
    if not (radii[:, 0] > 0).all():
        raise ValueError(
            f"radii must be positive, got {int((radii[:, 0] <= 0).sum())} first neighbours at distance 0"
        )
    log_mu = np.sort(np.log(radii[:, 1]) - np.log(radii[:, 0]))
    total = len(log_mu)
    if method == "fit":
        log_mu = log_mu[: max(1, math.floor(fraction * total))]
    if log_mu[-1] == 0:
        raise ValueError(
            "the points must have first and second neighbours at different distances, got equal ones, as "
            "on a grid: give the dimension as dim"
        )
    if method == "mle":
        return float((total - 1) / log_mu.sum())
    height = -np.log1p(-np.arange(1, len(log_mu) + 1) / total)
    return float(log_mu @ height / (log_mu @ log_mu))
