"""Testing: models with exact answers, and checks to put one's own distributions and estimators through."""

from .discrete import DiscreteModel
from .distribution import check_distribution
from .likelihood import check_likelihood_estimator
from .linear_gaussian import LinearGaussianVAE
from .quadrature import QuadratureModel
from .report import ExactnessError, Report
from .sampler import check_sampler

__all__ = [
    "DiscreteModel",
    "ExactnessError",
    "LinearGaussianVAE",
    "QuadratureModel",
    "Report",
    "check_distribution",
    "check_likelihood_estimator",
    "check_sampler",
]
