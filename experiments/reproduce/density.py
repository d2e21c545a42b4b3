"""How good the log-densities are that models are aligned with: estimates where the truth is known.

PAk: Rodriguez et al. 2018, doi:10.1021/acs.jctc.7b00916; DiVAE aligns with it.
"""

import functools
import hashlib
import importlib
import itertools
import json
import math
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pvae.density import KDE, DensityEstimator, KStar, PAk, Scored
from pvae.density.neighbours import Floats

from .ledger import Record
from .plots import Trend, trends
from .study import AnyStudy, Cell, Context, Metrics, Outcome, Scale, plain
from .tables import Column, OverSeeds, configurations, interval, paired, table

__all__ = ["DensityStudy", "Law", "quality"]


@dataclass(frozen=True)
class Law:
    r"""Equal mixture of isotropic normals, :math:`p(u) = \frac1K \sum_k \mathcal N(u; c_k, s_k^2 I)`.

    Attributes:
        centres: Means, shape ``(K, d)``.
        stds: Standard deviations, shape ``(K,)``.
    """

    centres: Floats
    stds: Floats

    @property
    def dim(self) -> int:
        """Number of dimensions d."""
        return self.centres.shape[1]

    def draw(self, generator: np.random.Generator, size: int) -> Floats:
        """Draw points, shape ``(size, d)``."""
        which = generator.integers(len(self.centres), size=size)
        noise: Floats = generator.standard_normal((size, self.dim))
        noise *= self.stds[which, None]
        noise += self.centres[which]
        return noise

    def log_density(self, u: Floats) -> Floats:
        """Return log p(u) in nats, ``(M, d) -> (M,)``."""
        parts = np.empty((len(self.centres), len(u)))
        for part, centre, std in zip(parts, self.centres, self.stds, strict=True):
            square = np.square((u - centre) / std).sum(1)
            part[:] = -0.5 * square - self.dim * (math.log(std) + 0.5 * math.log(2 * math.pi))
        found: Floats = np.logaddexp.reduce(parts, axis=0) - math.log(len(parts))
        return found


@dataclass(frozen=True)
class _Scale(Scale):
    """How many data are drawn, beside ``num_data`` new points.

    Attributes:
        num_train: Data that carry the estimate.
    """

    num_train: int = 20_000


_DIMS = (1, 2, 5, 10, 20, 50)
_MIXTURES = (2, 10)
_MODES = 8
# Widths of the modes in ten dimensions: one bandwidth, or one number of neighbours, cannot suit all.
_NARROW, _WIDE = 0.5, 2.0
_NEIGHBOURS = (50, 100, 199)
_VARIED = (2, 10)  # dimensions in which the neighbours are varied
_IN_TREES = (1, 2, 5)  # dimensions in which neighbours are found without all distances
_EMBEDDED = (20, 50)  # dimensions in which the unit of the embedding is tried
_MOST = max(_NEIGHBOURS)
_BANDWIDTHS = {"kde": "cv", "kde-scott": "scott"}
_TENTHS = 10
_COVERED = 1.959963984540054  # 97.5 % point of the standard normal

# Seconds of one core at 20,000 data and 2,000 new points by dimension, measured: of neighbour estimators,
# which hardly differ, with 199 neighbours, and of the kernel estimate with a bandwidth to find.
_PAK_SECONDS = {1: 1.1, 2: 1.2, 5: 2.5, 10: 3.5, 20: 3.7, 50: 5.2}
_KDE_SECONDS = {1: 10.5, 2: 9.5, 5: 10.0, 10: 10.5, 20: 11.5, 50: 12.5}
_TIMED = 20_000

