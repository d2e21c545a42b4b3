"""Log-density of data with an error bar, on a projection of them: what log p(z) can be aligned with."""

from .adaptive import adaptive_counts
from .estimator import DensityEstimator, Scored
from .intrinsic import two_nn
from .kde import KDE
from .neighbours import Neighbours, NeighbourSearch, Progress
from .pak import KStar, PAk
from .projection import CodeProjection, IdentityProjection, PCAProjection, Projection, RandomProjection
from .report import DensityReport
from .target import ESTIMATORS, DensityTarget

__all__ = [
    "ESTIMATORS",
    "KDE",
    "CodeProjection",
    "DensityEstimator",
    "DensityReport",
    "DensityTarget",
    "IdentityProjection",
    "KStar",
    "NeighbourSearch",
    "Neighbours",
    "PAk",
    "PCAProjection",
    "Progress",
    "Projection",
    "RandomProjection",
    "Scored",
    "adaptive_counts",
    "two_nn",
]
