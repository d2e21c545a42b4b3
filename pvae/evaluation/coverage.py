r"""Do prior and codes cover each other? Kullback-Leibler both ways, and the energy distance."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating, isolated_rng
from pvae.inference.program import Program

from .alignment import Measure, _groups
from .interval import bootstrap_intervals
from .latents import draw_posterior, draw_prior, latent_names, log_aggregate, log_aggregate_within
from .two_sample import _indicator, _mmd2, _points
from .weights import held_out

__all__ = ["PriorCoverage", "SyntheticKL", "energy_distance", "prior_coverage", "synthetic_kl"]

_LEAST = 2


@dataclass(frozen=True)
class PriorCoverage:
    r"""Distances between the aggregate posterior :math:`q_{agg}(z) = E_x q(z|x)` and the prior, in nats.

    The mixture of the N posteriors at hand stands for :math:`q_{agg}`. In a conditional model everything is
    given y, within the data of one context, averaged over data.

    Attributes:
        posterior_to_prior: :math:`KL(q_{agg} \| p_Z)` with a datum's own posterior in the mixture: no less
            than the truth in expectation. Large where codes lie outside the prior.
        posterior_to_prior_low: The same without the datum's own posterior: no more than the truth in
            expectation, so that the two enclose it. Below 0 where posteriors are too narrow, and data too
            few, for their mixture to tell anything: then read ``energy``. ``None`` where a context has a
            single datum.
        prior_to_posterior: :math:`KL(p_Z \| q_{agg})`: no less than the truth in expectation, and far above
            it where posteriors are narrow and the data few, as every gap between them counts. Large where
            the prior has holes.
        energy: Energy distance (Székely & Rizzo 2013), unbiased, of one draw of z for each datum and as many
            of the prior, in units of the prior's root mean square standard deviation; with its value for two
            samples of the prior. Over all contexts together.
        context_size: Number of data in the mixture that a datum meets, on average.
        num_data: Number of data.
        num_prior: Number of prior draws.
        seed: Seed of all draws.
        protocol: What the data were, if known.
    """

    posterior_to_prior: Measure
    posterior_to_prior_low: Measure | None
    prior_to_posterior: Measure
    energy: Measure
    context_size: float
    num_data: int
    num_prior: int
    seed: int
    protocol: dict[str, Any] | None = None

    def measures(self) -> dict[str, Measure]:
        """Return every figure there is, by name, in the order of the table."""
        found = {name: getattr(self, name) for name, _ in _TABLE}
        return {name: measure for name, measure in found.items() if measure is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers that JSON can hold; what is not defined is ``None``."""
        return {
            "measures": {name: measure.to_dict() for name, measure in self.measures().items()},
            "context_size": self.context_size,
            "num_data": self.num_data,
            "num_prior": self.num_prior,
            "seed": self.seed,
            "protocol": self.protocol,
        }

    def to_markdown(self) -> str:
        """Return one table, a row for each figure."""
        lines = [
            "| prior coverage | value | 95 % interval | prior against prior | perfect |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, label in _TABLE:
            measure: Measure | None = getattr(self, name)
            if measure is None:
                continue
            reach = "" if math.isnan(measure.low) else f"{measure.low:.3g} to {measure.high:.3g}"
            null = "" if math.isnan(measure.null) else f"{measure.null:.3g}"
            lines.append(f"| {label} | {measure.value:.3g} | {reach} | {null} | 0 |")
        return "\n".join(lines)

    def __str__(self) -> str:
        low = self.posterior_to_prior_low
        bracket = "" if low is None else f"{low.value:.2f} to "
        return (
            f"KL(q_agg ‖ p) {bracket}{self.posterior_to_prior.value:.2f} nats, "
            f"KL(p ‖ q_agg) <= {self.prior_to_posterior.value:.2f} nats, "
            f"energy distance {self.energy.value:.4f} on {self.num_data} data"
        )


_TABLE: tuple[tuple[str, str], ...] = (
    ("posterior_to_prior_low", "KL(aggregate ‖ prior), nats, from below"),
    ("posterior_to_prior", "KL(aggregate ‖ prior), nats, from above"),
    ("prior_to_posterior", "KL(prior ‖ aggregate), nats, from above"),
    ("energy", "energy distance, prior scales"),
)


def prior_coverage(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_prior: int | None = None,
    num_bootstrap: int = 200,
    max_points: int = 2000,
    seed: int = 0,
) -> PriorCoverage:
    """Estimate the divergences of the aggregate posterior of held-out data and the prior, both ways.

    The cost is that of every latent under every posterior; pass part of the data where that is too much. The
    mixture then is over that part, and the bounds are looser. Both programs run in evaluation mode and are
    left, with all random generators, as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``; its prior must have a density.
        guide: The guide program, with a density.
        x: Held-out data, shape ``(N, *x_shape)``, at least two, or a split.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_prior: Number of prior draws, at least two; by default N.
        num_bootstrap: Resamples behind an interval; 0 leaves the intervals out. The mixture stays as it is.
        max_points: Points of each sample in the energy distance, whose cost is quadratic.
        seed: Seed of every draw.

    Raises:
        ValueError: For sizes out of range, or programs outside the contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.
    """
    x, y, protocol = held_out(model, x, y)
    num_prior = len(x) if num_prior is None else num_prior
    for name, size in (("x", len(x)), ("num_prior", num_prior), ("max_points", max_points)):
        if size < _LEAST:
            raise ValueError(f"{name} must be at least {_LEAST}, got {size}")
    if num_bootstrap < 0:
        raise ValueError(f"num_bootstrap must not be negative, got {num_bootstrap}")
    device = device_of(model, guide)
    with evaluating(model, guide):
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = latent_names(model, guide, x, y)
        q = draw_posterior(model, guide, x, y, names, seed + 1)
        p = draw_prior(model, x, y, names, num_prior, seed + 2)
        null = draw_prior(model, x, y, names, len(x), seed + 3)
        group = _groups(y, len(x))
        own, others = log_aggregate_within(guide, q.values, x, y, group)
        free = p.log_p.new_empty(num_prior)
        for number in group.unique().tolist():
            members, prior_rows = (group == number).nonzero()[:, 0], (group[p.rows] == number).nonzero()[:, 0]
            rows, draws = members.to(device), prior_rows.to(device)
            if len(prior_rows):
                values = {name: value[draws] for name, value in p.values.items()}
                context = None if y is None else y[rows]
                free[prior_rows] = log_aggregate(guide, values, x[rows], context)[0]
    alone = bool(others.isnan().any())
    return PriorCoverage(
        posterior_to_prior=_mean(own - q.log_p, num_bootstrap, seed),
        posterior_to_prior_low=None if alone else _mean(others - q.log_p, num_bootstrap, seed),
        prior_to_posterior=_mean(p.log_p - free, num_bootstrap, seed),
        energy=_energy(q.z, p.z, null.z, num_bootstrap, max_points, seed),
        context_size=float(torch.bincount(group)[group].double().mean()),
        num_data=len(x),
        num_prior=num_prior,
        seed=seed,
        protocol=protocol,
    )


def energy_distance(a: Tensor, b: Tensor) -> float:
    r"""Unbiased energy distance of two samples, in their own units (Székely & Rizzo 2013, eq. 6.1).

    .. math:: 2 E|A - B| - E|A - A'| - E|B - B'|

    Its expectation is zero if both samples have one distribution; single values may be negative.

    Args:
        a: Points, shape ``(n, d)``, ``n >= 2``.
        b: Points, shape ``(m, d)``, ``m >= 2``.

    Raises:
        ValueError: If the samples are not matrices of one width with two rows or more.
    """
    kernel, n = _distances(a, b)
    first = _indicator(len(kernel), n).to(kernel)
    return float(_mmd2(kernel, first, 1 - first))


@dataclass(frozen=True)
class SyntheticKL:
    """Divergences of a known distribution and a prior with their Monte-Carlo standard errors, nats.

    Attributes:
        truth_to_prior: KL(truth ‖ prior).
        truth_to_prior_error: Its standard error.
        prior_to_truth: KL(prior ‖ truth).
        prior_to_truth_error: Its standard error.
        num_samples: Draws behind each.
    """

    truth_to_prior: float
    truth_to_prior_error: float
    prior_to_truth: float
    prior_to_truth_error: float
    num_samples: int

    def to_dict(self) -> dict[str, float]:
        """Return plain numbers."""
        return dict(vars(self))

    def __str__(self) -> str:
        return (
            f"KL(truth ‖ prior) {self.truth_to_prior:.3f} ± {self.truth_to_prior_error:.3f} nats, "
            f"KL(prior ‖ truth) {self.prior_to_truth:.3f} ± {self.prior_to_truth_error:.3f} nats "
            "(frame-dependent)"
        )


@torch.no_grad()
def synthetic_kl(
    prior: TorchDistribution, truth: TorchDistribution, *, num_samples: int = 10_000, seed: int = 0
) -> SyntheticKL:
    """Estimate the divergences of a prior and the known distribution that synthetic data were made from.

    For parity with published tables alone: latents mean something only up to an invertible map of their
    space, so that a perfect model may have any value, and rotating or rescaling its latents changes it. Use
    :func:`prior_coverage` to judge a model.

    Args:
        prior: The prior, with one density for all data and draws.
        truth: The known distribution, of the same dimension.
        num_samples: Draws from each, at least two.
        seed: Seed of the draws.

    Raises:
        ValueError: If one of the two is a batch of distributions, their events differ in shape, or
            ``num_samples`` is too small.
    """
    for name, fn in (("prior", prior), ("truth", truth)):
        if fn.batch_shape:
            raise ValueError(f"{name} must be one distribution, got a batch of shape {tuple(fn.batch_shape)}")
    if prior.event_shape != truth.event_shape:
        raise ValueError(
            f"prior and truth must have the same event_shape, got {tuple(prior.event_shape)} and "
            f"{tuple(truth.event_shape)}"
        )
    if num_samples < _LEAST:
        raise ValueError(f"num_samples must be at least {_LEAST}, got {num_samples}")

    def divergence(p: TorchDistribution, q: TorchDistribution) -> tuple[float, float]:
        z = p.sample((num_samples,))
        gap = (p.log_prob(z) - q.log_prob(z)).double()
        return float(gap.mean()), float(gap.std() / math.sqrt(num_samples))

    with isolated_rng(torch.device("cpu"), seed):
        forward, reverse = divergence(truth, prior), divergence(prior, truth)
    return SyntheticKL(*forward, *reverse, num_samples)


def _mean(terms: Tensor, num_bootstrap: int, seed: int) -> Measure:
    (interval,) = bootstrap_intervals(
        lambda i: terms[i].mean(), len(terms), num_bootstrap=num_bootstrap, seed=seed
    )
    return Measure(interval.value, interval.low, interval.high)


def _energy(q: Tensor, p: Tensor, null: Tensor, num_bootstrap: int, max_points: int, seed: int) -> Measure:
    scale = torch.cat([p, null]).var(0).mean().sqrt().clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    q, p, null = (z[torch.randperm(len(z), generator=generator)[:max_points]] / scale for z in (q, p, null))
    kernel, n = _distances(q, p)
    m = len(kernel) - n

    def statistic(i: Tensor, j: Tensor) -> Tensor:
        # Two copies of one point in a resample are no pair.
        counts = torch.cat([torch.bincount(i, minlength=n), torch.bincount(j, minlength=m)]).to(kernel)
        first = _indicator(n + m, n).to(kernel)
        return _mmd2(kernel, counts * first, counts * (1 - first))

    (interval,) = bootstrap_intervals(statistic, n, m, num_bootstrap=num_bootstrap, seed=seed)
    return Measure(interval.value, interval.low, interval.high, energy_distance(null, p))


def _distances(a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """Minus the distances of all points, ``(n + m, n + m)``: a kernel whose MMD is the energy distance."""
    a, b = _points(a, b, least=_LEAST)
    points = torch.cat([a, b])
    # Not by matrix products, which lose the distances of near points.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return -distances.fill_diagonal_(0), len(a)
