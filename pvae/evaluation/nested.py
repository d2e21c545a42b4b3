r"""Nested bound on log p(x) of a model with a latent whose density is only bounded (Kuzina & Tomczak 2024,
arXiv:2412.01373v1; the bound is worked out in the function's docstring).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.data import Split
from pvae.distributions import declared
from pvae.inference.distributed import Team
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program, SiteRecorder, particle_plate
from pvae.inference.progress import reporting
from pvae.priors import DiffusionPrior

from .blocks import BLOCK, block_of, block_seed, rows_per_pass
from .likelihood import _summary, looked_at
from .memory import Budget, check_memory
from .pareto import khat_share
from .weights import draw, exact, held_out, log_weights

__all__ = ["NestedEstimate", "nested_likelihood"]


@dataclass(frozen=True)
class NestedEstimate:
    """Nested lower bounds on log p(x), one per datum, in nats; see :func:`nested_likelihood`.

    Attributes:
        log_prob: The bounds, averages over the draws of u, shape ``(N,)``, double precision.
        elbo_values: Evidence lower bounds from the same draws, shape ``(N,)``.
        kl_values: For each latent in the model's order, the sampled log q - log p (a bound on it, for u) at
            one draw of all latents for each draw of u, averaged over these; shape ``(N,)`` each.
        draw_error: Standard error of each ``log_prob`` over the draws of u and all noise within them, shape
            ``(N,)``; NaN for a single draw.
        outer: Names of the latents that are drawn outside the logarithm, u.
        num_particles: Draws K of the other latents for each draw of u.
        num_draws: Draws of u for each datum.
        num_times: Times of the diffusion's bound for each draw of u.
        seed: Seed of the draws.
        protocol: What was scored (data set, split, binarisation, hash), if known.
        conditional: Whether the density is that of x given its label, log p(x | y).
        proposal: Name of the proposal that the latents were drawn from, where the guide has one.
        pareto_k: Tail index of the weights within the logarithm, of the worst draw of u of each datum, shape
            ``(N,)``; see :func:`pareto_khat`. NaN with fewer than 30 particles.
        ess: Effective sample size of the same weights, of the worst draw of u, shape ``(N,)``.
    """

    log_prob: Tensor
    elbo_values: Tensor
    kl_values: Mapping[str, Tensor]
    draw_error: Tensor
    outer: tuple[str, ...]
    num_particles: int
    num_draws: int
    num_times: int
    seed: int
    protocol: dict[str, Any] | None = None
    conditional: bool = False
    proposal: str | None = None
    pareto_k: Tensor | None = None
    ess: Tensor | None = None

    @property
    def khat_share(self) -> float:
        """Share of data whose k-hat is too high; NaN where no k-hat could be had."""
        return math.nan if self.pareto_k is None else khat_share(self.pareto_k, self.num_particles)

    @property
    def mean(self) -> float:
        """Mean bound in nats per datum."""
        return float(self.log_prob.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over data, nats; NaN for a single datum."""
        n = len(self.log_prob)
        return float(self.log_prob.std() / math.sqrt(n)) if n > 1 else math.nan

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of the mean from the finite number of draws of u, nats; NaN for a single draw."""
        return float(self.draw_error.square().sum().sqrt() / len(self.draw_error))

    @property
    def elbo(self) -> float:
        """Mean evidence lower bound in nats per datum, from the same draws."""
        return float(self.elbo_values.mean())

    @property
    def rate_values(self) -> Tensor:
        """The rate of u of each datum, the mean of log r(u | x) - vlb(u), shape ``(N,)``, in nats."""
        return torch.stack([self.kl_values[name] for name in self.outer]).sum(0)

    @property
    def rate(self) -> float:
        """Mean rate of u in nats per datum: at least the KL of r(u | x) from p(u)."""
        return float(self.rate_values.mean())

    @property
    def kl(self) -> dict[str, float]:
        """Mean KL of each latent in nats per datum, in the model's order; that of u is its rate."""
        return {name: float(values.mean()) for name, values in self.kl_values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold (no error is ``None``)."""
        return {
            "bound": "nested",
            "log_likelihood": self.mean,
            "standard_error": _finite(self.standard_error),
            "monte_carlo_error": _finite(self.monte_carlo_error),
            "elbo": self.elbo,
            "rate": self.rate,
            "kl": self.kl,
            "khat_share": _finite(self.khat_share),
            "num_data": len(self.log_prob),
            "num_particles": self.num_particles,
            "num_draws": self.num_draws,
            "num_times": self.num_times,
            "seed": self.seed,
            "conditional": self.conditional,
            "proposal": self.proposal,
            "protocol": self.protocol,
            "per_datum": {
                "log_prob": self.log_prob.tolist(),
                "elbo": self.elbo_values.tolist(),
                "rate": self.rate_values.tolist(),
                "draw_error": [_finite(error) for error in self.draw_error.tolist()],
            },
        }

    def __str__(self) -> str:
        given = " | y" if self.conditional else ""
        drawn = "" if self.proposal is None else f", proposal {self.proposal}"
        u = ", ".join(self.outer)
        draws = f"{self.num_draws} draws" if self.num_draws > 1 else "one draw"
        error = f", Monte-Carlo error {self.monte_carlo_error:.3f}" if self.num_draws > 1 else ""
        line = (
            f"nested bound: log p(x{given}) >= {self.mean:.2f} ± {self.standard_error:.2f} nats"
            f" (IWAE-{self.num_particles} given {u}, {draws} of {u}, continuous time, on"
            f" {len(self.log_prob)} data{drawn}{error}; ELBO {self.elbo:.2f}, rate of {u} {self.rate:.2f})"
        )
        if self.khat_share > 0.05:
            line += (
                f"; k-hat too high for {100 * self.khat_share:.1f} % (the bound is low there: more particles)"
            )
        if self.protocol is not None:
            line += f"; protocol {self.protocol.get('name', '?')} {self.protocol.get('hash', '?')}"
        return line


def nested_likelihood(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_particles: int = 100,
    num_draws: int = 4,
    num_times: int = 32,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | None = None,
    progress: bool | None = None,
    team: Team | None = None,
) -> NestedEstimate:
    r"""Bound log p(x) of a model whose outermost latent u has a density that is only bounded.

    A diffusion's stochastic bound :math:`\mathrm{vlb}(u) \le \log p(u)` may enter an expectation and not a
    logarithm of one. So u is drawn outside the log-mean-exp, and the other latents z inside, given u:

    .. math::
        \mathbb E_{u \sim r(u \mid x)} \Big[ \mathrm{vlb}(u) - \log r(u \mid x)
        + \mathbb E \log \frac1K \sum_{k=1}^K \frac{p(x, z_k \mid u)}{q(z_k \mid u, x)} \Big] \le \log p(x),
        \qquad z_k \sim q(z \mid u, x)

    of the model in continuous time: no number of steps enters. One particle gives the ELBO; the bound rises
    with K, to :math:`\log p(x) - \mathrm{KL}(r(u \mid x) \,\Vert\, p(u \mid x))` less what vlb lacks.
    :func:`log_likelihood` closes that gap too, for the T-step model.

    u is every latent whose density is a bound or an unbiased estimate (whose logarithm is a bound), found by
    running the programs; diffusion priors of the model give their bound meanwhile. Every term is a
    log-density at a draw. Programs run in evaluation mode and are left, as are generators and Pyro's param
    store, exactly as they were. Draws are seeded by a datum's position, in blocks of 32: estimates depend
    neither on ``batch_size`` nor on ``memory`` nor on the other data.

    Args:
        model: The model program; u comes before its other latents.
        guide: The guide program, with the model's latents, u first.
        x: Data, shape ``(N, *x_shape)``, or a split of a data set, which brings its protocol along.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_particles: Particles K for each draw of u.
        num_draws: Draws of u for each datum, over which the bound is averaged; with one there is no error.
        num_times: Times of the diffusion's bound for each draw of u.
        seed: Seed of the draws.
        batch_size: Data per pass of the model; particles are chunked to keep a pass within a few megabytes.
            Affects time and memory alone.
        memory: Bytes that draws and passes are to keep within, as in :func:`log_likelihood`; the draws of u
            themselves, ``num_draws`` of each datum of a block, are made in one pass.
        progress: Whether to show a bar; by default on a terminal only.
        team: Processes that share the work, as in :func:`log_likelihood`.

    Returns:
        The estimate, with its errors, the ELBO, the rate of u and the KL of every latent.

    Raises:
        ValueError: For sizes that are not positive, data the likelihood does not support, a model all of
            whose latents have an exact density, u behind another latent in one of the programs, or a bound
            that is NaN; and for programs that :func:`log_likelihood` refuses.
        TypeError: If ``x`` is neither a tensor nor a split.

    Example:
        >>> estimate = nested_likelihood(model, guide, data.test, num_particles=50)  # doctest: +SKIP
        >>> print(estimate)  # doctest: +SKIP
    """
    sizes = {"num_particles": num_particles, "num_draws": num_draws, "num_times": num_times}
    for name, size in (sizes | ({} if batch_size is None else {"batch_size": batch_size})).items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    x, y, protocol = held_out(model, x, y)
    device = device_of(model, guide)
    rounding = 64 * torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps
    budget = Budget(check_memory(memory, device), device)
    parts: list[tuple[Tensor, ...]] = []
    latents: list[str] = []
    team = team or Team()
    with (
        evaluating(model, guide),
        _bounding(model, num_times),
        reporting("nested bound", len(x), progress) as report,
    ):
        x = x.to(device)
        y = None if y is None else y.to(device)
        outer = _outer_sites(model, guide, x, y)
        rows = rows_per_pass(x)
        step = BLOCK * max(1, (batch_size or BLOCK) // BLOCK)
        through_guide, through_model = looked_at(model, guide, x, y).rows(
            budget, max(1, rows // BLOCK), BLOCK, step // BLOCK
        )
        for start in team.share(range(0, len(x), step)):
            part = slice(start, min(start + step, len(x)))
            drawn = [
                _draw_outer(model, guide, *block_of(x, y, i, BLOCK), num_draws, _seed(seed, i), outer)
                for i in range(start, part.stop, BLOCK)
            ]
            size = part.stop - start
            kl = {name: torch.cat([ratios[name] for _, ratios in drawn], 1)[:, :size] for name in drawn[0][1]}
            log_w = []
            # A chunk is seeded, and so of one size whatever the batch.
            for chunk in torch.arange(num_draws * num_particles).split(max(1, rows // BLOCK)):
                index = (chunk // num_particles).to(device)
                draws = [
                    draw(
                        guide,
                        *block_of(x, y, start + i * BLOCK, BLOCK),
                        len(chunk),
                        _seed(seed, start + i * BLOCK, 1 + int(chunk[0])),
                        {name: value[index] for name, value in u.items()},
                        through_guide,
                    )
                    for i, (u, _) in enumerate(drawn)
                ]
                scored = x[part], None if y is None else y[part]
                log_w.append(log_weights(model, *scored, draws, rows, outer, through_model).cpu().double())
            inner = torch.cat(log_w).unflatten(0, (num_draws, num_particles))
            rate = torch.stack([kl[name] for name in outer]).sum(0)
            bounds, elbos = inner.logsumexp(1) - math.log(num_particles) - rate, inner.mean(1) - rate
            _check_numbers(bounds, start)
            found = [_summary(log_w_u.T, rounding, start)[2:4] for log_w_u in inner]
            khat, ess = (torch.stack(column) for column in zip(*found, strict=True))
            latents = list(kl)
            means = (ratio.mean(0) for ratio in kl.values())
            parts.append((bounds, elbos.mean(0), khat.amax(0), ess.amin(0), *means))
            report(part.stop)
    latents = team.tell(latents)  # some may have had no data
    columns = list(zip(*team.collect(parts), strict=True))
    bounds = torch.cat(columns[0], 1)
    elbo, khat, ess, *kl_means = (torch.cat(column) for column in columns[1:])
    error = bounds.std(0) / math.sqrt(num_draws) if num_draws > 1 else torch.full_like(bounds[0], math.nan)
    return NestedEstimate(
        bounds.mean(0),
        elbo,
        dict(zip(latents, kl_means, strict=True)),
        error,
        outer,
        num_particles,
        num_draws,
        num_times,
        seed,
        protocol,
        conditional=y is not None,
        proposal=getattr(guide, "proposal_name", None),
        pareto_k=khat,
        ess=ess,
    )


@contextmanager
def _bounding(model: Program, num_times: int) -> Iterator[None]:
    """Let the model's diffusion priors give their bound, at several times for each datum."""
    with ExitStack() as stack:
        for module in model.modules() if isinstance(model, nn.Module) else ():
            if isinstance(module, DiffusionPrior):
                stack.enter_context(module.using("vlb", num_times))
        yield


def _outer_sites(model: Program, guide: Program, x: Tensor, y: Tensor | None) -> tuple[str, ...]:
    """Check both programs on two data, with Pyro's validation on; name the latents without a density."""
    x2, y2 = block_of(x, y, 0, 2)
    with pyro.validation_enabled(True):
        with SiteRecorder() as q:
            drawn = draw(guide, x2, y2, 1, seed=0)
        with SiteRecorder() as p:
            log_weights(model, x2, y2, [drawn], rows=2)
    latents = {name: site for name, site in p.sites.items() if name in drawn[0]}
    outer = tuple(name for name, site in latents.items() if declared(site.fn, "density", "exact") != "exact")
    if not outer:
        raise ValueError(
            "model must have a latent whose density is only bounded, such as one under a diffusion, "
            f"got exact densities of {', '.join(latents) or 'no latent'}: take log_likelihood"
        )
    for program, names in (
        ("model", list(latents)),
        ("guide", [name for name in q.sites if name in latents]),
    ):
        if set(names[: len(outer)]) != set(outer):
            raise ValueError(
                f"{program} must draw {', '.join(outer)}, whose density is only bounded, before its other "
                f"latents, got the order {', '.join(names)}"
            )
    return outer


def _seed(seed: int, start: int, chunk: int = 0) -> int:
    """Seed of u (chunk 0), or of a chunk of z, for the block of data that begins at ``start``."""
    return block_seed(block_seed(seed, start // BLOCK), chunk)


def _draw_outer(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    num_draws: int,
    seed: int,
    outer: tuple[str, ...],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw u for a block of data, ``(num_draws, B, *event_shape)``, and log q - log p of every latent in the
    model's order, ``(num_draws, B)``, at one draw of the others for each.
    """
    torch.manual_seed(seed)
    with SiteRecorder(replace=exact) as q, particle_plate(num_draws):
        guide(x) if y is None else guide(x, y)
    values = {name: site.value for name, site in q.sites.items() if not site.is_factor}
    with SiteRecorder(values) as p, particle_plate(num_draws):
        model(x) if y is None else model(x, y)
    ratios = {
        name: q.sites[name].log_prob().cpu().double() - site.log_prob().cpu().double()
        for name, site in p.sites.items()
        if name in values
    }
    return {name: values[name] for name in outer}, ratios


def _check_numbers(bounds: Tensor, start: int) -> None:
    bad = bounds.isnan().any(0)
    if bad.any():
        raise ValueError(f"bounds must not be NaN, got NaN for datum {start + int(bad.nonzero()[0])}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
