r"""Are ranks uniform? Simultaneous bands and tests (Säilynoja, Bürkner & Vehtari 2022, arXiv:2103.10522)."""

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "band",
    "chi_square_p_values",
    "holm",
    "rank_counts",
    "ranks_among",
    "summed",
    "symmetry_p_values",
    "uniform_p_values",
]

Sums = Literal["ecdf", "histogram", "central"]
Matrix = NDArray[np.float64]

_NULL = 10_000  # simulated samples of uniform ranks behind a band or a p-value, at least
_NULL_PER_ROW = 200  # so that the smallest p-value survives a correction for the number of rows
_FLIPS = 999


def ranks_among(value: Tensor, draws: Tensor) -> Tensor:
    """Count the draws below a value; ties are broken at random, by torch's global generator.

    Args:
        value: Shape ``(B, Q)``.
        draws: Shape ``(L, B, Q)``.

    Returns:
        Ranks 0 ... L, shape ``(B, Q)``, int64: uniform where value and draws are exchangeable.

    Raises:
        ValueError: If an entry is NaN, which has no rank.
    """
    if bool(value.isnan().any()) or bool(draws.isnan().any()):
        raise ValueError("value and draws must not be NaN to be ranked")
    below, equal = (draws < value).sum(0), (draws == value).sum(0)
    return below + (torch.rand(equal.shape, dtype=torch.float64) * (equal + 1)).long().clamp(max=equal)


def rank_counts(ranks: Tensor, num_draws: int) -> Tensor:
    """Count how often each rank occurs, shape ``(Q, L + 1)``, from ranks ``(N, Q)``."""
    counts = torch.zeros(ranks.shape[1], num_draws + 1, dtype=torch.int64)
    return counts.scatter_add_(1, ranks.T, torch.ones_like(ranks.T))


def summed(counts: Tensor, sums: Sums, num_bins: int = 1) -> Tensor:
    """Add up rank counts ``(Q, L + 1)``.

    Args:
        counts: How often each rank occurs.
        sums: ``"ecdf"``: ranks of at most 0 ... L - 1. ``"histogram"``: equal bins. ``"central"``: ranks
            within a ... L - a, for a = 0 ... L // 2: how often a central interval between two draws holds the
            value.
        num_bins: Number of bins of the histogram, a divisor of L + 1.

    Returns:
        Shape ``(Q, A)``, int64.
    """
    which = torch.from_numpy(_which(counts.shape[1] - 1, sums, num_bins))
    return (counts.double() @ which.T).round().long()


