"""Likelihoods: the decoder's output in, p(x | z) out."""

from .base import Likelihood
from .bernoulli import Bernoulli
from .categorical import Categorical
from .continuous_bernoulli import ContinuousBernoulli
from .discretized_logistic_mixture import DiscretizedLogisticMixture
from .negative_binomial import NegativeBinomial
from .normal import Normal
from .poisson import Poisson

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogisticMixture",
    "Likelihood",
    "NegativeBinomial",
    "Normal",
    "Poisson",
]
