"""Guides: q(z | x, y) as Pyro programs."""

if __name__ != "pvae.guides":
    raise ImportError(f"import this package as pvae.guides, not as {__name__}")

from .five import FiveGuide
from .flow import FlowGuide
from .full_covariance import FullCovarianceGuide
from .laplace import LaplaceGuide, laplace_proposal
from .normal import NormalGuide
from .point import PointGuide
from .tied import TiedGuide

__all__ = [
    "FiveGuide",
    "FlowGuide",
    "FullCovarianceGuide",
    "LaplaceGuide",
    "NormalGuide",
    "PointGuide",
    "TiedGuide",
    "laplace_proposal",
]