_FAMILIES = {
    "normal": "Standard normals.",
    "mixture": (
        "Mixtures of eight normals: in the plane of standard deviation 0.5, its means normal of standard "
        "deviation 4 and kept within 5 of the origin; in 10 dimensions of standard deviations from 0.5 to 2, "
        "its means normal of standard deviation 2."
    ),
}
_READING = (
    "Errors are estimate less truth, in nats. Estimates at training data leave each datum out; new points "
    "come from the same law. Median size is that of the errors without sign, spread their standard "
    "deviation, that is, without their mean; a pull is an error by its standard error; the slope is that of "
    "the estimate on the truth, below 1 where the range is compressed; coverage is the share of points whose "
    "truth lies in the estimate's 95 % interval. K is the number of neighbours looked at. Volumes have the "
    "dimension D that TWO-NN finds, or that of the data, d: where D is not d, log-densities have another "
    "unit than the truth. The kernel estimate has all data as kernels, and a bandwidth of cross-validation "
    "or of Scott's rule."
)

_PARTS = {"train": "at the training data", "new": "at new points"}
_ERRORS = (
    Column("bias", "bias"),
    Column("rmse", "RMSE"),
    Column("typical", "median size"),
    Column("spread", "spread"),
    Column("pull_mean", "mean pull"),
    Column("pull_std", "std of pulls"),
    Column("pearson", "Pearson"),
    Column("spearman", "Spearman"),
    Column("slope", "slope"),
    Column("coverage", "coverage, %", 100),
)
_FIT = (
    Column("intrinsic_dim", "D"),
    Column("k_star_median", "median k*"),
    Column("share_k_star_floor", "k* at its least, %", 100),
    Column("share_k_star_cap", "k* at its most, %", 100),
    Column("bandwidth", "bandwidth"),
    Column("fit_seconds", "fit, CPU s"),
    Column("score_seconds", "new points, CPU s"),
)
_EFFECTS = tuple(
    Column(f"{name}_new", title)
    for name, title in (
        ("rmse", "RMSE"),
        ("typical", "median size"),
        ("spread", "spread"),
        ("pull_std", "std of pulls"),
        ("pearson", "Pearson"),
        ("spearman", "Spearman"),
        ("slope", "slope"),
    )
)
_PANELS = (
    Column("relative_new", "RMSE / std of the truth"),
    Column("pearson_new", "Pearson"),
    Column("slope_new", "slope"),
    Column("pull_std_new", "std of pulls"),
)
_RMSE = Column("rmse_new", "RMSE")
_SHOWN = (2, 10, 50)  # dimensions whose errors are drawn against the truth

_WORDS = {
    "pak": "PAk",
    "kstar": "k*-NN",
    "kde": "KDE",
    "kde-scott": "KDE, Scott",
    "pak-embedding": "PAk, D = d",
    "twonn": "TWO-NN",
    "embedding": "d",
    "none": "–",  # noqa: RUF001  (a dash for no number)
    **{f"k{count}": str(count) for count in _NEIGHBOURS},
    **{f"d{dim}": str(dim) for dim in _DIMS},
}


