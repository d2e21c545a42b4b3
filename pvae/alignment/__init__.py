"""Alignment: a training-only factor that ties log p(z) to a log-density estimated from the data (DiVAE)."""

from .align import Aligned, align
from .aligner import Aligner
from .density_factor import DensityFactor
from .feasibility import Feasibility
from .flow_target import FlowTarget
from .programs import AlignedGuide, AlignedModel
from .targets import DensityLike, Target
from .training_only import TRAINING_ONLY
from .warmup import LinearWarmup

__all__ = [
    "TRAINING_ONLY",
    "Aligned",
    "AlignedGuide",
    "AlignedModel",
    "Aligner",
    "DensityFactor",
    "DensityLike",
    "Feasibility",
    "FlowTarget",
    "LinearWarmup",
    "Target",
    "align",
]
