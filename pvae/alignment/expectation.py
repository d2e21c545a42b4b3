r"""The prior's log-density of a latent: at its draw, or its mean under the posterior."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
import torch
import torch.distributions as torch_dist
from torch import Tensor

__all__ = ["Detach", "expected_log_prob", "log_prob_at", "mean_log_prob"]

Detach = Literal["guide", "prior"] | None


def log_prob_at(p: Any, z: Tensor, detach: Detach = None) -> Tensor:
    """Return log p(z) in nats, shape ``batch_shape``.

    Args:
        p: The prior.
        z: Values, shape ``(*batch, *event_shape)``.
        detach: What no gradient reaches: ``"guide"``, that is z; ``"prior"``, the parameters of p; nothing.
    """
    if detach == "guide":
        return p.log_prob(z.detach())
    if detach is None:
        return p.log_prob(z)
    # The density need not be made of tensors that one could detach (a flow is made of networks): its value,
    # with its slope in z.
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        value = p.log_prob(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    move = slope * (z - z.detach())
    return value.detach() + move.flatten(move.ndim - len(p.event_shape)).sum(-1)


def expected_log_prob(q: Any, p: Any, detach: Detach = None) -> Tensor | None:
    r"""Return :math:`E_{z \sim q} \log p(z)` in nats for two normals; ``None`` for any other pair.

    For :math:`q = N(\mu, \Sigma)` and :math:`p = N(m, L L^\top)`

    .. math:: -\tfrac12 \left( |L^{-1} (\mu - m)|^2 + \mathrm{tr}\, L^{-1} \Sigma L^{-\top} \right)
              - \log\det L - \tfrac d2 \log 2 \pi

    A posterior whose covariance is not at hand in training (FIVE's) is another pair: written out, it would
    cost a pass of the encoder for each latent.

    Args:
        q: The posterior.
        p: The prior.
        detach: As in :func:`log_prob_at`.

    Returns:
        Shape: the broadcast batch shapes.
    """
    ours, theirs = _normal(q, detach == "guide"), _normal(p, detach == "prior")
    if ours is None or theirs is None:
        return None
    (loc, spread, diagonal), (mean, scale, simple) = ours, theirs
    constant = 0.5 * loc.shape[-1] * math.log(2 * math.pi)
    if simple:
        variance = spread.square() if diagonal else spread.square().sum(-1)
        quadratic = ((loc - mean).square() + variance) / scale.square()
        return -(0.5 * quadratic + scale.log()).sum(-1) - constant
    shift = torch.linalg.solve_triangular(scale, (loc - mean).unsqueeze(-1), upper=False)
    tril = torch.diag_embed(spread) if diagonal else spread
    whitened = torch.linalg.solve_triangular(scale, tril, upper=False)
    quadratic = shift.square().sum((-2, -1)) + whitened.square().sum((-2, -1))
    return -0.5 * quadratic - scale.diagonal(dim1=-2, dim2=-1).log().sum(-1) - constant


def mean_log_prob(q: Any, p: Any, num_samples: int, detach: Detach = None) -> Tensor:
    """Average log p over fresh draws from q, and over particles: one figure for each datum.

    Args:
        q: The posterior, ``batch_shape`` ``(*particles, B)``.
        p: The prior, of the same ``batch_shape`` or one that broadcasts.
        num_samples: Draws for each datum, at least; those of all particles are averaged.
        detach: As in :func:`log_prob_at`.

    Returns:
        Shape ``(B,)``, in nats.

    Raises:
        NotImplementedError: If q has no reparameterised draws.
    """
    particles = math.prod(q.batch_shape[:-1])
    # Another instance: a distribution may remember its last draw, which the objective still asks about.
    z = q.expand(q.batch_shape).rsample((-(-num_samples // particles),))
    return log_prob_at(p, z, detach).flatten(0, -2).mean(0)


def _normal(fn: Any, detach: bool) -> tuple[Tensor, Tensor, bool] | None:
    """Location, and scale or its Cholesky factor, and whether it is the former; ``None`` if not normal."""
    held: Callable[[Tensor], Tensor] = Tensor.detach if detach else lambda tensor: tensor
    if isinstance(fn, torch_dist.Independent) and fn.reinterpreted_batch_ndims == 1:
        base = fn.base_dist
        if type(base) in (torch_dist.Normal, dist.Normal):
            return held(base.loc), held(base.scale), True
    if type(fn) in (torch_dist.MultivariateNormal, dist.MultivariateNormal):
        return held(fn.loc), held(fn.scale_tril), False
    return None
