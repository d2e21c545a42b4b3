"""Pareto k-hat of importance weights (Vehtari et al. 2024, arXiv:1507.02646v9, sec. 3), by ArviZ."""

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["khat_share", "khat_threshold", "pareto_khat"]

Rows = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_NOTHING = 700.0  # nats below the largest weight at which a weight is zero in double precision
_FEWEST = 30  # draws; with fewer, some versions of ArviZ see no tail


def khat_threshold(num_particles: int) -> float:
    """Largest k-hat at which an average of ``num_particles`` weights is reliable (Vehtari et al., sec. 3).

    Raises:
        ValueError: If ``num_particles`` is not positive.
    """
    if num_particles < 1:
        raise ValueError(f"num_particles must be positive, got {num_particles}")
    return min(1 - 1 / math.log10(num_particles), 0.7) if num_particles > 10 else 0.0


def khat_share(pareto_k: Tensor, num_particles: int) -> float:
    """Share of k-hats above :func:`khat_threshold`; NaN where no k-hat could be had.

    Args:
        pareto_k: Any shape; those that are NaN do not count.
        num_particles: Number of weights behind each.
    """
    known = pareto_k[~pareto_k.isnan()]
    return float((known > khat_threshold(num_particles)).double().mean()) if len(known) else math.nan


def pareto_khat(log_w: Tensor, rounding: float = 1e-9) -> Tensor:
    """Fit the tail of each row's importance weights.

    Args:
        log_w: Log-weights, shape ``(N, K)``, nats up to a constant per row; ``-inf`` is a weight of zero.
        rounding: Relative spread of a row's log-weights that counts as none at all.

    Returns:
        k-hat, shape ``(N,)``, double precision. ``-inf`` where the weights are equal (the exact posterior:
        no tail at all); NaN where a weight is NaN or ``K < 30``, too few to see a tail.

    Raises:
        ValueError: If ``log_w`` is not a matrix.
    """
    if log_w.ndim != 2:
        raise ValueError(f"log_w must have shape (N, K), got {tuple(log_w.shape)}")
    rows = log_w.detach().double().cpu().numpy()
    khat = np.full(len(rows), np.nan)
    if rows.shape[1] < _FEWEST:
        return torch.from_numpy(khat)
    highest = rows.max(-1)
    sound = np.isfinite(highest)
    # A zero weight stays below every other one; ArviZ itself takes no infinities.
    shifted = np.maximum(rows[sound] - highest[sound, None], -_NOTHING)
    spread = -shifted.min(-1) > rounding * np.maximum(1.0, np.abs(highest[sound]))
    found = np.full(len(shifted), -np.inf)
    if spread.any():
        found[spread] = _fit(shifted[spread])
    khat[sound] = found
    return torch.from_numpy(khat)


def _fit(log_w: Rows) -> Rows:
    """Fit all rows at once, or one by one where a row's tail has no spread, which ArviZ refuses."""
    from arviz_stats.base import array_stats

    with np.errstate(all="ignore"):
        try:
            # ArviZ takes log-likelihoods, of which the weights of leave-one-out are the inverses.
            khat = array_stats.psislw(-log_w, axis=-1)[1]
            return np.asarray(khat, dtype=np.float64).reshape(len(log_w))
        except ValueError:
            if len(log_w) == 1:
                return np.array([-np.inf])
            return np.concatenate([_fit(row[None]) for row in log_w])
