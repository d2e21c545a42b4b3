"""Distance of codes from the cloud of training codes (Mahalanobis 1936), with a shrunk covariance (Ledoit &
Wolf 2004).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CodeCloud", "fit_cloud"]

_LEAST = 2


@dataclass(frozen=True)
class CodeCloud:
    r"""Mean and covariance of the codes of training data.

    Attributes:
        loc: Mean, shape ``(d,)``, float64.
        root: Factor :math:`R` with :math:`R^\top R` the inverse of the covariance, shape ``(d, d)``.
        shrinkage: Weight of the multiple of the identity that the covariance was drawn to, in [0, 1].
        num_codes: Number of codes behind it.
    """

    loc: Tensor
    root: Tensor
    shrinkage: float
    num_codes: int

    def distance(self, codes: Tensor) -> Tensor:
        r"""Squared distance :math:`(c - m)^\top S^{-1} (c - m)` of codes ``(N, d)``, shape ``(N,)``.

        Raises:
            ValueError: If the codes have another width.
        """
        if codes.ndim != 2 or codes.shape[1] != len(self.loc):
            raise ValueError(f"codes must have shape (N, {len(self.loc)}), got {tuple(codes.shape)}")
        apart = codes.detach().cpu().double() - self.loc
        return (apart @ self.root.mT).square().sum(-1)


def fit_cloud(codes: Tensor) -> CodeCloud:
    """Fit mean and shrunk covariance, by scikit-learn.

    Dimensions are brought to one scale first, so that the shrinkage draws each to a variance of its own.
    Dimensions that do not move, such as those of collapsed units, keep a scale of 1.

    Args:
        codes: Codes of training data, shape ``(M, d)``, at least two.

    Raises:
        ValueError: If there are fewer than two, or a code is not finite.
    """
    if codes.ndim != 2 or len(codes) < _LEAST:
        raise ValueError(f"codes must have shape (M, d) with M >= {_LEAST}, got {tuple(codes.shape)}")
    codes = codes.detach().cpu().double()
    if not bool(codes.isfinite().all()):
        raise ValueError(f"codes must be finite, got {int((~codes.isfinite()).sum())} other entries")
    from sklearn.covariance import LedoitWolf

    loc, scale = codes.mean(0), codes.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    found = LedoitWolf(assume_centered=True).fit(((codes - loc) / scale).numpy())
    factor = torch.linalg.cholesky(
        torch.from_numpy(found.covariance_) + 1e-12 * torch.eye(len(loc), dtype=torch.float64)
    )
    identity = torch.eye(len(loc), dtype=torch.float64)
    root = torch.linalg.solve_triangular(factor, identity, upper=False) / scale
    return CodeCloud(loc, root, float(found.shrinkage_), len(codes))
