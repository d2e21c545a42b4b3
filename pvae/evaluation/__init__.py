"""Evaluation: what a trained model and guide are worth, with the evidence attached."""

from .estimate import LikelihoodEstimate
from .likelihood import log_likelihood
from .pareto import khat_threshold, pareto_khat

__all__ = ["LikelihoodEstimate", "khat_threshold", "log_likelihood", "pareto_khat"]
