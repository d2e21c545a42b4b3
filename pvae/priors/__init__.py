"""Priors: modules that own parameters and, called with a context, return a distribution over z."""

from .code_prior import CodePrior
from .code_stats import CodeScale, CodeShift, CodeStats, CovarianceFactor, collect_codes
from .conditional_flow import ConditionalFlowPrior
from .coupling_flow import CouplingFlow
from .diffusion import DiffusionPrior
from .gaussian_mixture import GaussianMixture
from .image import ImagePrior
from .scaled_codes import ScaledCodes
from .standard_normal import StandardNormal
from .vamp import VampPrior
from .zuko_flow import ZukoFlow

__all__ = [
    "CodePrior",
    "CodeScale",
    "CodeShift",
    "CodeStats",
    "ConditionalFlowPrior",
    "CouplingFlow",
    "CovarianceFactor",
    "DiffusionPrior",
    "GaussianMixture",
    "ImagePrior",
    "ScaledCodes",
    "StandardNormal",
    "VampPrior",
    "ZukoFlow",
    "collect_codes",
]
