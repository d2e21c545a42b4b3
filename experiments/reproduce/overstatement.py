"""By how much the usual evaluation of hierarchical models overstates, where the truth is in closed form.

The evaluation is that of the authors' code for arXiv:2412.01373v1, see :mod:`.overstated`.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions import MultivariateNormal, Normal, TorchDistribution
from torch import Tensor

from pvae.distributions import Diffusion
from pvae.testing import LinearGaussianVAE

from .ledger import Record
from .overstated import log_prob_on_grid
from .plots import Trend, trends
from .study import AnyStudy, Cell, Context, Metrics, Outcome, Scale, plain
from .tables import Column, configurations, interval, table

__all__ = ["OverstatementStudy", "gaps", "log_mean_exp", "optimal_noise", "with_closed_kl"]


@dataclass(frozen=True)
class _Scale(Scale):
    """How large a study is; ``num_data`` are those of the linear-Gaussian model.

    Attributes:
        num_passes: Passes of the denoiser that a cell may spend on the noise of a density.
    """

    num_passes: int = 2_000_000


_PIXELS, _LATENTS, _NOISE = 100, 20, 1.0
_GUIDES = {"exact": "exact posterior", "mean-field": "best mean-field"}
_VARIANCES = {"s1": 1.0, "s0.05": 0.05, "s0.01": 0.01}
_STEPS = (25, 50, 100, 1000)
_ENDS = (-6.0, 7.0)
_SIZE = 49  # numbers of u, as on MNIST
_ESTIMATES = {
    "grid": "the authors' density",
    "chain": "chain, calibrated",
    "vlb": "bound at one time",
}
_FAMILIES = {
    "linear-gaussian": (
        f"A linear-Gaussian model of {_PIXELS} pixels, {_LATENTS} latents and a signal as strong as its "
        "noise. Figures are estimates of log p(x) less the exact one, in nats, with K particles: of proper "
        "weights, which may be above zero by their error alone, and of weights in which the closed-form KL "
        "stands for log q - log p. The limit is that of the latter for K without end, in closed form."
    ),
    "gaussian-u": (
        f"Normal u of mean zero under a diffusion with γ from {_ENDS[0]:g} to {_ENDS[1]:g} and the optimal "  # noqa: RUF001
        "denoiser. Exact expectations of minus each log-density less the entropy of u, in nats per "
        "coefficient: a bound cannot be below zero."
    ),
}
_DRAWN = (
    f"The same drawn, for u of {_SIZE} coefficients: the log-mean-exp of K draws of each density less "
    "log p(u), in nats. Expected: the exact expectation with one draw. The chain's tends to that of the "
    "steps that are sampled, and is a bound with any K; the bound at one time may not be exponentiated."
)
_WORDS = (
    _GUIDES
    | {name: f"{variance:g}" for name, variance in _VARIANCES.items()}
    | {f"T{steps}": str(steps) for steps in _STEPS}
)
_EXACT = (
    Column("entropy", "entropy"),
    Column("gap_continuous", "continuous time"),
    Column("gap_steps", "T steps"),
    Column("gap_calibrated", "T steps, calibrated"),
    Column("gap_grid", "the authors' density"),
)


class OverstatementStudy(AnyStudy):
    """Closed-form KLs inside a log-mean-exp, and densities of u on a grid, against the truth."""

    name = "overstatement"
    about = "By how much the usual evaluation of hierarchical models overstates the likelihood"
    scales = {  # noqa: RUF012  (a class attribute that nobody changes)
        "smoke": _Scale((), (0,), 10, 10, 0, 0, num_passes=4000),
        "cpu": _Scale((), (0, 1, 2, 3, 4), 200, 1000, 0, 0),
        "full": _Scale((), tuple(range(10)), 500, 1000, 0, 0, num_passes=20_000_000),
    }

    def cells(self, scale: Scale) -> list[Cell]:
        """List guides of the linear-Gaussian model, then variances and steps; seeds are the slowest."""
        cells = []
        for seed in scale.seeds:
            for guide in _GUIDES:
                cells.append(Cell({"data": "linear-gaussian", "guide": guide}, seed, seconds=2.0))
            for name, steps in itertools.product(_VARIANCES, _STEPS):
                factors = {"data": "gaussian-u", "variance": name, "steps": f"T{steps}"}
                cells.append(Cell(factors, seed, seconds=10.0))
        return cells

    def run(self, cell: Cell, context: Context) -> Outcome:
        """Draw data or noise, and compare estimates with the truth; no data set is loaded."""
        scale, factors = context.scale, cell.factors
        assert isinstance(scale, _Scale)
        torch.manual_seed(cell.seed)
        if factors["data"] == "linear-gaussian":
            found = _linear_gaussian(factors["guide"], scale)
        else:
            steps = int(factors["steps"].removeprefix("T"))
            found = _gaussian_u(_VARIANCES[factors["variance"]], steps, scale)
        return Outcome(_protocol(factors["data"]), found)

    def tables(self, records: Sequence[Record]) -> list[str]:
        """Write what is exact, then what was drawn, by number of particles."""
        parts = []
        for (family,), cells in configurations(records, ("data",)).items():
            counts = _counts_of(cells)
            if family == "linear-gaussian":
                columns = [
                    *(Column(f"proper_{k}", f"proper, K = {k}") for k in counts),
                    *(Column(f"closed_{k}", f"closed-form KL, K = {k}") for k in counts),
                    Column("limit", "limit"),
                ]
                parts.append(f"{_FAMILIES[family]}\n\n{table(cells, ('guide',), columns, _WORDS)}")
                continue
            factors = ("variance", "steps")
            first = [cell for cell in cells if cell.seed == min(other.seed for other in cells)]
            parts.append(f"{_FAMILIES[family]}\n\n{table(first, factors, _EXACT, _WORDS)}")
            parts.append(_DRAWN)
            for name, words in _ESTIMATES.items():
                columns = [
                    Column(f"{name}_expected", "expected"),
                    *(Column(f"{name}_{k}", f"{words}, K = {k}") for k in counts),
                ]
                parts.append(table(cells, factors, columns, _WORDS))
        return parts

    def figures(self, records: Sequence[Record], stem: Path, title: str) -> list[Path]:
        """Draw estimates less the truth against the number of particles."""
        counts = _counts_of(records)
        panels: dict[str, list[Trend]] = {}
        for (guide,), cells in configurations(records, ("guide",)).items():
            panels[f"{_GUIDES[guide]}, nats"] = [
                _trend(words, cells, name, counts)
                for name, words in (("closed", "closed-form KL"), ("proper", "proper weights"))
            ]
        for (variance, steps), cells in configurations(records, ("variance", "steps")).items():
            if steps == f"T{_STEPS[0]}":
                panels[f"variance {_WORDS[variance]}, nats"] = [
                    _trend(_ESTIMATES[name], cells, name, counts) for name in ("grid", "chain")
                ]
        if not panels:
            return []
        path = stem.with_name(f"{stem.name}-particles.png")
        heading = f"{title}: less the truth"
        return [trends(panels, path, heading, across="particles K", ticks=counts)]


def with_closed_kl(
    likelihood: Tensor, q: TorchDistribution, z: Tensor, loc: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log-weights under N(0, I): proper ones, and those with the closed-form KL, both ``(K, B)``.

    Args:
        likelihood: log p(x | z) in nats, shape ``(K, B)``.
        q: The guide's normals, ``batch_shape (B,)``.
        z: Its draws, shape ``(K, B, d)``.
        loc: Its means, shape ``(B, d)``.
        covariance: Its covariance, shape ``(d, d)``.
    """
    prior = Normal(torch.zeros_like(loc[0]), 1.0).to_event(1)
    size = loc.shape[-1]
    kl = 0.5 * (covariance.trace() + loc.square().sum(-1) - size - torch.logdet(covariance))
    return likelihood + prior.log_prob(z) - q.log_prob(z), likelihood - kl


