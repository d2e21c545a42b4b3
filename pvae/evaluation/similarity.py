"""Are two sets of codes of the same data one representation? Correlation, linear fit and CKA."""

import torch
from torch import Tensor

__all__ = ["linear_cka", "linear_r2", "pearson"]


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of each column of ``a`` with the same column of ``b``, shape ``(d,)``; 0 for a constant.

    Args:
        a: Shape ``(N, d)``.
        b: Shape ``(N, d)``.

    Raises:
        ValueError: If the shapes differ or are no matrices.
    """
    a, b = _centred(a, b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same width, got {a.shape[1]} and {b.shape[1]}")
    scale = (a.square().sum(0) * b.square().sum(0)).sqrt()
    return torch.where(scale > 0, (a * b).sum(0) / scale.clamp(min=torch.finfo(a.dtype).tiny), 0.0)


def linear_r2(a: Tensor, b: Tensor) -> float:
    r"""Share of the variance of ``b`` that an affine map of ``a`` explains, mean over the columns of ``b``.

    Adjusted for the number of coefficients, :math:`1 - (1 - R^2)(N - 1)/(N - d - 1)`: unrelated codes have
    expectation zero, not :math:`d / (N - 1)`. Constant columns of ``b`` are left out.

    Args:
        a: Shape ``(N, d)``, ``N > d + 1``.
        b: Shape ``(N, e)``.

    Returns:
        At most 1; NaN if all columns of ``b`` are constant.

    Raises:
        ValueError: If the rows differ or are too few.
    """
    a, b = _centred(a, b)
    num_data, width = a.shape
    if num_data <= width + 1:
        raise ValueError(f"a must have more than {width + 1} rows, got {num_data}")
    spread = b.square().sum(0)
    # gelsd finds the least-squares fit of least norm also where columns of a are constant or repeated.
    fit = torch.linalg.lstsq(a, b, driver="gelsd").solution
    left = (b - a @ fit).square().sum(0)
    moving = spread > 0
    share = 1 - left[moving] / spread[moving] * (num_data - 1) / (num_data - width - 1)
    return float(share.mean())


def linear_cka(a: Tensor, b: Tensor) -> float:
    r"""Linear centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414v4, sec. 3).

    .. math:: \frac{|A^\top B|_F^2}{|A^\top A|_F \, |B^\top B|_F}

    for centred codes: 1 if one is a rotation of the other, of any scale.

    Args:
        a: Shape ``(N, d)``.
        b: Shape ``(N, e)``.

    Returns:
        Between 0 and 1; 0 if one of them is constant.

    Raises:
        ValueError: If the rows differ.
    """
    a, b = _centred(a, b)
    norm = float((a.mT @ a).norm() * (b.mT @ b).norm())
    return float((a.mT @ b).square().sum()) / norm if norm > 0 else 0.0


def _centred(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"a and b must have shapes (N, d) and (N, e), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    a, b = (codes.detach().cpu().double() for codes in (a, b))
    # A column that does not move may differ from its mean by rounding: that is no variance.
    return _without_rounding(a), _without_rounding(b)


def _without_rounding(codes: Tensor) -> Tensor:
    still = codes.amax(0) == codes.amin(0)
    return torch.where(still, 0.0, codes - codes.mean(0))
