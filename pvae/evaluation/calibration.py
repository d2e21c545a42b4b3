r"""Is the posterior calibrated? Ranks of the truth on simulated data (Talts et al. 2018, arXiv:1804.06788;
Yao et al. 2018, arXiv:1802.02538; Modrák et al. 2023, arXiv:2211.02383), and an aggregate check on real data.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program, SiteRecorder, particle_plate
from pvae.inference.progress import reporting
from pvae.ops import sample_categorical

from .blocks import block_seed, rows_per_pass
from .interval import Interval, bootstrap_intervals
from .latents import _call, _rows, _run, _total, latent_names
from .ranks import (
    band,
    chi_square_p_values,
    holm,
    rank_counts,
    ranks_among,
    summed,
    symmetry_p_values,
    uniform_p_values,
)
from .weights import draw, held_out, log_weights

__all__ = ["CoverageCurve", "RankCalibration", "aggregate_calibration", "simulation_based_calibration"]

_BLOCK = 100  # data in one pass
_BLOCK_NUMBERS = 2**23  # most latent numbers drawn in one pass
_LEVEL = 0.95
_FEWEST = 20  # ranks; a bin of the histogram expects five or more
_MOST_BINS = 20


@dataclass(frozen=True)
class CoverageCurve:
    """How often central credible intervals hold the truth.

    The interval of level (L + 1 - 2a) / (L + 1) reaches from the a-th smallest to the a-th largest of L
    draws. It has that coverage exactly where the truth is one more draw, for every L.

    Attributes:
        nominal: Levels, rising, shape ``(A,)``.
        empirical: Share of the simulations whose truth lies inside, shape ``(Q, A)``.
        low: Lower ends of the pointwise 95 % binomial intervals (Clopper & Pearson) of the shares.
        high: Upper ends.
        band_low: Lower ends of the band that holds a calibrated curve as a whole with probability 0.95,
            shape ``(A,)``.
        band_high: Upper ends.
        pooled: Share over all latent dimensions, shape ``(A,)``.
        pooled_low: Lower ends of its 95 % bootstrap intervals over simulations, as dimensions of one
            simulation depend on one another.
        pooled_high: Upper ends.
        names: Name of each quantity.
    """

    nominal: Tensor
    empirical: Tensor
    low: Tensor
    high: Tensor
    band_low: Tensor
    band_high: Tensor
    pooled: Tensor
    pooled_low: Tensor
    pooled_high: Tensor
    names: tuple[str, ...]

    @property
    def inside(self) -> Tensor:
        """Whether the whole curve of each quantity lies in the band, shape ``(Q,)``, bool."""
        return ((self.empirical >= self.band_low) & (self.empirical <= self.band_high)).all(-1)

    def at(self, level: float) -> Interval:
        """Pooled coverage of the interval whose level is nearest."""
        where = int((self.nominal - level).abs().argmin())
        return Interval(*(float(c[where]) for c in (self.pooled, self.pooled_low, self.pooled_high)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold; no interval is ``None``."""
        columns = {name: value.tolist() for name, value in vars(self).items() if name != "names"}
        for name in ("pooled_low", "pooled_high"):
            columns[name] = [v if math.isfinite(v) else None for v in columns[name]]
        return {**columns, "names": list(self.names), "inside": self.inside.tolist()}

    def __str__(self) -> str:
        def said(level: float) -> str:
            where = int((self.nominal - level).abs().argmin())
            found = self.at(level)
            return (
                f"{100 * float(self.nominal[where]):.0f} % intervals cover {100 * found.value:.1f} % "
                f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"
            )

        return (
            f"{said(0.5)}, {said(0.9)}; {int(self.inside.sum())} of {len(self.names)} curves inside their "
            "95 % band"
        )