def gaps(variance: float, num_steps: int, ends: tuple[float, float] = _ENDS) -> dict[str, float]:
    r"""Expected minus log-density less the entropy, for one coefficient of u under the optimal denoiser.

    Its noise is known up to :math:`m(\gamma) = s^2 e^{-\gamma} / (1 + s^2 e^{-\gamma})`, and with it

    .. math::
        \text{continuous} = \tfrac12 \int m \, d\gamma, \quad
        \text{steps} = \tfrac12 \sum_i (e^\Delta - 1) m_i, \quad
        \text{calibrated} = \tfrac12 \sum_i \log(1 + (e^\Delta - 1) m_i), \quad
        \text{grid} = \tfrac12 \sum_i \Delta \, m_i

    with :math:`\Delta = (\gamma_1 - \gamma_0) / T`, and the ends that all have in common.

    Args:
        variance: Of u, :math:`s^2`, whose mean is zero.
        num_steps: Steps T.
        ends: :math:`\gamma_0` and :math:`\gamma_1`.
    """
    low, high = ends
    delta = (high - low) / num_steps
    mse = _mse(variance, num_steps, ends)
    grown = math.expm1(delta)
    alpha, sigma = 1 / (1 + math.exp(high)), 1 / (1 + math.exp(-high))  # squares
    at_ends = 0.5 * (math.log(2 * math.pi) + low + 1 + alpha * variance + sigma - math.log(sigma) - 1)
    entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
    between = {
        "continuous": math.log1p(variance * math.exp(-low)) - math.log1p(variance * math.exp(-high)),
        "steps": float((grown * mse).sum()),
        "calibrated": float((grown * mse).log1p().sum()),
        "grid": float((delta * mse).sum()),
    }
    return {name: at_ends + 0.5 * value - entropy for name, value in between.items()}


