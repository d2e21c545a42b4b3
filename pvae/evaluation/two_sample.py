r"""Do two samples have one distribution? MMD (Gretton et al. 2012, JMLR 13, eq. 3) and the Wasserstein
distance of their moments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pvae.ops import has_float64

from .interval import Interval, intervals_from

__all__ = ["Kernel", "MMDTest", "gaussian_w2", "mmd2", "mmd_interval", "mmd_permutation"]

Kernel = Literal["rbf", "laplace", "imq"]

_KERNELS: tuple[Kernel, ...] = ("rbf", "laplace", "imq")
_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
_MEDIAN_POINTS = 1000


@dataclass(frozen=True)
class MMDTest:
    """An MMD with its permutation null.

    Attributes:
        mmd2: The unbiased estimate.
        null: Estimates after permuting which sample a point belongs to, shape ``(num_permutations,)``.
    """

    mmd2: float
    null: Tensor

    @property
    def p_value(self) -> float:
        """Chance of an estimate at least as large if both samples have one distribution."""
        return (1 + int((self.null >= self.mmd2).sum())) / (1 + len(self.null))

    def quantile(self, level: float = 0.95) -> float:
        """Quantile of the null."""
        return float(self.null.quantile(level))


def mmd2(
    a: Tensor,
    b: Tensor,
    *,
    scales: Sequence[float] = _SCALES,
    kernel: Kernel = "rbf",
    seed: int = 0,
) -> float:
    r"""Unbiased squared maximum mean discrepancy under the mean of a kernel at several widths.

    .. math:: \frac{\sum_{i \ne j} k(a_i, a_j)}{n (n-1)} + \frac{\sum_{i \ne j} k(b_i, b_j)}{m (m-1)}
              - \frac{2}{n m} \sum_{i, j} k(a_i, b_j), \qquad
              k(s, t) = \frac{1}{|C|} \sum_{c \in C} \exp \Bigl( -\frac{|s - t|^2}{2 c \, h} \Bigr)

    with :math:`h` the median squared distance of two different points of the pooled sample. Its expectation
    is zero if both samples have one distribution; single values may be negative. All three kernels see every
    difference of distributions, given data enough. ``"rbf"``, above, sees best what differs at the scale of
    the whole sample; ``"laplace"``, :math:`\exp(-|s - t| / \sqrt{c h})`, has a cusp and so sees finer
    structure; ``"imq"``, :math:`(1 + |s - t|^2 / c h)^{-1/2}`, decays slowly and sees what is far out.

    Args:
        a: Points, shape ``(n, d)``, ``n >= 2``.
        b: Points, shape ``(m, d)``, ``m >= 2``.
        scales: The factors :math:`C`, positive.
        kernel: ``"rbf"``, ``"laplace"`` or ``"imq"``.
        seed: Seed of the thousand points that the median is taken over, where there are more.

    Raises:
        ValueError: If the samples are not matrices of one width with two rows or more, or there is no such
            kernel.
    """
    gram, n = _gram(a, b, scales, kernel, seed)
    first = _indicator(len(gram), n).to(gram)
    return float(_mmd2(gram, first, 1 - first))


def mmd_permutation(
    a: Tensor,
    b: Tensor,
    num_permutations: int = 200,
    seed: int = 0,
    *,
    scales: Sequence[float] = _SCALES,
    kernel: Kernel = "rbf",
) -> MMDTest:
    """Compare :func:`mmd2` with its values under random relabelling, all from one Gram matrix.

    Args:
        a: Points, shape ``(n, d)``.
        b: Points, shape ``(m, d)``.
        num_permutations: Number of relabellings, positive.
        seed: Seed of the relabellings and of the median's points.
        scales: See :func:`mmd2`.
        kernel: See :func:`mmd2`.

    Raises:
        ValueError: As :func:`mmd2`, or if ``num_permutations`` is not positive.
    """
    if num_permutations < 1:
        raise ValueError(f"num_permutations must be positive, got {num_permutations}")
    gram, n = _gram(a, b, scales, kernel, seed)
    first = _indicator(len(gram), n)
    generator = torch.Generator().manual_seed(seed)
    rows = [first[torch.randperm(len(gram), generator=generator)] for _ in range(num_permutations)]
    weights = torch.stack([first, *rows]).to(gram)
    values = _mmd2(gram, weights, 1 - weights).cpu()
    return MMDTest(float(values[0]), values[1:])


def mmd_interval(
    a: Tensor,
    b: Tensor,
    num_bootstrap: int = 200,
    seed: int = 0,
    *,
    level: float = 0.95,
    scales: Sequence[float] = _SCALES,
    kernel: Kernel = "rbf",
) -> Interval:
    """Bootstrap :func:`mmd2`; two copies of one point in a resample are no pair.

    Args:
        a: Points, shape ``(n, d)``.
        b: Points, shape ``(m, d)``.
        num_bootstrap: Number of resamples; with 0 both ends are NaN.
        seed: Seed of the resamples and of the median's points.
        level: Coverage aimed at.
        scales: See :func:`mmd2`.
        kernel: See :func:`mmd2`.

    Raises:
        ValueError: As :func:`mmd2`.
    """
    gram, n = _gram(a, b, scales, kernel, seed)
    first = _indicator(len(gram), n).to(gram)
    value = _mmd2(gram, first, 1 - first).cpu().reshape(1)
    if num_bootstrap < 1:
        return intervals_from(value, None)[0]
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(num_bootstrap, len(gram), dtype=gram.dtype)
    for start, stop in ((0, n), (n, len(gram))):
        rows = torch.randint(start, stop, (num_bootstrap, stop - start), generator=generator)
        counts.scatter_add_(1, rows, torch.ones(rows.shape, dtype=gram.dtype))
    counts = counts.to(gram.device)
    draws = _mmd2(gram, counts * first, counts * (1 - first)).cpu()
    return intervals_from(value, draws.unsqueeze(-1), level)[0]


def gaussian_w2(a: Tensor, b: Tensor) -> float:
    r"""Squared 2-Wasserstein distance of the Gaussians with the samples' moments, in their coordinates.

    .. math:: |m_a - m_b|^2 + \mathrm{tr} \bigl( C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2} \bigr)

    The last trace is the sum of the singular values of :math:`R_a R_b^\top` for any factors with
    :math:`C = R^\top R`; those of a QR decomposition of the centred points need no matrix root and are as
    exact where the covariances are singular (fewer points than dimensions, constant coordinates).

    Args:
        a: Points, shape ``(n, d)``, ``n >= 2``.
        b: Points, shape ``(m, d)``, ``m >= 2``.

    Raises:
        ValueError: If the samples are not matrices of one width with two rows or more.
    """
    a, b = _points(a, b, least=2)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    root_a, root_b = _root(a), _root(b)
    cross = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    distance = gap + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def _points(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Check two samples; return them in double precision, where the device has it."""
    for name, sample in (("a", a), ("b", b)):
        if sample.ndim != 2 or len(sample) < least or sample.shape[1] < 1:
            raise ValueError(
                f"{name} must have shape (N, d) with N at least {least} and d at least 1, "
                f"got {tuple(sample.shape)}"
            )
        if not sample.isfinite().all():
            raise ValueError(f"{name} must be finite, got {int((~sample.isfinite()).sum())} other entries")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same width, got {a.shape[1]} and {b.shape[1]}")
    device = a.device if has_float64(a.device) else torch.device("cpu")
    return a.detach().to(device, torch.float64), b.detach().to(device, torch.float64)


