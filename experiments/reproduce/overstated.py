r"""The usual evaluation of hierarchical models, which is no bound (the authors' code for arXiv:2412.01373v1).

It lives here, and not in the library, because its numbers stand beside valid bounds and are for nothing else.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pvae.data import Split
from pvae.distributions import Diffusion
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Site, SiteRecorder, particle_plate

from ..program import Program

__all__ = ["Overstated", "log_prob_on_grid", "overstated"]

_ROWS = 2000  # data times particles in one pass


class Overstated(NamedTuple):
    """What the usual evaluation says of some data, in nats, each of shape ``(N,)``.

    Attributes:
        log_prob: Log-mean-exp of weights with closed-form KLs.
        log_prob_sampled: The same with log q - log p at the draws, but for a density of u on the grid.
        elbo: Mean of the weights of ``log_prob``: a bound but for the density of u.
        reconstruction: Mean of log p(x | z), the same in every evaluation.
    """

    log_prob: Tensor
    log_prob_sampled: Tensor
    elbo: Tensor
    reconstruction: Tensor


def overstated(
    program: Program, split: Split, *, num_particles: int, num_steps: int = 25, seed: int = 0
) -> Overstated:
    r"""Evaluate a hierarchical model as the authors' code does, which overstates the likelihood.

    .. math:: \log \frac1K \sum_k \exp\Big[\log p(x \mid z_k)
              - \sum_l KL\big(q(z_l \mid \cdot) \,\Vert\, p(z_l \mid \cdot)\big)
              - \big(\log r(u_k \mid x) - \widetilde{\log p}(u_k)\big)\Big]

    with closed-form KLs given the sampled latents above, and :func:`log_prob_on_grid` for p(u). It is **no**
    lower bound on log p(x), for three reasons, each of which raises it:

    1. The density of u is the continuous-time bound on a grid of right endpoints. The integrand falls with
       time, so that the sum is below the integral: no model, of however many steps, has this density.
    2. The noise of that density, drawn anew for every particle, is exponentiated. A log-mean-exp of an
       unbiased estimate of a logarithm lies above it, and grows with the number of particles to the largest.
    3. A weight :math:`p(x, z_k) / q(z_k \mid x)` has the mean p(x). One with
       :math:`\log q(z_k) - \log p(z_k)` exchanged for its mean has not:
       :math:`\log \mathbb E_q[p(x \mid z)] - KL(q \Vert p)` may be above log p(x), since a draw that explains
       x better than most no longer pays for being less probable under the prior.

    With one particle the second and the third do nothing: ``elbo`` is a bound where the model has no
    diffusion.

    Args:
        program: The trained program.
        split: Held-out data.
        num_particles: Particles K of each datum.
        num_steps: Points T of the grid; theirs has 25 on MNIST and CIFAR10.
        seed: Seed of the draws.
    """
    device = device_of(*program)
    columns: list[tuple[Tensor, ...]] = []
    with evaluating(*program):
        torch.manual_seed(seed)
        size = max(1, _ROWS // num_particles)
        for part in split.batches(size, seed=0, epoch=0, drop_last=False, shuffle=False):
            x = part.x.to(device)
            with SiteRecorder() as q, particle_plate(num_particles):
                program.guide(x)
            values = {name: site.value for name, site in q.sites.items() if not site.is_factor}
            with SiteRecorder(values) as p, particle_plate(num_particles):
                program.model(x)
            likelihood = _wide(p.sites["x"].log_prob())
            closed, sampled = likelihood, likelihood
            for name in values:
                ratio, kl = _penalties(q.sites[name], p.sites[name], num_steps)
                closed, sampled = closed - kl, sampled - ratio
            columns.append((_mean_exp(closed), _mean_exp(sampled), closed.mean(0), likelihood.mean(0)))
    return Overstated(*(torch.cat(column) for column in zip(*columns, strict=True)))


def log_prob_on_grid(p: Diffusion, u: Tensor, num_steps: int) -> Tensor:
    r"""What the authors' code takes for log p(u) of a diffusion in a test, shape ``u.shape`` less the event.

    .. math:: -\widetilde{\log p}(u) = -\log \mathcal N(u; y_0 / \alpha_0, e^{\gamma_0} I)
              + \frac{1}{2T} \sum_{i=1}^T \gamma'_{t_i} \Vert \epsilon_i - \hat\epsilon(y_{t_i}) \Vert^2
              + KL\big(q(y_1 \mid u) \,\Vert\, \mathcal N(0, I)\big), \qquad t_i = i / T

    with new noise at every point of the grid and at the data: continuous-time weights on a sum over steps,
    which belongs to no model. See :func:`overstated`.

    Args:
        p: The diffusion.
        u: Shape ``(*batch, *u_shape)``.
        num_steps: Points T of the grid.
    """
    low, high = (end.to(u.dtype) for end in p.schedule)
    event = tuple(range(-p.event_dim, 0))
    size = math.prod(p.event_shape)
    first = torch.randn_like(u).square().sum(event)
    at_data = 0.5 * (size * (math.log(2 * math.pi) + low) + first)
    steps = torch.zeros_like(first)
    for i in range(1, num_steps + 1):
        gamma = low + (high - low) * i / num_steps
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        eps = torch.randn_like(u)
        y = alpha * u + sigma * eps
        predicted = p.denoise(y, gamma).to(u.dtype)
        if p.prediction == "v":
            predicted = sigma * y + alpha * predicted
        steps = steps + (eps - predicted).square().sum(event)
    variance = torch.sigmoid(high)
    at_noise = 0.5 * ((1 - variance) * u.square() + variance - variance.log() - 1).sum(event)
    return -(at_data + 0.5 * (high - low) / num_steps * steps + at_noise)


def _penalties(q: Site, p: Site, num_steps: int) -> tuple[Tensor, Tensor]:
    """Log q - log p at the draws, and in closed form where there is one, both ``(K, B)``."""
    if isinstance(p.fn, Diffusion):
        ratio = _wide(q.log_prob()) - _wide(log_prob_on_grid(p.fn, p.value, num_steps))
        return ratio, ratio
    ratio = _wide(q.log_prob()) - _wide(p.log_prob())
    try:
        kl = _wide(kl_divergence(q.fn, p.fn))
    except NotImplementedError:
        return ratio, ratio
    return ratio, kl.expand(ratio.shape)


def _mean_exp(log_w: Tensor) -> Tensor:
    return log_w.logsumexp(0) - math.log(len(log_w))


def _wide(values: Tensor) -> Tensor:
    return values.cpu().double()