class DensityStudy(AnyStudy):
    """Three estimators on normals of 1 to 50 dimensions and on two mixtures; nothing is trained."""

    name = "density"
    about = (
        "How good the estimated log-densities are that models are aligned with, by dimension and estimator"
    )
    scales = {  # noqa: RUF012  (a class attribute that nobody changes)
        "smoke": _Scale((), (0,), 500, 0, 0, 0, num_train=1000),
        "cpu": _Scale((), (0, 1, 2), 2000, 0, 0, 0, num_train=20_000),
        "full": _Scale((), (0, 1, 2, 3), 2000, 0, 0, 0, num_train=60_000),
    }

    def cells(self, scale: Scale) -> list[Cell]:
        """List estimators by law and dimension; seeds are the slowest.

        Estimators of the same law and seed are given the same data.
        """
        assert isinstance(scale, _Scale)
        laws = [("normal", dim) for dim in _DIMS] + [("mixture", dim) for dim in _MIXTURES]
        return [
            Cell(
                {"data": family, "dim": f"d{dim}", **estimator}, seed, seconds=_seconds(estimator, dim, scale)
            )
            for seed, (family, dim) in itertools.product(scale.seeds, laws)
            for estimator in _estimators(family, dim)
        ]

    def run(self, cell: Cell, context: Context) -> Outcome:
        """Draw data and new points, estimate the density at both, and compare with the truth.

        Seconds are those of the CPU, all threads together.
        """
        scale, factors = context.scale, cell.factors
        assert isinstance(scale, _Scale)
        law = _law(factors["data"], _dim(factors))
        u, new = _draws(factors["data"], law.dim, cell.seed, scale)
        estimator = _estimator(factors, cell.seed)
        for module in ("scipy.stats", "sklearn.neighbors"):
            importlib.import_module(module)  # else the first fit of a process is timed with its imports
        start = time.process_time()
        with warnings.catch_warnings():
            # Few neighbours in few dimensions and k* at its ends are what the study asks about.
            warnings.simplefilter("ignore", UserWarning)
            estimator.fit(u)
            fitted = time.process_time()
            scored = estimator.score(new)
        done = time.process_time()
        own = Scored(estimator.log_density, estimator.standard_error)
        seen = estimator.diagnostics()
        names = ("k_star_median", "share_k_star_floor", "share_k_star_cap", "bandwidth")
        metrics: Metrics = {
            **_named("train", quality(own, law.log_density(u))),
            **_named("new", quality(scored, law.log_density(new))),
            "intrinsic_dim": estimator.intrinsic_dim,
            **{name: plain(seen[name]) if name in seen else None for name in names},
            "fit_seconds": round(fitted - start, 3),
            "score_seconds": round(done - fitted, 3),
        }
        return Outcome(_protocol(factors["data"]), metrics)

    def tables(self, records: Sequence[Record]) -> list[str]:
        """Write errors at both kinds of points, then the fits, and differences on the same data."""
        parts = []
        for family, cells in _by_family(records).items():
            rows = [_whole(record) for record in cells]
            factors = ("dim", "estimator", "K", "volumes")
            parts.append(f"{_FAMILIES[family]} {_READING}")
            for part, where in _PARTS.items():
                columns = [replace(column, key=f"{column.key}_{part}") for column in _ERRORS]
                parts.append(f"Errors {where}:\n\n" + table(rows, factors, columns, _WORDS))
            parts.append("What was fitted:\n\n" + table(rows, factors, _FIT, _WORDS))
            less, title = "less PAk on the same data", f"Paired differences at new points, K = {_MOST}"
            parts += paired(
                _main(cells), "estimator", "pak", _EFFECTS, _WORDS, less, within=("dim",), title=title
            )
        return parts

    def figures(self, records: Sequence[Record], stem: Path, title: str) -> list[Path]:
        """Draw errors against dimension, number of neighbours, and truth, all at new points."""
        drawn = []
        for family, cells in _by_family(records).items():
            main = _main(cells)
            dims = sorted({_dim(record.factors) for record in main})
            if family == "normal" and dims:  # the mixtures differ in more than d
                panels = {column.title: _by_dim(main, column) for column in _PANELS}
                drawn.append(_drawn(panels, stem, "dimensions", title, "dimensions d", dims))
            varied = [record for record in cells if _dim(record.factors) in _VARIED]
            panels = {f"RMSE, d = {dim}": _by_neighbours(varied, dim) for dim in _VARIED}
            if panels := {heading: lines for heading, lines in panels.items() if lines}:
                drawn.append(_drawn(panels, stem, "neighbours", title, "neighbours K", _NEIGHBOURS))
            panels = {f"mean error, d = {dim}": _by_truth(main, dim) for dim in dims if dim in _SHOWN}
            if panels:
                across = "tenth of the points, from low to high density"
                drawn.append(_drawn(panels, stem, "truth", title, across))
        return drawn


