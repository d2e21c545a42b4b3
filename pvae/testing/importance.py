r"""Importance sampling where a grid is out of reach: a broad Student mixture built round a sample."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["importance_sample"]

_KERNELS = 64
_FREEDOM = 5.0
_BROADER = 1.3


def importance_sample(
    log_prob: Callable[[Tensor], Tensor], sample: Tensor, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Draw from a proposal that covers ``sample`` and weigh by a density.

    Half of the proposal is one Student distribution with the sample's mean and 1.3 times its covariance,
    half are narrower ones round 64 of its points. The weights average to the integral of the density,
    whatever the sample was: it decides how much they vary, not what they estimate.

    Args:
        log_prob: Log-density to integrate, called with shape ``(num_samples, dim)``.
        sample: Points, shape ``(num_points, dim)``.
        num_samples: Number of draws.

    Returns:
        The draws ``(num_samples, dim)`` and their log-weights ``(num_samples,)``.
    """
    dim = sample.shape[-1]
    mean, covariance = sample.mean(0), torch.cov(sample.T).reshape(dim, dim)
    covariance = covariance + 1e-9 * covariance.diagonal().mean() * torch.eye(dim, dtype=sample.dtype)
    factor = torch.linalg.cholesky(covariance)
    # In whitened coordinates every component is spherical, and one distance matrix serves them all.
    points = sample[torch.randperm(len(sample))[:_KERNELS]] - mean
    centre = torch.cat(
        [torch.zeros_like(points), torch.linalg.solve_triangular(factor, points.T, upper=False).T]
    )
    narrower = (4 / (dim + 2) / len(points)) ** (2 / (dim + 4))
    variance = torch.tensor([_BROADER] * len(points) + [narrower] * len(points), dtype=sample.dtype)

    pick = torch.randint(len(centre), (num_samples,))
    mixing = (
        _FREEDOM / torch.distributions.Chi2(torch.tensor(_FREEDOM).double()).sample((num_samples, 1))
    ).sqrt()
    white = (
        centre[pick] + variance[pick].sqrt().unsqueeze(-1) * mixing * torch.randn(num_samples, dim).double()
    )
    distance = torch.cdist(white, centre).square() / variance
    constant = (
        math.lgamma((_FREEDOM + dim) / 2)
        - math.lgamma(_FREEDOM / 2)
        - dim / 2 * math.log(math.pi * _FREEDOM)
        - float(factor.diagonal().log().sum())
    )
    each = -(_FREEDOM + dim) / 2 * (distance / _FREEDOM).log1p() - dim / 2 * variance.log()
    log_proposal = each.logsumexp(-1) - math.log(len(centre)) + constant
    u = mean + white @ factor.T
    return u, log_prob(u) - log_proposal
