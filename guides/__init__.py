"""Guides: q(z | x, y) as Pyro programs."""

if __name__ != "pvae.guides":
    raise ImportError(f"import this package as pvae.guides, not as {__name__}")

from .five import FiveGuide
from .flow import FlowGuide
from .full_covariance import FullCovarianceGuide
from .hvae import HVAEGuide
from .ladder import LadderGuide
from .laplace import LaplaceGuide, laplace_proposal
from .normal import NormalGuide
from .point import PointGuide
from .tied import TiedGuide

__all__ = [
    "FiveGuide",
    "FlowGuide",
    "FullCovarianceGuide",
    "HVAEGuide",
    "LadderGuide",
    "LaplaceGuide",
    "NormalGuide",
    "PointGuide",
    "TiedGuide",
    "laplace_proposal",
]
