"""Priors: modules that own parameters and, called with a context, return a distribution over z."""

from .gaussian_mixture import GaussianMixture
from .standard_normal import StandardNormal
from .vamp import VampPrior

__all__ = ["GaussianMixture", "StandardNormal", "VampPrior"]