def band(
    num: int, num_draws: int, sums: Sums, num_bins: int = 1, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Ends of the band that holds all sums of N uniform ranks together with probability ``level``.

    It is made of pointwise binomial intervals, of a level found by simulation.

    Returns:
        Lowest and highest counts inside, each of shape ``(A,)``, int64.
    """
    from scipy.stats import binom

    share, null = _null(num, num_draws, sums, num_bins)
    tail = float(np.quantile(null, 1 - level)) / 2
    low, high = (binom.ppf(q, num, share) for q in (tail, 1 - tail))
    return torch.from_numpy(low).long(), torch.from_numpy(high).long()


def uniform_p_values(counts: Tensor, sums: Sums = "ecdf", num_bins: int = 1) -> Tensor:
    r"""Test each row of rank counts for uniformity by its farthest excursion.

    The statistic is :math:`2 \min_a \min(F_a(c_a), 1 - F_a(c_a - 1))` with the binomial distribution function
    of each sum; its distribution is simulated, so that the p-value is exact up to the number of draws:
    10,000, or 200 for each row where that is more.

    Args:
        counts: Rank counts, shape ``(Q, L + 1)``, with the same total N in every row.
        sums: See :func:`summed`.
        num_bins: See :func:`summed`.

    Returns:
        Shape ``(Q,)``, float64, at least one over the number of draws.
    """
    num, num_draws = int(counts[0].sum()), counts.shape[1] - 1
    # In whole tens of thousands: kept for other tables of the same size.
    size = _NULL * -(-max(_NULL, _NULL_PER_ROW * len(counts)) // _NULL)
    share, null = _null(num, num_draws, sums, num_bins, size)
    found = _excursion(summed(counts, sums, num_bins).numpy(), num, share)
    # Equal tables must be counted as ties, whatever a float makes of them.
    below = np.searchsorted(null, found * (1 + 1e-12), side="right")
    return torch.from_numpy((1.0 + below) / (1 + len(null)))


def chi_square_p_values(counts: Tensor, num_bins: int) -> Tensor:
    """Test each row of rank counts for uniformity by Pearson's chi-square on a histogram; shape ``(Q,)``."""
    from scipy.stats import chi2

    bins = summed(counts, "histogram", num_bins).double()
    expected = bins.sum(-1, keepdim=True) / num_bins
    statistic = ((bins - expected).square() / expected).sum(-1)
    return torch.from_numpy(np.asarray(chi2.sf(statistic.numpy(), num_bins - 1)))


def symmetry_p_values(counts: Tensor, seed: int) -> Tensor:
    r"""Test each row of rank counts for symmetry (Yao et al. 2018, arXiv:1802.02538).

    A marginal of a variational posterior whose mean is right has symmetric ranks, though it be too narrow or
    too wide. The statistic is the largest distance of the distribution functions of u and 1 - u (Kolmogorov
    and Smirnov); under symmetry each rank may as well be its mirror image, which gives an exact test.

    Args:
        counts: Shape ``(Q, L + 1)``.
        seed: Seed of the reflections.

    Returns:
        Shape ``(Q,)``, float64.
    """
    half = counts.shape[1] // 2
    left, right = counts[:, :half].numpy(), counts.flip(-1)[:, :half].numpy()
    random = np.random.default_rng(seed)
    found = []
    for a, b in zip(left, right, strict=True):
        seen = np.abs(np.cumsum(a - b)).max()
        flipped = random.binomial(a + b, 0.5, size=(_FLIPS, half))
        null = np.abs(np.cumsum(2 * flipped - (a + b), -1)).max(-1)
        found.append((1 + int((null >= seen).sum())) / (1 + _FLIPS))
    return torch.tensor(found, dtype=torch.float64)


def holm(p_values: Tensor) -> Tensor:
    """Adjust p-values ``(Q,)`` for their number (Holm 1979).

    To reject those below a level keeps the chance of any false rejection at that level, however the tests
    depend on one another.
    """
    ordered, order = p_values.double().sort()
    weight = torch.arange(len(ordered), 0, -1, dtype=torch.float64)
    adjusted = (weight * ordered).cummax(0).values.clamp(max=1.0)
    return torch.empty_like(adjusted).scatter_(0, order, adjusted)


@lru_cache(maxsize=64)
def _null(num: int, num_draws: int, sums: Sums, num_bins: int, size: int = _NULL) -> tuple[Matrix, Matrix]:
    """Probabilities of the sums, shape ``(A,)``, and sorted excursions of simulated uniform ranks."""
    which = _which(num_draws, sums, num_bins)
    share: Matrix = which.mean(-1)
    random = np.random.default_rng(0)
    cells = np.full(num_draws + 1, 1 / (num_draws + 1))
    found = [
        _excursion(np.rint(random.multinomial(num, cells, size=1000) @ which.T).astype(np.int64), num, share)
        for _ in range(size // 1000)
    ]
    return share, np.sort(np.concatenate(found))


def _excursion(sums: NDArray[np.int64], num: int, share: Matrix) -> Matrix:
    """Smallest two-sided binomial tail of each row of sums, shape ``(R,)``."""
    below, above = _tails(num, tuple(share.tolist()))
    place = np.arange(len(share))
    tails: Matrix = np.minimum(below[place, sums], above[place, sums])
    return 2 * tails.min(-1)


@lru_cache(maxsize=64)
def _tails(num: int, share: tuple[float, ...]) -> tuple[Matrix, Matrix]:
    """P(C <= c) and P(C >= c) for all counts, each of shape ``(A, N + 1)``."""
    from scipy.stats import binom

    counts, p = np.arange(num + 1), np.array(share)[:, None]
    tables: list[Any] = [binom.cdf(counts, num, p), binom.sf(counts - 1, num, p)]
    return tables[0], tables[1]


@lru_cache(maxsize=64)
def _which(num_draws: int, sums: Sums, num_bins: int) -> Matrix:
    """Which ranks each sum adds up, shape ``(A, L + 1)``."""
    rank = np.arange(num_draws + 1)
    if sums == "ecdf":
        which = rank <= rank[:-1, None]
    elif sums == "histogram":
        which = rank // ((num_draws + 1) // num_bins) == np.arange(num_bins)[:, None]
    else:
        edge = np.arange(num_draws // 2 + 1)[:, None]
        which = (rank >= edge) & (rank <= num_draws - edge)
    return which.astype(np.float64)
