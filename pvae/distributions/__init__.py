"""Distributions that Pyro lacks, or gets wrong in single precision; no parameters of their own."""

from .affine_coupling import AffineCoupling
from .continuous_bernoulli import ContinuousBernoulli
from .discretized_logistic_mixture import DiscretizedLogisticMixture, LevelGrid
from .independent_bernoulli import IndependentBernoulli
from .level_categorical import LevelCategorical
from .negative_binomial import NegativeBinomial
from .normal_mixture import NormalMixture

__all__ = [
    "AffineCoupling",
    "ContinuousBernoulli",
    "DiscretizedLogisticMixture",
    "IndependentBernoulli",
    "LevelCategorical",
    "LevelGrid",
    "NegativeBinomial",
    "NormalMixture",
]