def optimal_noise(variance: float, u_shape: tuple[int, ...], num_steps: int) -> Diffusion:
    """Build the diffusion with the optimal denoiser of normal u of mean zero, calibrated, in double.

    Args:
        variance: Of every coefficient of u.
        u_shape: Shape of u.
        num_steps: Steps T of the chain.
    """

    def noise(y: Tensor, gamma: Tensor) -> Tensor:
        gamma = gamma.reshape(*gamma.shape, *(1 for _ in u_shape))
        return torch.sigmoid(gamma).sqrt() * y / (torch.sigmoid(-gamma) * variance + torch.sigmoid(gamma))

    low, high = torch.tensor(_ENDS, dtype=torch.float64)
    mse = _mse(variance, num_steps, _ENDS).reshape(-1, *(1 for _ in u_shape)).expand(-1, *u_shape)
    return Diffusion(noise, (low, high), u_shape, "chain", num_steps, prediction="eps", mse=mse)


def log_mean_exp(log_w: Tensor, num_particles: int) -> Tensor:
    """Average the log-mean-exp of K log-weights over as many blocks of K as there are, ``(M, B) -> (B,)``."""
    size = len(log_w) // num_particles
    blocks = log_w[: size * num_particles].reshape(size, num_particles, *log_w.shape[1:])
    found: Tensor = (blocks.logsumexp(1) - math.log(num_particles)).mean(0)
    return found


def _mse(variance: float, num_steps: int, ends: tuple[float, float]) -> Tensor:
    gamma = torch.linspace(*ends, num_steps + 1, dtype=torch.float64)[1:]
    return torch.sigmoid(math.log(variance) - gamma)


