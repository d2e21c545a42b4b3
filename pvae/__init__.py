"""Variational autoencoders as Pyro programs, with likelihoods that can be trusted."""

from .evaluation import LikelihoodEstimate, log_likelihood
from .inference import Run, fit

__all__ = ["LikelihoodEstimate", "Run", "__version__", "fit", "log_likelihood"]

__version__ = "0.1.0"