def quality(scored: Scored[Any], truth: Floats) -> Metrics:
    r"""Compare log-densities and their standard errors with the truth.

    Args:
        scored: Estimates of M points, in nats.
        truth: Exact log-densities in nats, shape ``(M,)``.

    Returns:
        ``bias``, ``rmse``, ``typical`` (median size) and ``spread`` (standard deviation) of the errors, and
        ``relative``, the second by the standard deviation of the truth; ``pull_mean`` and ``pull_std`` of
        errors by standard errors; ``pearson`` and ``spearman``; ``slope`` of the least squares of estimate on
        truth; ``coverage``, the share of errors within 1.96 standard errors; ``error_1`` to ``error_10``,
        mean errors in tenths of the points from low to high truth.
    """
    from scipy import stats

    estimate = scored.log_density
    error = estimate - truth
    pull = error / scored.standard_error
    tenths = np.array_split(error[np.argsort(truth, kind="stable")], _TENTHS)
    rmse = float(np.sqrt(np.square(error).mean()))
    found = {
        "bias": error.mean(),
        "rmse": rmse,
        "typical": np.median(np.abs(error)),
        "spread": error.std(),
        "relative": rmse / truth.std(),
        "pull_mean": pull.mean(),
        "pull_std": pull.std(),
        "pearson": np.corrcoef(estimate, truth)[0, 1],
        "spearman": stats.spearmanr(estimate, truth).statistic,
        "slope": np.cov(estimate, truth, ddof=0)[0, 1] / truth.var(),
        "coverage": (np.abs(pull) <= _COVERED).mean(),
        **{f"error_{i}": tenth.mean() for i, tenth in enumerate(tenths, 1)},
    }
    return {name: plain(value) for name, value in found.items()}


def _named(part: str, metrics: Metrics) -> Metrics:
    return {f"{name}_{part}": value for name, value in metrics.items()}


def _law(family: str, dim: int) -> Law:
    if family == "normal":
        return Law(np.zeros((1, dim)), np.ones(1))
    centres = np.random.default_rng(0).standard_normal((_MODES, dim))
    if dim == 2:
        return Law(np.clip(4 * centres, -5, 5), np.full(_MODES, 0.5))
    return Law(2 * centres, np.geomspace(_NARROW, _WIDE, _MODES))


@functools.lru_cache(maxsize=1)
def _draws(family: str, dim: int, seed: int, scale: _Scale) -> tuple[Floats, Floats]:
    """Data and new points: drawn once for the neighbouring cells, which all look at the same."""
    law, name = _law(family, dim), zlib.crc32(f"{family} {dim}".encode())
    sizes = (scale.num_train, scale.num_data)
    u, new = (law.draw(np.random.default_rng([name, seed, i]), size) for i, size in enumerate(sizes))
    return u, new


def _protocol(family: str) -> dict[str, str]:
    """Name of a family, and a digest of its laws."""
    laws = [_law(family, dim) for dim in (_DIMS if family == "normal" else _MIXTURES)]
    text = json.dumps([[np.round(law.centres, 6).tolist(), law.stds.round(6).tolist()] for law in laws])
    return {"name": family, "hash": hashlib.sha256(text.encode()).hexdigest()[:12]}


def _estimators(family: str, dim: int) -> list[dict[str, str]]:
    """Factors of the estimators that are tried on a law, the baseline first."""
    counts = sorted(_NEIGHBOURS if dim in _VARIED else (_MOST,), reverse=True)
    found = [
        {"estimator": kind, "K": f"k{count}", "volumes": "twonn"}
        for kind in ("pak", "kstar")
        for count in counts
    ]
    if dim in _EMBEDDED:
        found.append({"estimator": "pak", "K": f"k{_MOST}", "volumes": "embedding"})
    found.append({"estimator": "kde"})
    if (family, dim) == ("mixture", 2):
        found.append({"estimator": "kde-scott"})
    return found


