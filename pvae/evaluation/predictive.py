r"""Do data drawn from the model look like the data (Box 1980; Meng 1994; Gelman, Meng & Stern 1996)?"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program, SiteRecorder, particle_plate
from pvae.inference.progress import reporting

from .blocks import block_seed
from .interval import Interval
from .latents import _call, latent_names
from .ranks import band, holm, rank_counts, ranks_among, summed, uniform_p_values
from .weights import draw, held_out

__all__ = ["PredictiveCheck", "PredictiveStatistic", "Statistic", "predictive_check"]

Statistic = Callable[[Tensor], Tensor | float]
Source = Literal["posterior", "prior"]

_ROWS = 200  # data in one pass
_NUMBERS = 2**23  # numbers of x kept at a time
_LEVEL = 0.95
_FEWEST = 20
_PER_TEST = 40  # replications: 2 / 40 is the level of a misfit


def _mean(x: Tensor) -> Tensor:
    return x.mean()


def _variance(x: Tensor) -> Tensor:
    """Variance over data, mean over the numbers of x."""
    return x.var(0).mean()


def _sparsity(x: Tensor) -> Tensor:
    return (x == 0).double().mean()


def _max(x: Tensor) -> Tensor:
    return x.max()


def _mass(x: Tensor) -> Tensor:
    """Sum over each datum."""
    return x.flatten(1).sum(-1)


_STATISTICS: dict[str, Statistic] = {
    "mean": _mean,
    "variance": _variance,
    "sparsity": _sparsity,
    "max": _max,
    "mass": _mass,
}


@dataclass(frozen=True)
class PredictiveStatistic:
    """One statistic of the data among its values on replicated data.

    Attributes:
        observed: Its value on the data; of a statistic of each datum, the mean.
        replicated: Its values on R replications of the whole set, shape ``(R,)``.
        p_above: Share of the replications whose value is no less (the Bayesian p-value), counting the data as
            one of them.
        p_value: Two-sided: twice the smaller of that share and its opposite.
        ranks: Of a statistic of each datum: its rank among the R replications of the same datum, shape
            ``(N,)``, int64; else ``None``.
        rank_p_value: NaN without ranks. For samples of the model: chance of ranks as far from uniform, by
            their simultaneous band. For replications given the datum, whose ranks are no farther from the
            middle than uniform ones (Meng 1994): chance that they lie as far out.
        exact: Whether ranks are uniform if the model is right.
    """

    observed: float
    replicated: Tensor
    p_above: float
    p_value: float
    ranks: Tensor | None
    rank_p_value: float
    exact: bool

    @property
    def interval(self) -> Interval:
        """Mean of the replications, with the interval of 95 % of them."""
        tails = torch.tensor([0.5 - _LEVEL / 2, 0.5 + _LEVEL / 2], dtype=torch.float64)
        return Interval(float(self.replicated.mean()), *torch.quantile(self.replicated, tails).tolist())

    @property
    def ecdf(self) -> Tensor | None:
        """Share of the ranks of at most 0 ... R - 1, shape ``(R,)``."""
        if self.ranks is None:
            return None
        counts = rank_counts(self.ranks.unsqueeze(-1), len(self.replicated))
        return summed(counts, "ecdf")[0].double() / len(self.ranks)

    @property
    def ecdf_band(self) -> tuple[Tensor, Tensor] | None:
        """Shares that hold the whole curve of uniform ranks with probability 0.95, two of shape ``(R,)``."""
        if self.ranks is None or not self.exact:
            return None
        low, high = band(len(self.ranks), len(self.replicated), "ecdf", level=_LEVEL)
        return low.double() / len(self.ranks), high.double() / len(self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers that JSON can hold; without ranks their p-value is ``None``."""
        return {
            "observed": self.observed,
            "replicated": vars(self.interval),
            "p_above": self.p_above,
            "p_value": self.p_value,
            "rank_p_value": None if math.isnan(self.rank_p_value) else self.rank_p_value,
        }


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of the data among those of data that the model replicates, in two ways.

    Attributes:
        posterior: By name; replications are ``x ~ p(x | z)`` with ``z ~ q(z | x_i)`` for each datum. p-values
            are conservative, as the data are used twice: a small one shows a misfit of decoder or guide, a
            large one shows nothing.
        prior: By name; replications are samples of the model (under the contexts of the data). p-values are
            uniform if the data are such samples: two-sided ones, and those of the ranks, up to ties.
        num_data: Number N of data.
        num_replicates: Number R of replications.
        seed: Seed of all draws.
        protocol: What the data were, if known.
    """

    posterior: dict[str, PredictiveStatistic]
    prior: dict[str, PredictiveStatistic]
    num_data: int
    num_replicates: int
    seed: int
    protocol: dict[str, Any] | None = None

    def p_adjusted(self, source: Source) -> dict[str, float]:
        """Adjust the p-values of one source for their number (Holm); the smallest of each statistic."""
        found = {"posterior": self.posterior, "prior": self.prior}[source]
        tests = [
            (name, p) for name, s in found.items() for p in (s.p_value, s.rank_p_value) if not math.isnan(p)
        ]
        adjusted = holm(torch.tensor([p for _, p in tests], dtype=torch.float64)).tolist()
        smallest: dict[str, float] = {}
        for (name, _), p in zip(tests, adjusted, strict=True):
            smallest[name] = min(p, smallest.get(name, 1.0))
        return smallest

    def misfits(self, source: Source, level: float = 0.05) -> list[str]:
        """Name the statistics whose adjusted p-value is at most ``level``."""
        return [name for name, p in self.p_adjusted(source).items() if p <= level]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers that JSON can hold; replications and ranks are left out."""
        return {
            "posterior": {name: statistic.to_dict() for name, statistic in self.posterior.items()},
            "prior": {name: statistic.to_dict() for name, statistic in self.prior.items()},
            "misfits": {"posterior": self.misfits("posterior"), "prior": self.misfits("prior")},
            "num_data": self.num_data,
            "num_replicates": self.num_replicates,
            "seed": self.seed,
            "protocol": self.protocol,
        }

    def to_markdown(self) -> str:
        """Return one table, a row for each statistic and source."""
        lines = [
            "| statistic | observed | replicated by | mean | 95 % of them | p, two-sided | p of ranks |",
            "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for name in self.posterior:
            for source, found in (("posterior", self.posterior[name]), ("prior", self.prior[name])):
                reach = found.interval
                ranks = "" if math.isnan(found.rank_p_value) else f"{found.rank_p_value:.2g}"
                lines.append(
                    f"| {name} | {found.observed:.4g} | {source} | {reach.value:.4g} | {reach.low:.4g} to "
                    f"{reach.high:.4g} | {found.p_value:.2g} | {ranks} |"
                )
        return "\n".join(lines)

    def __str__(self) -> str:
        said = []
        for source, found in (("posterior", self.posterior), ("prior", self.prior)):
            misfits = self.misfits("posterior" if source == "posterior" else "prior")
            parts = []
            for name in misfits:
                reach = found[name].interval
                parts.append(f"{name} {found[name].observed:.4g}, replicated {reach}")
            said.append(f"{source} predictive: " + ("; ".join(parts) if parts else "no misfit found"))
        return (
            f"{'. '.join(said)} ({len(self.posterior)} statistics of {self.num_data} data, "
            f"{self.num_replicates} replications; posterior p-values are conservative)"
        )


def predictive_check(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    statistics: Mapping[str, Statistic] | None = None,
    num_replicates: int = 299,
    num_data: int | None = 500,
    seed: int = 0,
    progress: bool | None = None,
) -> PredictiveCheck:
    r"""Compare statistics of the data with those of data replicated from posterior and prior predictive.

    .. math:: p = P\left(T(x^{rep}) \ge T(x)\right), \qquad
              x^{rep} \sim \int p(x^{rep} \mid z) \, q(z \mid x) \, dz
              \quad \text{or} \quad \int p(x^{rep} \mid z) \, p(z) \, dz

    A statistic of the whole set gives one p-value. A statistic of each datum gives that of its mean, and the
    rank of every datum among its own replications (the PIT), with a simultaneous band. The posterior here
    is the guide's. Both programs run in evaluation mode and are left, as are all random generators, as they
    were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``, with the data at site ``"x"``.
        guide: The guide program.
        x: Data, shape ``(N, *x_shape)``, at least 20, or a split.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        statistics: By name, functions of data ``(N, *x_shape)`` that return one number, or one for each
            datum, shape ``(N,)``. By default ``"mean"``; ``"variance"`` over data, mean over the numbers of
            x; ``"sparsity"``, the share of zeros; ``"max"``; and ``"mass"``, the sum of each datum.
        num_replicates: Replications R. No p-value is below 2 / (R + 1), so that a statistic of the set takes
            40 of them, and one of each datum 80, for a misfit to be seen beside the others.
        num_data: Most data to look at, drawn at random; ``None`` for all.
        seed: Seed of all draws.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: For sizes out of range, too few replications, a statistic that returns another shape or
            NaN, or programs outside the contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.

    Example:
        >>> check = predictive_check(
        ...     model, guide, data.test, statistics={"ink": lambda x: x.flatten(1).mean(-1)}
        ... )  # doctest: +SKIP
        >>> print(check.to_markdown())  # doctest: +SKIP
    """
    functions = dict(_STATISTICS if statistics is None else statistics)
    if not functions:
        raise ValueError("statistics must name at least one function, got none")
    x, y, protocol = held_out(model, x, y)
    num = len(x) if num_data is None else min(num_data, len(x))
    if num < _FEWEST:
        raise ValueError(f"num_data must be at least {_FEWEST}, got {num}")
    device = device_of(model, guide)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:num].sort().values
    x, y = x[rows.to(x.device)], None if y is None else y[rows.to(y.device)]
    observed = {name: _values(name, function, x) for name, function in functions.items()}
    least = _PER_TEST * sum(1 + value.ndim for value in observed.values()) - 1
    if num_replicates < least:
        raise ValueError(
            f"num_replicates must be at least {least} for these statistics, got {num_replicates}"
        )
    found: dict[Source, dict[str, list[Tensor]]] = {
        "posterior": {name: [] for name in functions},
        "prior": {name: [] for name in functions},
    }
    size = max(1, _NUMBERS // x.numel())
    with evaluating(model, guide), reporting("predictive check", 2 * num_replicates, progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        latent_names(model, guide, x, y)
        for number, (source, columns) in enumerate(found.items()):
            for start in range(0, num_replicates, size):
                chunk = min(size, num_replicates - start)
                batch = block_seed(seed + 1 + number, start)
                replicas = _replicate(model, guide if source == "posterior" else None, x, y, chunk, batch)
                for replica in replicas:
                    for name, function in functions.items():
                        columns[name].append(_values(name, function, replica))
                report(number * num_replicates + start + chunk)
        torch.manual_seed(seed)
        tables = {
            source: {
                name: _statistic(observed[name], torch.stack(columns[name]), source) for name in functions
            }
            for source, columns in found.items()
        }
    return PredictiveCheck(tables["posterior"], tables["prior"], num, num_replicates, seed, protocol)


def _replicate(
    model: Program, guide: Program | None, x: Tensor, y: Tensor | None, num: int, seed: int
) -> Tensor:
    """Replicate all data, from latents of the guide or the prior; shape ``(num, N, *x_shape)``."""
    parts = []
    for block, start in enumerate(range(0, len(x), _ROWS)):
        part = slice(start, start + _ROWS)
        data, context = x[part], None if y is None else y[part]
        own = block_seed(seed, block)
        values = {} if guide is None else draw(guide, data, context, num, own)[0]
        torch.manual_seed(own + 1)
        with SiteRecorder(values) as p, particle_plate(num):
            _call(model, data, context)
        parts.append(p.sites["x"].fn.sample().to(x))
    return torch.cat(parts, 1)


def _values(name: str, function: Statistic, x: Tensor) -> Tensor:
    """A statistic of some data, shape ``()`` or ``(N,)``, in double precision on the CPU."""
    value = torch.as_tensor(function(x)).detach().cpu().double()
    if tuple(value.shape) not in ((), (len(x),)):
        raise ValueError(f"statistic {name!r} must return shape () or ({len(x)},), got {tuple(value.shape)}")
    if bool(value.isnan().any()):
        raise ValueError(f"statistic {name!r} must not be NaN")
    return value


def _statistic(observed: Tensor, replicated: Tensor, source: Source) -> PredictiveStatistic:
    """Place a statistic ``()`` or ``(N,)`` among its replications ``(R,)`` or ``(R, N)``."""
    ranks, rank_p_value = None, math.nan
    if observed.ndim:
        ranks = ranks_among(observed.unsqueeze(-1), replicated.unsqueeze(-1))[:, 0]
        rank_p_value = _rank_p_value(ranks, len(replicated), source)
        observed, replicated = observed.mean(-1), replicated.mean(-1)
    num = len(replicated) + 1
    above = (1 + int((replicated >= observed).sum())) / num
    below = (1 + int((replicated <= observed).sum())) / num
    return PredictiveStatistic(
        observed=float(observed),
        replicated=replicated,
        p_above=above,
        p_value=min(1.0, 2 * min(above, below)),
        ranks=ranks,
        rank_p_value=rank_p_value,
        exact=source == "prior",
    )


def _rank_p_value(ranks: Tensor, num_replicates: int, source: Source) -> float:
    if source == "prior":
        return float(uniform_p_values(rank_counts(ranks.unsqueeze(-1), num_replicates))[0])
    from scipy.stats import norm

    # E (u - 1/2)^2 is at most that of a uniform u: the square is convex (Meng 1994, sec. 3).
    u = (ranks.double() + 0.5) / (num_replicates + 1)
    excess = 12 * (u - 0.5).square() / (1 - (num_replicates + 1) ** -2) - 1
    error = (excess.std() / math.sqrt(len(excess))).clamp(min=1e-12)
    return float(norm.sf(float(excess.mean() / error)))
