"""Guides: q(z | x, y) as Pyro programs."""

if __name__ != "pvae.guides":
    raise ImportError(f"import this package as pvae.guides, not as {__name__}")

from .flow import FlowGuide
from .full_covariance import FullCovarianceGuide
from .normal import NormalGuide
from .point import PointGuide

__all__ = ["FlowGuide", "FullCovarianceGuide", "NormalGuide", "PointGuide"]
