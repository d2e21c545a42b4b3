"""Log-densities of dequantised levels in bits per dimension (Theis, van den Oord & Bethge 2016,
arXiv:1511.01844v3, sec. 3.1).
"""

import math
from typing import TypeVar

from torch import Tensor

__all__ = ["bits_per_dimension"]

_Value = TypeVar("_Value", float, Tensor)


def bits_per_dimension(log_prob: _Value, x_dim: int, levels: int = 256, width: float = 1.0) -> _Value:
    r"""Turn a log-density of dequantised data into bits per dimension of the levels.

    .. math:: b = -\frac{\log p(x)}{D \log 2} - \log_2 \frac{w}{L}, \qquad x = \frac{w}{L} (k + u), \quad
              u \sim U(0, 1)^D

    Averaged over the noise u it is no less than the bits that a code of the levels k needs under
    :math:`P(k) = (w / L)^D \int p(x) \, \mathrm{d}u`, by Jensen's inequality; a lower bound on log p(x)
    gives an upper bound. Nothing of the kind holds for levels without noise, whose density can be as large
    as one likes.

    Args:
        log_prob: log p(x) or a bound on it, nats per datum, a number or a tensor of any shape.
        x_dim: Number of entries D of a datum.
        levels: Number of levels L.
        width: Length w of the interval that the levels were put on: 1 for x in [0, 1], 2 for [-1, 1].

    Returns:
        Bits per dimension, as ``log_prob`` came.

    Raises:
        ValueError: If ``x_dim``, ``levels`` or ``width`` is not positive.

    Example:
        >>> bits_per_dimension(0.0, x_dim=784)
        8.0
    """
    for name, size in (("x_dim", x_dim), ("levels", levels), ("width", width)):
        if not size > 0:
            raise ValueError(f"{name} must be positive, got {size}")
    return -log_prob / (x_dim * math.log(2)) - math.log2(width / levels)
