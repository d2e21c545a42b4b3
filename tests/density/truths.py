"""Data whose log-density is known, and how an estimate compares with it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from pvae.density import DensityEstimator, Scored

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """Eight equal isotropic normals in the plane."""

    centres: Floats
    std: float = 0.5

    def draw(self, rng: np.random.Generator, size: int) -> Floats:
        which = rng.integers(len(self.centres), size=size)
        drawn: Floats = self.centres[which] + self.std * rng.standard_normal((size, 2))
        return drawn

    def log_density(self, u: Floats) -> Floats:
        parts = [multivariate_normal(c, self.std**2).logpdf(u) for c in self.centres]
        total: Floats = logsumexp(parts, axis=0) - np.log(len(parts))
        return total


def mixture(seed: int = 0) -> Mixture:
    return Mixture(np.clip(4 * np.random.default_rng(seed).standard_normal((8, 2)), -5, 5))


def normal_log_density(u: Floats) -> Floats:
    logs: Floats = multivariate_normal(np.zeros(u.shape[1])).logpdf(u)
    return logs


@dataclass(frozen=True)
class Quality:
    """Bias, root mean square error, spread of error by standard error, correlation and slope."""

    bias: float
    rmse: float
    pull: float
    corr: float
    slope: float


def quality(estimate: DensityEstimator | Scored[Any], truth: Floats) -> Quality:
    log_density = np.asarray(estimate.log_density)
    error = log_density - truth
    return Quality(
        bias=float(error.mean()),
        rmse=float(np.sqrt(np.square(error).mean())),
        pull=float((error / np.asarray(estimate.standard_error)).std()),
        corr=float(np.corrcoef(log_density, truth)[0, 1]),
        slope=float(np.polyfit(truth, log_density, 1)[0]),
    )