def _gram(a: Tensor, b: Tensor, scales: Sequence[float], kernel: Kernel, seed: int) -> tuple[Tensor, int]:
    """Kernel between all points, zero on the diagonal, shape ``(n + m, n + m)``, and ``n``."""
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales must be positive, got {tuple(scales)}")
    if kernel not in _KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(_KERNELS)}, got {kernel!r}")
    a, b = _points(a, b, least=2)
    points = torch.cat([a, b])
    points = points - points.mean(0)  # limits cancellation in the distances
    square = torch.cdist(points, points).square_()
    rows = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:_MEDIAN_POINTS]
    part = square[rows][:, rows] if len(points) > _MEDIAN_POINTS else square
    upper = torch.ones_like(part, dtype=torch.bool).triu_(1)
    distances = part[upper]
    width = distances.median()
    # More than half of the pairs coincide: their mean still is a length, unless all coincide.
    width = torch.where(width > 0, width, distances.mean())
    width = torch.where(width > 0, width, torch.ones_like(width))
    gram = torch.zeros_like(square)
    for scale in scales:
        if kernel == "rbf":
            gram += (square * (-0.5 / (scale * width))).exp_()
        elif kernel == "laplace":
            gram += (square / (scale * width)).sqrt_().neg_().exp_()
        else:
            gram += (square / (scale * width)).add_(1).rsqrt_()
    return (gram / len(scales)).fill_diagonal_(0), len(a)


def _indicator(total: int, first: int) -> Tensor:
    """One for the first sample's rows, zero for the second's, shape ``(total,)``."""
    return (torch.arange(total) < first).double()


def _mmd2(gram: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """MMD of samples with weights ``(*P, n + m)``, shape ``(*P,)``; a point makes no pair with itself."""
    row_a, row_b = a @ gram, b @ gram

    def pairs(weights: Tensor) -> Tensor:
        return weights.sum(-1).square() - weights.square().sum(-1)

    within = (row_a * a).sum(-1) / pairs(a) + (row_b * b).sum(-1) / pairs(b)
    return within - 2 * (row_a * b).sum(-1) / (a.sum(-1) * b.sum(-1))


def _root(points: Tensor) -> Tensor:
    """Factor R with covariance ``R^T R``, at most ``(d, d)``."""
    centred = (points - points.mean(0)) / (len(points) - 1) ** 0.5
    root: Tensor = torch.linalg.qr(centred, mode="r").R
    return root
