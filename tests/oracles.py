"""Models with exact answers, and second opinions on those answers that share no code with them."""

import math

import numpy as np
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from pvae.testing import DiscreteModel, LinearGaussianVAE, QuadratureModel

__all__ = [
    "DiscreteModel",
    "LinearGaussianVAE",
    "QuadratureModel",
    "discrete_log_prob",
    "linear_gaussian_elbo",
    "linear_gaussian_log_prob",
    "quadrature_log_prob",
]


def linear_gaussian_log_prob(oracle: LinearGaussianVAE, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Log-likelihood by SciPy from the parameters as they stand, shape ``(B,)``."""
    weight = oracle.model.weight.detach().numpy()
    mean = oracle.model.bias.detach().numpy()
    if y is not None:
        assert oracle.model.label_weight is not None
        mean = mean + y.numpy() @ oracle.model.label_weight.detach().numpy().T
    noise = np.broadcast_to(np.exp(oracle.model.log_scale.detach().numpy()) ** 2, len(weight))
    normal = scipy.stats.multivariate_normal(np.zeros(len(weight)), weight @ weight.T + np.diag(noise))
    return torch.from_numpy(np.atleast_1d(normal.logpdf(x.numpy() - mean)))


def linear_gaussian_elbo(oracle: LinearGaussianVAE, loc: Tensor, covariance: Tensor, x: Tensor) -> Tensor:
    r"""ELBO of :math:`N(\mu, \Sigma)` term by term: reconstruction, prior and entropy, shape ``(B,)``."""
    weight, bias = oracle.model.weight.detach().numpy(), oracle.model.bias.detach().numpy()
    variance = np.broadcast_to(np.exp(oracle.model.log_scale.detach().numpy()) ** 2, len(weight))
    mean, sigma = loc.numpy(), covariance.numpy()
    residual = x.numpy() - mean @ weight.T - bias
    spread = np.einsum("di,ij,dj->d", weight, sigma, weight)
    reconstruction = -0.5 * ((residual**2 + spread) / variance + np.log(2 * np.pi * variance)).sum(-1)
    prior = -0.5 * ((mean**2).sum(-1) + np.trace(sigma) + mean.shape[-1] * np.log(2 * np.pi))
    entropy = scipy.stats.multivariate_normal(np.zeros(len(sigma)), sigma).entropy()
    return torch.from_numpy(reconstruction + prior + entropy)


def discrete_log_prob(oracle: DiscreteModel, x: Tensor) -> Tensor:
    """Log-likelihood by a sum over states of products of SciPy's probabilities, shape ``(B,)``."""
    weights = np.exp(oracle.model.logits.detach().numpy())
    odds = np.exp(oracle.model.x_logits.detach().numpy())
    mass = scipy.stats.bernoulli(odds / (1 + odds)).pmf(x.numpy().astype(int)[:, None, :]).prod(-1)
    return torch.from_numpy(np.log(mass @ (weights / weights.sum())))


def quadrature_log_prob(oracle: QuadratureModel, x: Tensor) -> Tensor:
    """Log-likelihood of one datum ``(1, 3)`` by SciPy's adaptive rule, shape ``(1,)``."""
    a, b, c = oracle.model.bend.detach().tolist()
    scale = float(oracle.model.log_scale.detach().exp())
    values = x[0].tolist()

    def joint(second: float, first: float) -> float:
        loc = (first + a * second**2, math.sin(b * second) + c * first, math.tanh(first * second))
        distance = sum((v - mean) ** 2 for v, mean in zip(values, loc, strict=True))
        return math.exp(-0.5 * (distance / scale**2 + first**2 + second**2))

    total, _ = scipy.integrate.dblquad(joint, -7, 7, -7, 7, epsabs=1e-9, epsrel=1e-6)
    return torch.tensor([math.log(total) - 2.5 * math.log(2 * math.pi) - 3 * math.log(scale)]).double()
