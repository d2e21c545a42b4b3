"""What is measured of a trained program on held-out data, whatever the study."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.data import Split
from pvae.evaluation import bits_per_dimension, log_likelihood
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import SiteRecorder, particle_plate

from ..program import Program
from .study import Metrics, plain

__all__ = ["Posterior", "likelihood", "posterior", "reconstructions", "sigma_of"]

_ROWS = 500  # data in one pass


class Posterior(NamedTuple):
    """Means over held-out data and draws of z from the guide.

    Attributes:
        rate: log q(z | x, y) - log p(z | y), nats per datum.
        log_prior: log p(z | y), nats per datum.
        mse: Squared error of the mean of p(x | z, y), per entry of x.
    """

    rate: float
    log_prior: float
    mse: float


def likelihood(program: Program, split: Split, levels: int, num_particles: int, seed: int) -> Metrics:
    """Estimate the held-out likelihood with sigma as it was stored after training.

    Args:
        program: The trained program.
        split: Held-out data, dequantised to densities on [0, 1].
        levels: Grey levels that they were recorded in.
        num_particles: Importance samples for each datum.
        seed: Seed of the importance samples.
    """
    estimate = log_likelihood(*program, split, num_particles=num_particles, seed=seed, progress=False)
    size = math.prod(split.x_shape)
    return {
        "elbo": plain(estimate.elbo),
        "iwae": plain(estimate.mean),
        "elbo_bits": plain(bits_per_dimension(estimate.elbo, size, levels)),
        "iwae_bits": plain(bits_per_dimension(estimate.mean, size, levels)),
        "iwae_error": plain(estimate.standard_error),
        "elbo_error": plain(estimate.elbo_values.std() / math.sqrt(len(estimate.elbo_values))),
        "particle_error": plain(estimate.monte_carlo_error),
        "khat_share": plain(estimate.khat_share),
    }


def posterior(program: Program, split: Split, num_draws: int, seed: int) -> Posterior:
    """Measure rate, prior and reconstruction at draws from the guide.

    Args:
        program: The trained program.
        split: Held-out data.
        num_draws: Draws of z for each datum.
        seed: Seed of the draws.
    """
    device = device_of(*program)
    totals = torch.zeros(3, dtype=torch.float64)
    with evaluating(*program):
        torch.manual_seed(seed)
        for part in split.batches(_ROWS, seed=0, epoch=0, drop_last=False, shuffle=False):
            x = part.x.to(device)
            args = _arguments(program, x, part.y)
            with SiteRecorder() as q, particle_plate(num_draws):
                program.guide(*args)
            drawn = q.sites["z"]
            with SiteRecorder({"z": drawn.value}) as p, particle_plate(num_draws):
                program.model(*args)
            log_q, log_p = drawn.log_prob(), p.sites["z"].log_prob()
            error = (p.sites["x"].fn.mean - x).square().flatten(2).mean(-1)
            totals += torch.stack([(log_q - log_p).sum(), log_p.sum(), error.sum()]).double().cpu()
    return Posterior(*(totals / (num_draws * len(split))).tolist())


def reconstructions(program: Program, split: Split) -> Tensor:
    """Return the means of p(x | z, y) at the guide's mean of z, shape ``(N, *x_shape)``."""
    device, found = device_of(*program), []
    with evaluating(*program):
        for part in split.batches(_ROWS, seed=0, epoch=0, drop_last=False, shuffle=False):
            args = _arguments(program, part.x.to(device), part.y)
            with SiteRecorder() as q:
                program.guide(*args)
            with SiteRecorder({"z": q.sites["z"].fn.mean}) as p:
                program.model(*args)
            found.append(p.sites["x"].fn.mean)
    return torch.cat(found)


def sigma_of(program: Program) -> float:
    """Return sigma of a normal likelihood, as every evaluation uses it."""
    return float(program.model.likelihood.sigma.detach())  # type: ignore[union-attr, operator]


def _arguments(program: Program, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    if y is not None and getattr(program.model, "conditional", False):
        return x, y.to(x.device)
    return (x,)
