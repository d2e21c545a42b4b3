r"""Calibrated tests of a sampler against a density: Stein's identity, chi-square, two-sample.

Stein's identity (Gorham & Mackey 2015, arXiv:1506.03039): where :math:`v \sim p`,
:math:`E[f(v) \cdot \nabla \log p(v) + \nabla \cdot f(v)] = 0` for every smooth bounded ``f``.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = [
    "chi_square",
    "fourier",
    "location",
    "seeded",
    "standardised",
    "stein",
    "student_threshold",
    "threshold",
    "two_sample",
    "worst",
]

_NUM_FEATURES = 24


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside, and leave them as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def threshold(false_alarm: float, num_tests: int = 1) -> float:
    """Two-sided normal quantile at which ``num_tests`` tests together raise ``false_alarm``."""
    return -float(torch.special.ndtri(torch.tensor(false_alarm / (2 * num_tests), dtype=torch.float64)))


def student_threshold(false_alarm: float, num_tests: int, freedom: int) -> float:
    """The same for Student's t with ``freedom`` degrees of freedom: few terms, or a skewed few."""
    from scipy.stats import t

    return float(t.isf(false_alarm / (2 * num_tests), freedom))


def worst(terms: Tensor) -> Tensor:
    """Largest ``|mean| / standard error`` over the columns of ``terms``, shape ``(num_samples, columns)``."""
    mean, spread = terms.mean(0), terms.std(0)
    error = spread / math.sqrt(len(terms))
    # A column that does not vary must be zero; it is tested against rounding.
    return (mean.abs() / torch.maximum(error, error.new_tensor(1e-9))).max()


def fourier(values: Tensor) -> tuple[Tensor, Tensor]:
    """Random frequencies ``(dim, features)`` and phases for standardised ``values`` ``(num_samples, dim)``.

    Lengths of the frequencies run over two octaves, so that coarse and fine differences are both seen.
    """
    dim = values.shape[-1]
    direction = torch.randn(dim, _NUM_FEATURES, dtype=values.dtype)
    length = torch.logspace(-0.3, 0.5, _NUM_FEATURES, dtype=values.dtype)
    phase = 2 * math.pi * torch.rand(_NUM_FEATURES, dtype=values.dtype)
    return length * direction / direction.norm(dim=0), phase


def stein(values: Tensor, score: Tensor) -> Tensor:
    r"""Return terms whose mean is zero if ``values`` follow the density of which ``score`` is the gradient.

    The test functions are the constants, each coordinate, products with a random projection, and
    random waves :math:`a \cos(w \cdot v + b)`.

    Args:
        values: Samples, shape ``(num_samples, dim)``.
        score: Gradient of their log-density, of the same shape.

    Returns:
        Shape ``(num_samples, 3 dim + features)``.
    """
    standard, scale = standardised(values)
    slope = score * scale
    dim = values.shape[-1]
    projection = torch.randn(dim, dtype=values.dtype)
    projection = projection / projection.norm()
    # Bounded test functions: a heavy-tailed density has every expectation that is taken.
    single, along = standard.tanh(), (standard @ projection).tanh().unsqueeze(-1)
    frequency, phase = fourier(standard)
    direction = torch.randn_like(frequency)
    direction = direction / direction.norm(dim=0)
    angle = standard @ frequency + phase
    waves = angle.cos() * (slope @ direction) - angle.sin() * (frequency * direction).sum(0)
    return torch.cat(
        [
            slope,
            single * slope + 1 - single.square(),
            along * slope + (1 - along.square()) * projection,
            waves,
        ],
        -1,
    )


def standardised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values with median 0 and about unit spread a column, and the spread, shape ``(dim,)``."""
    middle, scale = location(values)
    return (values - middle) / scale, scale


def location(values: Tensor) -> tuple[Tensor, Tensor]:
    """Median and half the central 68 % of each column, which every distribution has; 1 where that is nil."""
    ordered = values.sort(0).values
    low, middle, high = (ordered[round(level * (len(values) - 1))] for level in (0.16, 0.5, 0.84))
    scale = (high - low) / 2
    return middle, scale.where(scale > 0, torch.ones_like(scale))


def two_sample(first: Tensor, second: Tensor) -> tuple[float, int]:
    """Compare two samples, each ``(num_samples, dim)``; return the largest ``|z|`` and the number of tests.

    Features: random projections, their squares, random waves, and the coordinates where there are few.
    """
    both = torch.cat([first, second])
    spread = both.std(0)
    kept = spread > 0
    standard = (both - both.mean(0))[:, kept] / spread[kept]
    frequency, phase = fourier(standard)
    angle = standard @ frequency
    features = [angle, angle.square(), (angle + phase).cos()]
    if standard.shape[-1] <= 64:
        features += [standard, standard.square()]
    a, b = torch.cat(features, -1).split([len(first), len(second)])
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return float(((a.mean(0) - b.mean(0)).abs() / error.clamp(min=1e-12)).max()), a.shape[-1]


def chi_square(counts: Tensor, expected: Tensor) -> tuple[float, int, float]:
    """Pearson's test of ``counts`` against ``expected``, cells of fewer than 5 expected pooled.

    Returns:
        The statistic, its degrees of freedom, and its tail probability.
    """
    order = expected.argsort(descending=True)
    counts, expected = counts[order].double(), expected[order].double()
    large = int((expected >= 5).sum())
    if large < len(expected):
        counts = torch.cat([counts[:large], counts[large:].sum().reshape(1)])
        expected = torch.cat([expected[:large], expected[large:].sum().reshape(1)])
        if expected[-1] < 5 and len(expected) > 1:
            counts = torch.cat([counts[:-2], counts[-2:].sum().reshape(1)])
            expected = torch.cat([expected[:-2], expected[-2:].sum().reshape(1)])
    freedom = len(expected) - 1
    if freedom == 0:
        return 0.0, 0, 1.0
    statistic = ((counts - expected).square() / expected).sum()
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    return float(statistic), freedom, float(torch.special.gammaincc(half, statistic / 2))
