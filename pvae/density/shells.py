"""Log-densities, up to the logarithm of the number of data, from the volumes between neighbours."""

import math
from collections.abc import Callable

import numpy as np

from .adaptive import Counts
from .neighbours import Floats

__all__ = ["corrected", "log_shells", "log_unit_ball", "solve_tilt", "uncorrected"]

_ROWS = 8192
_STEPS = 200
# Relative to k; the density is exact to the square of it, times k.
_RESIDUAL = 1e-12


def log_unit_ball(dim: float) -> float:
    r"""Logarithm of the volume of the unit ball, :math:`\pi^{D/2} / \Gamma(D/2 + 1)`."""
    return 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1)


def log_shells(radii: Floats, dim: float) -> Floats:
    r"""Logarithms of :math:`v_l = \omega_D (r_l^D - r_{l-1}^D)`, :math:`r_0 = 0`.

    Args:
        radii: Ascending, positive, shape ``(M, k)``.
        dim: D.

    Returns:
        Shape ``(M, k)``; ``-inf`` between neighbours equally far.
    """
    log_radii = np.log(radii)
    volumes = log_unit_ball(dim) + dim * log_radii
    # The difference of two powers that may each overflow, and may nearly agree.
    with np.errstate(divide="ignore"):
        volumes[:, 1:] += np.log(-np.expm1(dim * (log_radii[:, :-1] - log_radii[:, 1:])))
    return volumes


def uncorrected(radii: Floats, counts: Counts, dim: float) -> Floats:
    r"""Logarithm of the number of neighbours by their volume, :math:`\log k - \log \omega_D - D \log r_k`.

    Args:
        radii: Shape ``(M, K)``.
        counts: k of each point, shape ``(M,)``, at most K.
        dim: D.

    Returns:
        Nats, shape ``(M,)``.
    """
    last = radii[np.arange(len(radii)), counts - 1]
    density: Floats = np.log(counts) - log_unit_ball(dim) - dim * np.log(last)
    return density


def corrected(
    radii: Floats, counts: Counts, dim: float, report: Callable[[int], None] | None = None
) -> Floats:
    r"""Maximise PAk's likelihood, :math:`\hat F` for a log-density linear in the neighbours' rank.

    Given a, the maximum over F is :math:`F = \log k - \log \sum_l v_l e^{a l}`, and a is found by
    :func:`solve_tilt`.

    Args:
        radii: Shape ``(M, K)``, ascending, positive.
        counts: k of each point, shape ``(M,)``, at most K.
        dim: D.
        report: Called with the number of points done.

    Returns:
        :math:`\hat F` in nats, shape ``(M,)``; NaN where the likelihood has no maximum.
    """
    density = np.empty(len(radii))
    # Points of like k together, so that little is computed on shells that do not count.
    order = np.argsort(counts, kind="stable")
    for start in range(0, len(order), _ROWS):
        rows = order[start : start + _ROWS]
        count = counts[rows]
        shells = log_shells(radii[rows, : int(count[-1])], dim)
        shells[np.arange(1, shells.shape[1] + 1) > count[:, None]] = -np.inf
        density[rows] = np.log(count) - _tilted(shells, solve_tilt(shells, count))[0]
        if report is not None:
            report(start + len(rows))
    return density


def solve_tilt(shells: Floats, counts: Counts) -> Floats:
    r"""Find the a at which the mean rank under :math:`p_l \propto v_l e^{a l}` is :math:`(k + 1) / 2`.

    That mean grows with a, its derivative being a variance, so that Newton's method, in steps of at most
    4/k and with bisection where a step leaves the bracket, cannot miss it.

    Args:
        shells: :math:`\log v_l`, shape ``(M, L)``, ``-inf`` beyond each point's k.
        counts: k, shape ``(M,)``.

    Returns:
        a, shape ``(M,)``; NaN where no finite a does.
    """
    tilt = np.zeros(len(shells))
    low, high = np.full(len(shells), -np.inf), np.full(len(shells), np.inf)
    rows = np.arange(len(shells))
    for _ in range(_STEPS):
        at, size = tilt[rows], counts[rows]
        _, mean, variance = _tilted(shells[rows], at)
        residual = mean - 0.5 * (size + 1)
        left = np.abs(residual) > _RESIDUAL * size
        rows, at, size = rows[left], at[left], size[left]
        residual, variance = residual[left], variance[left]
        if not len(rows):
            return tilt
        above = residual > 0
        high[rows[above]], low[rows[~above]] = at[above], at[~above]
        with np.errstate(divide="ignore"):
            step = np.clip(-residual / variance, -4 / size, 4 / size)
        after = at + step
        outside = (after <= low[rows]) | (after >= high[rows])
        after[outside] = 0.5 * (low[rows] + high[rows])[outside]
        tilt[rows] = after
    tilt[rows] = np.nan
    return tilt


def _tilted(shells: Floats, tilt: Floats) -> tuple[Floats, Floats, Floats]:
    """Log-sum of the tilted shells, and mean and variance of the rank under them; each ``(M,)``."""
    rank = np.arange(1, shells.shape[1] + 1, dtype=np.float64)
    weights = shells + tilt[:, None] * rank
    top = weights.max(1, keepdims=True)
    np.exp(weights - top, out=weights)
    total = weights.sum(1)
    mean = weights @ rank / total
    gap = rank - mean[:, None]
    variance = np.einsum("ml,ml,ml->m", weights, gap, gap) / total
    return top[:, 0] + np.log(total), mean, variance