def _linear_gaussian(guide: str, scale: _Scale) -> Metrics:
    weight = torch.from_numpy(_weight())
    oracle = LinearGaussianVAE(_PIXELS, _LATENTS, _NOISE, weight=weight, bias=torch.zeros(_PIXELS))
    proposal = oracle.exact_guide if guide == "exact" else oracle.mean_field_guide
    with torch.no_grad():
        x = oracle.model.sample(scale.num_data)
        exact, q, loc = oracle.log_prob(x), proposal.posterior(x), proposal.loc(x)
        covariance = proposal.scale @ proposal.scale.T if guide == "exact" else proposal.scale.square().diag()
        z = q.sample((scale.num_particles,))
        weights = with_closed_kl(oracle.model.decode(z).log_prob(x), q, z, loc, covariance)
        # log E_q p(x | z) is that of x under the linear map of q, and the KL is no function of the draw.
        noise = _NOISE**2 * torch.eye(_PIXELS, dtype=torch.float64)
        seen = MultivariateNormal(loc @ weight.T, weight @ covariance @ weight.T + noise).log_prob(x)
        limit = with_closed_kl(seen[None], q, z[:1], loc, covariance)[1][0] - exact
    found: Metrics = {"exact": plain(exact.mean()), "limit": plain(limit.mean())}
    for name, log_w in zip(("proper", "closed"), weights, strict=True):
        for k in _counts(scale.num_particles):
            found[f"{name}_{k}"] = plain((log_mean_exp(log_w, k) - exact).mean())
    return found


def _gaussian_u(variance: float, num_steps: int, scale: _Scale) -> Metrics:
    """Exact gaps, and the noise of each density, for as many u as the passes last."""
    exact = gaps(variance, num_steps)
    found: Metrics = {f"gap_{name}": gap for name, gap in exact.items()}
    found["entropy"] = 0.5 * math.log(2 * math.pi * math.e * variance)
    for name, gap in (("grid", "grid"), ("chain", "calibrated"), ("vlb", "continuous")):
        found[f"{name}_expected"] = -_SIZE * exact[gap]
    particles = scale.num_particles
    number = min(100, max(2, scale.num_passes // (particles * num_steps)))
    p = optimal_noise(variance, (_SIZE,), num_steps)
    bound = Diffusion(p.denoise, p.schedule, (_SIZE,), "vlb", num_steps, prediction="eps")
    truth = Normal(torch.zeros(_SIZE, dtype=torch.float64), variance**0.5).to_event(1)
    u = truth.sample((number,))
    log_p = truth.log_prob(u)
    draws: dict[str, list[Tensor]] = {name: [] for name in _ESTIMATES}
    for one in u:
        many = one.expand(particles, _SIZE)
        draws["grid"].append(log_prob_on_grid(p, many, num_steps))
        draws["chain"].append(p.log_prob(many))
        draws["vlb"].append(bound.log_prob(many))
    for name, columns in draws.items():
        log_w = torch.stack(columns, 1)
        for k in _counts(particles):
            found[f"{name}_{k}"] = plain((log_mean_exp(log_w, k) - log_p).mean())
    return found


def _weight() -> NDArray[np.float64]:
    """A signal of about the variance of the noise in every pixel."""
    return np.random.default_rng(0).normal(size=(_PIXELS, _LATENTS)) / math.sqrt(_LATENTS)


def _counts(num_particles: int) -> list[int]:
    return [k for k in (1, 10, 100, 1000) if k <= num_particles]


def _counts_of(records: Sequence[Record]) -> list[int]:
    return _counts(max(record.settings["num_particles"] for record in records))


def _protocol(family: str) -> dict[str, str]:
    """Name of a family, and a digest of what is fixed about it."""
    fixed: Mapping[str, object] = {
        "linear-gaussian": {"weight": _weight().round(6).tolist(), "noise": _NOISE},
        "gaussian-u": {"ends": _ENDS, "size": _SIZE},
    }
    text = json.dumps(fixed[family], sort_keys=True)
    return {"name": family, "hash": hashlib.sha256(text.encode()).hexdigest()[:12]}


def _trend(words: str, records: Sequence[Record], name: str, counts: Sequence[int]) -> Trend:
    return Trend(words, [(k, interval(r.metrics.get(f"{name}_{k}") for r in records)) for k in counts])