def _estimator(factors: Mapping[str, str], seed: int) -> DensityEstimator:
    kind = factors["estimator"]
    if kind in _BANDWIDTHS:
        return KDE(_BANDWIDTHS[kind], seed=seed)  # type: ignore[arg-type]  # one of its names
    neighbours: type[PAk] = PAk if kind == "pak" else KStar
    unit: Any = factors["volumes"]
    return neighbours(int(factors["K"].removeprefix("k")), dim=unit, seed=seed)


def _seconds(estimator: Mapping[str, str], dim: int, scale: _Scale) -> float:
    """Expected seconds: kernel sums, and distances of all pairs, grow with the square of the data."""
    size = scale.num_train / _TIMED
    if estimator["estimator"] in _BANDWIDTHS:
        return _KDE_SECONDS[dim] * size**2
    return _PAK_SECONDS[dim] * size ** (2 if dim > max(_IN_TREES) else 1)


def _dim(factors: Mapping[str, str]) -> int:
    return int(factors["dim"].removeprefix("d"))


def _by_family(records: Sequence[Record]) -> dict[str, list[Record]]:
    return {family: cells for (family,), cells in configurations(records, ("data",)).items()}


def _whole(record: Record) -> Record:
    """The record with a dash for each factor that its estimator does not have."""
    return replace(record, factors={"K": "none", "volumes": "none", **record.factors})


def _main(records: Sequence[Record]) -> list[Record]:
    """Records of the most neighbours, told apart by dimension and estimator alone."""
    found = []
    for record in records:
        factors = record.factors
        if factors.get("K", f"k{_MOST}") == f"k{_MOST}":
            name = factors["estimator"]
            name += "-embedding" if factors.get("volumes") == "embedding" else ""
            shared = {key: factors[key] for key in ("data", "dim")}
            found.append(replace(record, factors={**shared, "estimator": name}))
    return found


def _over_seeds(records: Sequence[Record], column: Column) -> OverSeeds:
    return interval(record.metrics.get(column.key) for record in records)


def _by_dim(records: Sequence[Record], column: Column) -> list[Trend]:
    """One line for each estimator, against the dimension."""
    lines: dict[str, list[tuple[float, OverSeeds]]] = {}
    for (name, dim), group in configurations(records, ("estimator", "dim")).items():
        lines.setdefault(name, []).append((_dim({"dim": dim}), _over_seeds(group, column)))
    return [Trend(_WORDS[name], sorted(points, key=lambda at: at[0])) for name, points in lines.items()]


def _by_neighbours(records: Sequence[Record], dim: int) -> list[Trend]:
    """One line for each neighbour estimator, against K."""
    lines: dict[str, list[tuple[float, OverSeeds]]] = {}
    at = [record for record in records if _dim(record.factors) == dim]
    for (name, count), group in configurations(at, ("estimator", "K")).items():
        point = (float(count.removeprefix("k")), _over_seeds(group, _RMSE))
        lines.setdefault(name, []).append(point)
    return [Trend(_WORDS[name], sorted(points, key=lambda at: at[0])) for name, points in lines.items()]


def _by_truth(records: Sequence[Record], dim: int) -> list[Trend]:
    """One line for each estimator through its mean errors, from low to high truth."""
    at = [record for record in records if _dim(record.factors) == dim]
    columns = [Column(f"error_{i}_new", "") for i in range(1, _TENTHS + 1)]
    return [
        Trend(_WORDS[name], [(i, _over_seeds(group, column)) for i, column in enumerate(columns, 1)])
        for (name,), group in configurations(at, ("estimator",)).items()
    ]


def _drawn(
    panels: Mapping[str, Sequence[Trend]],
    stem: Path,
    name: str,
    title: str,
    across: str,
    ticks: Sequence[float] = (),
) -> Path:
    path = stem.with_name(f"{stem.name}-{name}.png")
    return trends(panels, path, f"{title}: new points", across=across, ticks=ticks)