@dataclass(frozen=True)
class RankCalibration:
    r"""Ranks that are uniform on 0 ... L if all is as the model says, and what speaks against it.

    Attributes:
        ranks: Rank of each quantity among L draws, shape ``(N, Q)``, int64.
        names: Name of each quantity: the latent numbers, then ``"log p(x, z)"`` or ``"log p(z)"``.
        num_draws: L.
        kind: ``"simulated"``: ranks of the z that made x among draws of q(z | x). ``"aggregate"``: ranks of a
            draw of q(z | x) for real x among draws of the prior.
        num_proposals: Draws from the guide behind each importance-resampled one; 1: the guide's own.
        num_bins: Bins of the histogram.
        p_values: p-value of each quantity from the simultaneous band of the ranks' distribution function,
            shape ``(Q,)``.
        chi_square_p_values: From the chi-square of the histogram.
        symmetry_p_values: Of a posterior mean without bias: VSBC's test, blind to the width.
        seed: Seed of all draws.
        protocol: What the data were, if known.
    """

    ranks: Tensor
    names: tuple[str, ...]
    num_draws: int
    kind: Literal["simulated", "aggregate"]
    num_proposals: int
    num_bins: int
    p_values: Tensor
    chi_square_p_values: Tensor
    symmetry_p_values: Tensor
    seed: int
    protocol: dict[str, Any] | None = None

    @cached_property
    def counts(self) -> Tensor:
        """How often each rank occurs, shape ``(Q, L + 1)``, int64."""
        return rank_counts(self.ranks, self.num_draws)

    @property
    def histogram(self) -> Tensor:
        """Counts of the ranks in equal bins, shape ``(Q, num_bins)``."""
        return summed(self.counts, "histogram", self.num_bins)

    @property
    def histogram_band(self) -> tuple[Tensor, Tensor]:
        """Counts that hold all bins of one quantity with probability 0.95, two of shape ``(num_bins,)``."""
        return band(len(self.ranks), self.num_draws, "histogram", self.num_bins, _LEVEL)

    @property
    def ecdf(self) -> Tensor:
        """Share of ranks of at most 0 ... L - 1, shape ``(Q, L)``; the diagonal is (k + 1) / (L + 1)."""
        return summed(self.counts, "ecdf").double() / len(self.ranks)

    @property
    def ecdf_band(self) -> tuple[Tensor, Tensor]:
        """Shares that hold the whole curve of one quantity with probability 0.95, two of shape ``(L,)``."""
        low, high = band(len(self.ranks), self.num_draws, "ecdf", level=_LEVEL)
        return low.double() / len(self.ranks), high.double() / len(self.ranks)

    @property
    def pit(self) -> Tensor:
        """Ranks on (0, 1), shape ``(N, Q)``."""
        return (self.ranks.double() + 0.5) / (self.num_draws + 1)

    @property
    def shift(self) -> Tensor:
        """Mean of the PIT minus one half, shape ``(Q,)``; positive where the draws lie too low."""
        return self.pit.mean(0) - 0.5

    @property
    def spread(self) -> Tensor:
        """Mean square of the PIT about one half over that of uniform ranks, shape ``(Q,)``; above 1 where the
        draws are too narrow, below where they are too wide.
        """
        cells = self.num_draws + 1
        return (self.pit - 0.5).square().mean(0) * 12 / (1 - cells**-2)

    @property
    def p_adjusted(self) -> Tensor:
        """``p_values`` with Holm's correction for the number of quantities, shape ``(Q,)``."""
        return holm(self.p_values)

    @property
    def p_value(self) -> float:
        """Of all quantities together: the smallest adjusted one."""
        return float(self.p_adjusted.min())

    @property
    def chi_square_p_value(self) -> float:
        """The same from the chi-squares."""
        return float(holm(self.chi_square_p_values).min())

    @property
    def holds(self) -> bool:
        """Whether chance explains the ranks (``p_value`` of at least 0.01)."""
        return self.p_value >= 0.01

    def coverage(self, num_bootstrap: int = 200) -> CoverageCurve:
        """Return the coverage of central intervals at every level that L draws allow.

        Args:
            num_bootstrap: Resamples of the simulations behind the pooled intervals; 0 leaves them out.
        """
        from scipy.stats import beta

        num, draws = len(self.ranks), self.num_draws
        counts = summed(self.counts, "central").flip(-1)
        hits, tail = counts.numpy(), (1 - _LEVEL) / 2
        low = np.where(hits == 0, 0.0, beta.ppf(tail, np.maximum(hits, 1), num - hits + 1))
        high = np.where(hits == num, 1.0, beta.ppf(1 - tail, hits + 1, np.maximum(num - hits, 1)))
        ends = band(num, draws, "central", level=_LEVEL)
        edge = torch.arange(draws // 2, -1, -1)
        # The last quantity is a density, not a dimension of the latents.
        latents = self.ranks[:, :-1]
        depth = torch.minimum(latents, draws - latents)
        share = torch.stack([(depth >= a).double().mean(-1) for a in edge.tolist()], -1)
        pooled = bootstrap_intervals(
            lambda i: share[i].mean(0), num, num_bootstrap=num_bootstrap, seed=self.seed, least=0.0
        )
        return CoverageCurve(
            nominal=(draws + 1 - 2 * edge).double() / (draws + 1),
            empirical=counts.double() / num,
            low=torch.from_numpy(low),
            high=torch.from_numpy(high),
            band_low=ends[0].flip(-1).double() / num,
            band_high=ends[1].flip(-1).double() / num,
            pooled=share.mean(0),
            pooled_low=torch.tensor([i.low for i in pooled], dtype=torch.float64),
            pooled_high=torch.tensor([i.high for i in pooled], dtype=torch.float64).clamp(max=1.0),
            names=self.names,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold; ranks are left out, their counts are not."""
        low, high = self.histogram_band
        return {
            "kind": self.kind,
            "p_value": self.p_value,
            "chi_square_p_value": self.chi_square_p_value,
            "holds": self.holds,
            "num_simulations": len(self.ranks),
            "num_draws": self.num_draws,
            "num_proposals": self.num_proposals,
            "histogram_band": [low.tolist(), high.tolist()],
            "quantities": [
                {
                    "name": name,
                    "p_value": p,
                    "p_adjusted": adjusted,
                    "chi_square_p_value": chi_square,
                    "symmetry_p_value": symmetry,
                    "shift": shift,
                    "spread": spread,
                    "histogram": bins,
                }
                for name, p, adjusted, chi_square, symmetry, shift, spread, bins in zip(
                    self.names,
                    self.p_values.tolist(),
                    self.p_adjusted.tolist(),
                    self.chi_square_p_values.tolist(),
                    self.symmetry_p_values.tolist(),
                    self.shift.tolist(),
                    self.spread.tolist(),
                    self.histogram.tolist(),
                    strict=True,
                )
            ],
            "coverage": self.coverage().to_dict() if self.kind == "simulated" else None,
            "seed": self.seed,
            "protocol": self.protocol,
        }

    def __str__(self) -> str:
        simulated = self.kind == "simulated"
        num = len(self.ranks)
        if simulated:
            what = (
                "the guide"
                if self.num_proposals == 1
                else f"the guide corrected by {self.num_proposals} weights"
            )
            head = f"simulation-based calibration of {what} on {num} simulations"
        else:
            head = f"aggregate posterior against the prior on {num} data"
        tested = f"p = {self.p_value:.2g} over {len(self.names)} quantities"
        if self.holds:
            unit = "simulations" if simulated else "data"
            verdict = f"no departure found ({tested}; to see a smaller one takes more {unit})"
        else:
            wrong = int((self.p_adjusted < 0.01).sum())
            verdict = f"departs ({tested}), in {wrong} of them, most in {self._worst()}"
        return f"{head}: {verdict}" + (f"; {self.coverage()}" if simulated else "")

    def _worst(self) -> str:
        """Name the latent number that departs most, and how; else the density, the last quantity."""
        rejected = (self.p_adjusted[:-1] < 0.01).nonzero()[:, 0].tolist()
        if not rejected:
            return f"{self.names[-1]} alone, not in any latent number by itself"
        num = len(self.ranks)
        # Both in their standard errors under uniformity: Var u = 1/12, Var 12 (u - 1/2)^2 = 4/5.
        shift = (self.shift * (12 * num) ** 0.5).tolist()
        spread = ((self.spread - 1) * (num / 0.8) ** 0.5).tolist()
        worst = max(rejected, key=lambda q: max(abs(shift[q]), abs(spread[q])))
        by_shift = abs(shift[worst]) > abs(spread[worst])
        # The truth is ranked among the guide's draws, but the guide's draw among the prior's.
        less = ((shift if by_shift else spread)[worst] > 0) == (self.kind == "simulated")
        words = ("lie too low", "lie too high") if by_shift else ("are too narrow", "are too wide")
        return f"{self.names[worst]}, whose draws {words[0 if less else 1]}"


def simulation_based_calibration(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_simulations: int = 500,
    num_draws: int = 99,
    num_proposals: int = 1,
    seed: int = 0,
    progress: bool | None = None,
) -> RankCalibration:
    r"""Rank the latents that made simulated data among draws of their posterior.

    .. math:: z^* \sim p(z), \quad x \sim p(x \mid z^*), \quad z_1, \dots, z_L \sim q(z \mid x), \qquad
              r_j = \#\{l : z_{lj} < z^*_j\}

    Where q is the posterior of the model, every rank is uniform on 0 ... L. Besides each latent number the
    joint log p(x, z) is ranked, which depends on the data and so sees a guide that ignores them, whose
    latents have uniform ranks all the same. The data are the model's own: nothing is said about whether the
    model is right, nor about the guide on data unlike its samples.

    With ``num_proposals`` K above 1 each draw is one of K fresh draws of the guide, chosen by its importance
    weight: the posterior that an importance-weighted bound of K particles is the ELBO of (Cremer, Morris &
    Duvenaud 2017, arXiv:1704.02916). It tends to the model's posterior as K grows.

    Both programs run in evaluation mode and are left, as are all random generators, as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``, with the data at site ``"x"``.
        guide: The guide program.
        x: Data of the right shape ``(N, *x_shape)``, or a split: its values do not matter where the model is
            unconditional; a conditional one simulates under their contexts, each as often as the others.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_simulations: Number of data simulated, at least 20. The smallest departure that can be seen falls
            with its square root.
        num_draws: Posterior draws L for each, at least 3; L + 1 should have a divisor near 20.
        num_proposals: K; the cost is that of ``num_simulations * num_draws * num_proposals`` decodings.
        seed: Seed of all draws.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: For sizes out of range, or programs outside the contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.

    Example:
        >>> print(simulation_based_calibration(model, guide, data.test))  # doctest: +SKIP
    """
    _check(num_simulations, num_draws, "num_simulations")
    if num_proposals < 1:
        raise ValueError(f"num_proposals must be positive, got {num_proposals}")
    x, y, protocol = held_out(model, x, y)
    device = device_of(model, guide)
    found = []
    with evaluating(model, guide), reporting("calibrating", num_simulations, progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = latent_names(model, guide, x, y)
        shapes = _shapes(model, x, y, names)
        rows, passes = _contexts(len(x), num_simulations, seed), _pass_rows(x)
        numbers = num_draws * num_proposals * sum(map(math.prod, shapes.values()))
        for number, part in enumerate(rows.split(max(1, min(_BLOCK, _BLOCK_NUMBERS // numbers)))):
            where = part.to(device)
            context = None if y is None else y[where]
            torch.manual_seed(block_seed(seed + 1, number))
            sites = _run(model, x[where], context)
            data = sites["x"].fn.sample().to(x)
            truth = {name: sites[name].value.unsqueeze(0) for name in names}
            values, log_p = _posterior_draws(
                model,
                guide,
                data,
                context,
                names,
                num_draws,
                num_proposals,
                block_seed(seed + 2, number),
                passes,
            )
            log_truth = _log_joint(model, data, context, truth, passes)
            found.append(ranks_among(_table(truth, log_truth)[0], _table(values, log_p)))
            report(sum(map(len, found)))
    return _calibration(
        torch.cat(found), shapes, "log p(x, z)", num_draws, "simulated", num_proposals, seed, protocol
    )


def aggregate_calibration(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_data: int | None = 1000,
    num_draws: int = 99,
    seed: int = 0,
    progress: bool | None = None,
) -> RankCalibration:
    r"""Rank a draw of q(z | x) for each real datum among draws of the prior, dimension by dimension.

    If the model is right about the data and the guide about the model,
    :math:`E_x q(z \mid x) = \int p(z \mid x) p(x) dx = p(z)`: each rank is uniform on 0 ... L, among draws
    of the datum's own (under its context y, in a conditional model), and so is that of log p(z). A departure
    says that prior, decoder or guide is wrong for these data, not which; uniform ranks do not say that the
    posteriors are right, as a guide that ignores x has them too. Ranks see marginals: for the latents
    together see :func:`alignment_report`.

    Both programs run in evaluation mode and are left, as are all random generators, as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``.
        guide: The guide program.
        x: Held-out data, shape ``(N, *x_shape)``, at least 20, or a split.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_data: Most data to look at, drawn at random; ``None`` for all.
        num_draws: Prior draws L for each datum, at least 3. The model is run to its end for each.
        seed: Seed of all draws.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: For sizes out of range, or programs outside the contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.
    """
    x, y, protocol = held_out(model, x, y)
    num = len(x) if num_data is None else min(num_data, len(x))
    _check(num, num_draws, "num_data")
    device = device_of(model, guide)
    found = []
    with evaluating(model, guide), reporting("calibrating", num, progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = latent_names(model, guide, x, y)
        shapes = _shapes(model, x, y, names)
        passes = _pass_rows(x)
        for number, part in enumerate(_contexts(len(x), num, seed).split(max(1, passes // num_draws))):
            where = part.to(device)
            data, context = x[where], None if y is None else y[where]
            posterior, _ = draw(guide, data, context, 1, block_seed(seed + 1, number))
            with SiteRecorder(posterior) as at, particle_plate(1):
                _call(model, data, context)
            torch.manual_seed(block_seed(seed + 2, number))
            with SiteRecorder() as free, particle_plate(num_draws):
                _call(model, data, context)
            own, prior = (
                _table(
                    {name: sites[name].value for name in names},
                    _total(sites[name].log_prob() for name in names),
                )
                for sites in (at.sites, free.sites)
            )
            found.append(ranks_among(own[0], prior))
            report(sum(map(len, found)))
    return _calibration(torch.cat(found), shapes, "log p(z)", num_draws, "aggregate", 1, seed, protocol)


def _check(num: int, num_draws: int, name: str) -> None:
    if num < _FEWEST:
        raise ValueError(f"{name} must be at least {_FEWEST}, got {num}")
    if num_draws < 3:
        raise ValueError(f"num_draws must be at least 3, got {num_draws}")
    if _bins(num, num_draws) < 2:
        raise ValueError(f"num_draws + 1 must have a divisor of 2 to {_MOST_BINS}, got num_draws {num_draws}")


def _bins(num: int, num_draws: int) -> int:
    """Number of bins of the histogram: the most that are equal and expect five ranks or more."""
    most = min(_MOST_BINS, num // 5)
    return max(b for b in range(1, most + 1) if (num_draws + 1) % b == 0)


def _contexts(num_data: int, num: int, seed: int) -> Tensor:
    """Row numbers, each as often as the others."""
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(num_data, generator=generator) for _ in range(-(-num // num_data))]
    return torch.cat(permutations)[:num]


def _shapes(model: Program, x: Tensor, y: Tensor | None, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    sites = _run(model, x[:1], None if y is None else y[:1])
    return {name: tuple(sites[name].fn.event_shape) for name in names}


def _pass_rows(x: Tensor) -> int:
    """Rows in one pass of the decoder."""
    return rows_per_pass(x)


def _posterior_draws(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    names: Sequence[str],
    num_draws: int,
    num_proposals: int,
    seed: int,
    rows: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw from the guide or its importance-corrected form; values by site and log p(x, z), ``(L, B)``."""
    values, log_q = draw(guide, x, y, num_draws * num_proposals, seed)
    values = {name: values[name] for name in names}
    if num_proposals == 1:
        return values, _log_joint(model, x, y, values, rows)
    log_w = log_weights(model, x, y, [(values, log_q)], rows).unflatten(0, (num_draws, num_proposals))
    # Given its set of proposals, a draw is one of them in proportion to the weights.
    chosen = sample_categorical(log_w, dim=1)
    place = torch.arange(num_draws, device=chosen.device).unsqueeze(-1) * num_proposals + chosen
    datum = torch.arange(len(x), device=chosen.device)
    log_p = log_w.flatten(0, 1) + log_q
    return {name: value[place, datum] for name, value in values.items()}, log_p[place, datum]


def _log_joint(
    model: Program, x: Tensor, y: Tensor | None, values: Mapping[str, Tensor], rows: int
) -> Tensor:
    """log p(x, z) in nats, shape ``(L, B)``, in passes of about ``rows`` rows; a bound will do for a rank."""
    size = max(1, rows // len(x))
    parts = []
    for chunk in _chunks(values, size):
        with SiteRecorder(chunk) as p, particle_plate(len(next(iter(chunk.values())))):
            _call(model, x, y)
        parts.append(_total(site.log_prob() for site in p.sites.values() if not site.is_factor))
    return torch.cat(parts)


def _chunks(values: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    total = len(next(iter(values.values())))
    for start in range(0, total, size):
        yield {name: value[start : start + size] for name, value in values.items()}


def _table(values: Mapping[str, Tensor], log_p: Tensor) -> Tensor:
    """Latents and a log-density side by side, shape ``(L, B, Q)``, in double precision on the CPU."""
    columns = [_rows(value, 2) for value in values.values()]
    return torch.cat([*columns, log_p.detach().cpu().double().unsqueeze(-1)], -1)


def _calibration(
    ranks: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
    density: str,
    num_draws: int,
    kind: Literal["simulated", "aggregate"],
    num_proposals: int,
    seed: int,
    protocol: dict[str, Any] | None,
) -> RankCalibration:
    names = [f"{site}[{i}]" for site, shape in shapes.items() for i in range(math.prod(shape))]
    num_bins = _bins(len(ranks), num_draws)
    counts = rank_counts(ranks, num_draws)
    return RankCalibration(
        ranks=ranks,
        names=(*names, density),
        num_draws=num_draws,
        kind=kind,
        num_proposals=num_proposals,
        num_bins=num_bins,
        p_values=uniform_p_values(counts),
        chi_square_p_values=chi_square_p_values(counts, num_bins),
        symmetry_p_values=symmetry_p_values(counts, seed),
        seed=seed,
        protocol=protocol,
    )
