r"""Importance-weighted log-likelihood (Burda et al. 2016, arXiv:1509.00519v4, eq. 8 and theorem 1)."""

import math
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.distributed import Team
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program, Site, SiteRecorder
from pvae.inference.progress import reporting

from .blocks import BLOCK, BLOCK_NUMBERS, block_of, block_seed, rows_per_pass
from .compiled import CompiledScore, warn_uncompiled
from .estimate import LikelihoodEstimate
from .memory import Budget, Measured, check_memory
from .pareto import pareto_khat
from .weights import _log_prob, chain_of, draw, has_estimates, held_out, log_weights

__all__ = ["log_likelihood"]


def log_likelihood(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_particles: int = 1000,
    batch_size: int | None = None,
    memory: int | None = None,
    compile: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    team: Team | None = None,
) -> LikelihoodEstimate:
    r"""Estimate log p(x) of held-out data, datum by datum, by a lower bound that tightens with particles.

    .. math:: \log \frac1K \sum_{k=1}^K w_k, \qquad
              \log w_k = \log p(x, z_k) - \log q(z_k \mid x), \qquad z_k \sim q(z \mid x)

    Every term is a log-density at the draw: no closed-form KL enters, which would not give a bound. The
    weights hold sample sites alone; ``pyro.factor`` terms are no densities and never count, and
    ``poutine.scale`` is ignored. Model and guide run in evaluation mode and are left, as are torch's
    generators and Pyro's param store, exactly as they were.

    The guide sees each datum once (in blocks of 32, the last one padded), seeded by the datum's position:
    estimates and k-hats depend neither on ``batch_size`` nor on ``memory`` nor on the other data. What a
    guide computes from x alone, such as features, is computed once, also where its particles go through it
    in several passes.

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
        memory: Bytes that draws and passes are to keep within, beside programs and data; 1 GiB on a CPU by
            default, a quarter of the memory of a GPU. What a row of a pass takes is measured on one datum,
            and doubled for what is no tensor. Whatever it says, draws of a block take up to 128 MiB (in
            single precision), and a pass holds one particle of each datum of a block. A guide whose draws are
            not made of normal, uniform or exponential noise draws all particles of a block in one pass.
            Affects time and memory alone.
        compile: Whether the model's densities go through ``torch.compile``, which takes its time first (10 to
            60 s on a CPU) and pays off for many data: values are the same up to rounding. A model that cannot
            be compiled, or estimates a density, is evaluated as without, with a warning; so are the last data
            where their number is no multiple of that of a pass.
        seed: Seed of the draws.
        progress: Whether to show a bar; by default on a terminal only.
        team: Processes that share the work, such as ``Team.find()``: all of them call this with the same
            arguments, and return the estimate of one process.

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
    budget = Budget(check_memory(memory, device), device)
    parts = []
    team = team or Team()
    with evaluating(model, guide), reporting("evaluating", len(x), progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        door = looked_at(model, guide, x, y)
        block = min(BLOCK, max(1, BLOCK_NUMBERS // (num_particles * door.size)))
        # The noise of an estimated density must not depend on the batch: it is drawn for a block at a time.
        blocks = 1 if door.noisy else max(1, (batch_size or BLOCK) // block)
        rows = rows_per_pass(x)
        through_guide, through_model = door.rows(budget, num_particles, block, blocks)
        score = _scored_by(model, door.noisy) if compile else None
        for start in team.share(range(0, len(x), blocks * block)):
            part = slice(start, start + blocks * block)
            draws = [
                draw(
                    guide,
                    *block_of(x, y, i, block),
                    num_particles,
                    block_seed(seed, i // block),
                    rows=through_guide,
                )
                for i in range(start, min(part.stop, len(x)), block)
            ]
            scored = block_of(x, y, start, block) if door.noisy else (x[part], None if y is None else y[part])
            log_w = log_weights(model, *scored, draws, rows, fitting=through_model, compiled=score)
            log_w = log_w[:, : len(x[part])]
            parts.append(_summary(log_w.T.cpu().double(), rounding, start))
            report(min(part.stop, len(x)))
    log_prob, elbo, khat, ess, error = (
        torch.cat(column) for column in zip(*team.collect(parts), strict=True)
    )
    columns = (log_prob, elbo, khat, ess, error)
    return LikelihoodEstimate(
        *columns,
        num_particles,
        seed,
        protocol,
        conditional=y is not None,
        proposal=getattr(guide, "proposal_name", None),
        num_steps=None if door.steps is None else door.steps[0],
        calibrated=None if door.steps is None else door.steps[1],
    )


@dataclass(frozen=True)
class Door:
    """What one run of both programs, on one datum and one particle, says of all.

    Attributes:
        size: How many numbers the latents of a datum have.
        noisy: Whether the model estimates a density.
        steps: The steps of the chain that it does so along, if any, and whether they are calibrated.
        of_guide: Bytes that one particle takes on its way through the guide.
        of_model: Bytes that it takes on its way through the model.
        of_datum: Bytes that a guide keeps of a datum for all its particles.
        of_latents: Bytes of the latents themselves.
    """

    size: int
    noisy: bool
    steps: tuple[int, bool] | None
    of_guide: int
    of_model: int
    of_datum: int
    of_latents: int

    def rows(self, budget: Budget, num_particles: int, block: int, blocks: int = 1) -> tuple[int, int]:
        """Rows that fit into one pass of the guide and of the model, beside the draws of some blocks."""
        # With the draws lies their noise or, of several blocks, all of them side by side.
        drawn = 2 * blocks * num_particles * block * self.of_latents
        return (
            budget.rows(self.of_guide, drawn + block * self.of_datum),
            budget.rows(self.of_model, drawn),
        )


def looked_at(model: Program, guide: Program, x: Tensor, y: Tensor | None) -> Door:
    """Run both programs once on one datum, with Pyro's validation on."""
    with pyro.validation_enabled(True):
        x1, y1 = block_of(x, y, 0, 1)
        with Measured() as of_guide:
            values, _ = draw(guide, x1, y1, 1, seed=0)
        of_model = Measured()
        of_model.mark(values)
        with SiteRecorder() as p, of_model:
            log_weights(model, x1, y1, [(values, torch.zeros(1, 1, device=x.device))], rows=1)
    return Door(
        max(1, sum(value.numel() for value in values.values())),
        has_estimates(p.sites.values()),
        chain_of(p.sites.values()),
        of_guide.peak,
        of_model.peak,
        of_guide.kept,
        sum(value.nbytes for value in values.values()),
    )


def _scored_by(model: Program, noisy: bool) -> CompiledScore | None:
    if noisy:
        warn_uncompiled("it draws noise to estimate a density")
        return None
    return CompiledScore(model, _density)


def _density(sites: list[Site], shape: tuple[int, int]) -> Tensor:
    """Log-density of exact sites, shape ``(k, B)``, double precision."""
    terms = [_log_prob(site, shape, "model") for site in sites if not site.is_factor]
    return torch.stack(terms).sum(0)


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
