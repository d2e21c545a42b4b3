"""Distributions that Pyro lacks, or gets wrong in single precision; no parameters of their own."""

from .affine_coupling import AffineCoupling
from .analytic_entropy_normal import AnalyticEntropyNormal
from .code_mixture import CodeMixture, KLMode
from .continuous_bernoulli import ContinuousBernoulli
from .declared import declared
from .diffusion import Diffusion, DiffusionEstimator, DiffusionPrediction
from .discretized_logistic_mixture import DiscretizedLogisticMixture, LevelGrid
from .flow_normal import FlowNormal
from .free_form_normal import FreeFormNormal
from .independent_bernoulli import IndependentBernoulli
from .jacobian_normal import Directions, JacobianNormal, LogDet, Probe, check_options
from .laplace_normal import laplace_normal
from .level_categorical import LevelCategorical
from .negative_binomial import NegativeBinomial
from .normal_mixture import NormalMixture
from .point_mass import PointMass
from .spread import variance_of

__all__ = [
    "AffineCoupling",
    "AnalyticEntropyNormal",
    "CodeMixture",
    "ContinuousBernoulli",
    "Diffusion",
    "DiffusionEstimator",
    "DiffusionPrediction",
    "Directions",
    "DiscretizedLogisticMixture",
    "FlowNormal",
    "FreeFormNormal",
    "IndependentBernoulli",
    "JacobianNormal",
    "KLMode",
    "LevelCategorical",
    "LevelGrid",
    "LogDet",
    "NegativeBinomial",
    "NormalMixture",
    "PointMass",
    "Probe",
    "check_options",
    "declared",
    "laplace_normal",
    "variance_of",
]
