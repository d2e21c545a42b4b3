r"""Kernel distance of two samples in features (Binkowski et al. 2018, arXiv:1801.01401v5, sec. 4)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .two_sample import _points

__all__ = ["KernelDistance", "kernel_distance"]

_NUMBERS = 2**22  # kernel values in memory at a time


@dataclass(frozen=True)
class KernelDistance:
    """An unbiased squared MMD with its error.

    Attributes:
        value: The estimate; zero in expectation if both samples have one distribution, so that single values
            may be negative.
        standard_error: Standard error over disjoint parts of both samples; NaN where they are too small to be
            cut. At least that of ``value``, whose pairs are those within parts and all others.
        num_parts: Number of parts.
    """

    value: float
    standard_error: float
    num_parts: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.standard_error:.1g}"


def kernel_distance(
    features_a: Tensor, features_b: Tensor, *, num_parts: int = 10, seed: int = 0
) -> KernelDistance:
    r"""Squared maximum mean discrepancy under a cubic kernel, without bias at any number of data.

    .. math:: \frac{\sum_{i \ne j} k(a_i, a_j)}{n (n-1)} + \frac{\sum_{i \ne j} k(b_i, b_j)}{m (m-1)}
              - \frac{2}{n m} \sum_{i, j} k(a_i, b_j), \qquad k(s, t) = \Bigl( \frac{s^\top t}{F} + 1 \Bigr)^3

    It compares the first three moments. The kernel is not invariant: values compare in one feature space
    only. KID is the value in the features of one particular Inception network, averaged over subsets, whose
    overlap makes the error usually given with it too small; here no datum is in two parts.

    Args:
        features_a: Shape ``(n, F)``, at least two rows.
        features_b: Shape ``(m, F)``, at least two rows.
        num_parts: Disjoint parts for the error, at most half as many as the smaller sample has rows.
        seed: Seed of the parts.

    Raises:
        ValueError: If the features are not finite matrices of one width with two rows or more, or
            ``num_parts`` is below 2.
    """
    if num_parts < 2:
        raise ValueError(f"num_parts must be at least 2, got {num_parts}")
    a, b = _points(features_a, features_b, least=2)
    value = _mmd2(a, b)
    num_parts = min(num_parts, min(len(a), len(b)) // 2)
    if num_parts < 2:
        return KernelDistance(value, math.nan, num_parts)
    generator = torch.Generator().manual_seed(seed)
    size_a, size_b = len(a) // num_parts, len(b) // num_parts
    order_a, order_b = (torch.randperm(len(sample), generator=generator).to(a.device) for sample in (a, b))
    parts = torch.tensor(
        [
            _mmd2(
                a[order_a[i * size_a : (i + 1) * size_a]],
                b[order_b[i * size_b : (i + 1) * size_b]],
            )
            for i in range(num_parts)
        ],
        dtype=torch.float64,
    )
    return KernelDistance(value, float(parts.std() / math.sqrt(num_parts)), num_parts)


def _mmd2(a: Tensor, b: Tensor) -> float:
    return _pairs(a) + _pairs(b) - 2 * _sum(a, b) / (len(a) * len(b))


def _pairs(a: Tensor) -> float:
    """Mean kernel of two different rows."""
    own = float(_kernel(a.square().sum(-1), a.shape[1]).sum())
    return (_sum(a, a) - own) / (len(a) * (len(a) - 1))


def _sum(a: Tensor, b: Tensor) -> float:
    rows = max(1, _NUMBERS // len(b))
    return sum(float(_kernel(part @ b.mT, a.shape[1]).sum()) for part in a.split(rows))


def _kernel(product: Tensor, width: int) -> Tensor:
    base = product.div_(width).add_(1)
    return base.square().mul_(base)
