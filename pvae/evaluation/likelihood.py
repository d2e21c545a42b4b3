r"""Importance-weighted log-likelihood (Burda et al. 2016, arXiv:1509.00519v4, eq. 8 and theorem 1)."""

import math

import pyro
import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program, SiteRecorder
from pvae.inference.progress import reporting

from .blocks import BLOCK, BLOCK_NUMBERS, block_of, block_seed, rows_per_pass
from .estimate import LikelihoodEstimate
from .pareto import pareto_khat
from .weights import chain_of, draw, has_estimates, held_out, log_weights

__all__ = ["log_likelihood"]


def log_likelihood(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_particles: int = 1000,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> LikelihoodEstimate:
    r"""Estimate log p(x) of held-out data, datum by datum, by a lower bound that tightens with particles.

    .. math:: \log \frac1K \sum_{k=1}^K w_k, \qquad
              \log w_k = \log p(x, z_k) - \log q(z_k \mid x), \qquad z_k \sim q(z \mid x)

    Every term is a log-density at the draw: no closed-form KL enters, which would not give a bound. The
    weights hold sample sites alone; ``pyro.factor`` terms are no densities and never count, and
    ``poutine.scale`` is ignored. Model and guide run in evaluation mode and are left, as are torch's
    generators and Pyro's param store, exactly as they were.

    The guide sees each datum once (in blocks of 32, the last one padded), seeded by the datum's position:
    estimates and k-hats depend neither on ``batch_size`` nor on the other data.

    Where the model has only an unbiased estimate of a density (a diffusion's), its noise is one more latent:
    the bound holds for the model that is sampled, and the blocks go through the decoder one by one. A model
    with a bound on a log-density is refused, but for one particle.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``.
        guide: The guide program, with the model's latent sites: the proposal. The bound holds under any; the
            better the proposal, the higher the bound. A guide may have a ``proposal_name``.
        x: Data, shape ``(N, *x_shape)``, or a split of a data set, which brings its protocol along.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_particles: Particles K per datum.
        batch_size: Data per pass of the decoder; particles are chunked to keep a pass within a few
            megabytes. Affects time and memory alone.
        seed: Seed of the draws.
        progress: Whether to show a bar; by default on a terminal only.

    Returns:
        The estimate, with its standard error, k-hats and protocol.

    Raises:
        ValueError: For sizes that are not positive, data the likelihood does not support, a sigma fitted to
            training batches that was not measured, a site outside the plate over the data, latents of model
            and guide that differ, a guide without exact density, a bound in place of a density in the
            model under several particles, or a log-weight that is NaN.
        TypeError: If ``x`` is neither a tensor nor a split.

    Example:
        >>> estimate = log_likelihood(model, guide, data.test, num_particles=5000)  # doctest: +SKIP
        >>> print(estimate)  # doctest: +SKIP
    """
    if num_particles < 1:
        raise ValueError(f"num_particles must be positive, got {num_particles}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    x, y, protocol = held_out(model, x, y)
    device = device_of(model, guide)
    rounding = 64 * torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps
    parts = []
    with evaluating(model, guide), reporting("evaluating", len(x), progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        size, noisy, steps = _latents(model, guide, x, y)
        block = min(BLOCK, max(1, BLOCK_NUMBERS // (num_particles * size)))
        # The noise of an estimated density must not depend on the batch: it is drawn for a block at a time.
        blocks = 1 if noisy else max(1, (batch_size or BLOCK) // block)
        rows = rows_per_pass(x)
        for start in range(0, len(x), blocks * block):
            part = slice(start, start + blocks * block)
            draws = [
                draw(guide, *block_of(x, y, i, block), num_particles, block_seed(seed, i // block))
                for i in range(start, min(part.stop, len(x)), block)
            ]
            scored = block_of(x, y, start, block) if noisy else (x[part], None if y is None else y[part])
            log_w = log_weights(model, *scored, draws, rows)[:, : len(x[part])]
            parts.append(_summary(log_w.T.cpu().double(), rounding, start))
            report(min(part.stop, len(x)))
    log_prob, elbo, khat, ess, error = (torch.cat(column) for column in zip(*parts, strict=True))
    columns = (log_prob, elbo, khat, ess, error)
    return LikelihoodEstimate(
        *columns,
        num_particles,
        seed,
        protocol,
        conditional=y is not None,
        proposal=getattr(guide, "proposal_name", None),
        num_steps=None if steps is None else steps[0],
        calibrated=None if steps is None else steps[1],
    )


def _latents(
    model: Program, guide: Program, x: Tensor, y: Tensor | None
) -> tuple[int, bool, tuple[int, bool] | None]:
    """Run both programs once on one datum, with Pyro's validation on.

    Returns:
        How many numbers its latents have, whether the model estimates a density, and the steps of the chain
        that it does so along, if any.
    """
    with pyro.validation_enabled(True):
        x1, y1 = block_of(x, y, 0, 1)
        values, _ = draw(guide, x1, y1, 1, seed=0)
        with SiteRecorder() as p:
            log_weights(model, x1, y1, [(values, torch.zeros(1, 1, device=x.device))], rows=1)
    size = max(1, sum(value.numel() for value in values.values()))
    return size, has_estimates(p.sites.values()), chain_of(p.sites.values())


def _summary(log_w: Tensor, rounding: float, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reduce the log-weights of some data, shape ``(B, K)``, row by row, to the columns of an estimate."""
    bad = log_w.isnan().any(-1)
    if bad.any():
        raise ValueError(f"log-weights must not be NaN, got NaN for datum {start + int(bad.nonzero()[0])}")
    num_particles = log_w.shape[1]
    total = log_w.logsumexp(-1)
    share = (log_w - total.unsqueeze(-1)).exp()  # normalised weights, rows sum to one
    spread = (share - 1 / num_particles).square().sum(-1)
    return (
        total - math.log(num_particles),
        log_w.mean(-1),
        pareto_khat(log_w, rounding),
        1 / share.square().sum(-1),
        (spread * num_particles / max(num_particles - 1, 1)).sqrt(),
    )
