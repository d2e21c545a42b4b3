r"""Does the aggregate posterior match the prior? Every answer with an interval, a null, and what it costs.

"ELBO surgery" (Hoffman & Johnson 2016) splits the rate; samples answer where the split is uninformative.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program

from .activity import _RELATIVE, mean_variance
from .alignment_plot import plot_alignment
from .c2st import C2ST, classifier_two_sample
from .features import FeatureExtractor
from .frechet import frechet_distance, frechet_interval
from .interval import Interval, bootstrap_intervals
from .latents import Posterior, Prior, draw_posterior, draw_prior, latent_names, log_aggregate, means
from .similarity import linear_cka, linear_r2, pearson
from .two_sample import Kernel, gaussian_w2, mmd_interval, mmd_permutation
from .weights import held_out
from .whitening import whitened

__all__ = ["AlignmentReport", "Measure", "alignment_report"]

_LEAST = 20  # data; five folds of the classifier need a few each
_SATURATED = 0.9
_TAIL = 0.01
_ROWS = 500
_MEAN_DRAWS = 32


@dataclass(frozen=True)
class Measure:
    """One figure of a report.

    Attributes:
        value: The estimate.
        low: Lower end of its 95 % interval; NaN where there is none.
        high: Upper end.
        null: The same figure for two samples of the prior; NaN where it means nothing.
        p_value: Of the permutation test, where there was one; else NaN.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    null: float = math.nan
    p_value: float = math.nan

    def to_dict(self) -> dict[str, float | None]:
        """Return what is defined as numbers and the rest as ``None``."""
        return {name: v if math.isfinite(v) else None for name, v in vars(self).items()}


@dataclass(frozen=True)
class AlignmentReport:
    r"""How one sample of the latents from the guide, one for each held-out datum, compares with the prior.

    Group A compares the two, in coordinates where the prior is white: affine maps of the latent space change
    none of it. Group B compares posterior means with the codes of another encoder on the same data. Group C
    must be read beside A: a posterior that ignores x is perfectly aligned, with no active unit and a poor
    ELBO.

    Attributes:
        mean_gap: A. Root mean square over dimensions of :math:`(\bar z_j - m_j) / s_j`.
        log_std_ratio: A. Root mean square of the logarithm of the standard deviations' ratio.
        correlation_gap: A. Root mean square difference of the correlations off the diagonal.
        w2: A. Squared 2-Wasserstein distance of the two moment pairs.
        mmd2: A. Unbiased squared MMD, with the p-value of a permutation test.
        c2st: A. Held-out accuracy of a classifier; 0.5 is perfect.
        c2st_with_y: A. The same with the context among the inputs, which sees a mismatch within a label;
            ``None`` for a model without contexts.
        rate: A. :math:`\mathbb E\, KL(q(z|x) \| p(z))` in nats, the sum of the next two.
        mutual_information: A. :math:`I_q(x; z)` with the mixture of the held-out posteriors (of the data of
            equal context) for the aggregate: at most ``information_limit``, whatever the truth.
        kl_aggregate: A. The rest of the rate; an upper bound in expectation, and nothing but the rate minus
            the limit where ``saturated``.
        holes: A. Share of prior draws where the aggregate posterior (without a draw's own datum) has less
            density than at 99 % of its own draws; 0.01 is perfect.
        outside: A. Share of posterior draws where the prior has less density than at 99 % of its own.
        elbo: C. Nats per datum.
        reconstruction_mse: C. Squared error per number of x of the mean of p(x|z), z from the guide.
        active_units: C. Dimensions whose posterior mean varies by more than 0.1 prior scales.
        frechet_proxy: C. Frechet distance of the means of p(x|z), z from the prior, to real data, in the
            features given; never called FID. ``None`` without features.
        code_correlation: B. Mean correlation of matching dimensions; ``None`` without codes of that width.
        code_r2: B. Share of the codes' variance that an affine map of the means explains (adjusted).
        code_cka: B. Linear CKA.
        code_rms: B. Root mean square distance in units of the codes' standard deviations.
        saturated: Whether ``mutual_information`` exceeds 0.9 of its limit, or fewer than ten data share a
            context: then the split says nothing; read ``mmd2`` and ``c2st``.
        information_limit: Logarithm of the number of data (of equal context, averaged).
        mean_gaps: The signed gaps, shape ``(d,)``.
        log_std_ratios: The signed logarithms, shape ``(d,)``.
        mean_variances: Variance over data of the posterior means, shape ``(d,)``.
        prior_scales: Standard deviations of the prior, shape ``(d,)``.
        code_correlations: Shape ``(d,)``, or ``None``.
        z_posterior: Draws shown in the picture, shape ``(n, d)``.
        z_prior: Draws of the prior shown beside them.
        num_data: Number of held-out data.
        num_prior: Number of prior draws.
        seed: Seed of all draws.
        protocol: What was compared (data set, split, hash), if known.
    """

    mean_gap: Measure
    log_std_ratio: Measure
    correlation_gap: Measure
    w2: Measure
    mmd2: Measure
    c2st: Measure
    c2st_with_y: Measure | None
    rate: Measure
    mutual_information: Measure
    kl_aggregate: Measure
    holes: Measure
    outside: Measure
    elbo: Measure
    reconstruction_mse: Measure
    active_units: Measure
    frechet_proxy: Measure | None
    code_correlation: Measure | None
    code_r2: Measure | None
    code_cka: Measure | None
    code_rms: Measure | None
    saturated: bool
    information_limit: float
    mean_gaps: Tensor
    log_std_ratios: Tensor
    mean_variances: Tensor
    prior_scales: Tensor
    code_correlations: Tensor | None
    z_posterior: Tensor
    z_prior: Tensor
    num_data: int
    num_prior: int
    seed: int
    protocol: dict[str, Any] | None = None

    @property
    def z_dim(self) -> int:
        """Number of latent dimensions d, all sites together."""
        return len(self.prior_scales)

    def measures(self) -> dict[str, Measure]:
        """Return every figure there is, by name, in the order of the table."""
        found = {name: getattr(self, name) for name, _, _ in _TABLE}
        return {name: measure for name, measure in found.items() if measure is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold; draws are left out."""
        return {
            "measures": {name: measure.to_dict() for name, measure in self.measures().items()},
            "saturated": self.saturated,
            "information_limit": self.information_limit,
            "per_dimension": {
                "mean_gap": self.mean_gaps.tolist(),
                "log_std_ratio": self.log_std_ratios.tolist(),
                "mean_variance": self.mean_variances.tolist(),
                "prior_scale": self.prior_scales.tolist(),
                "code_correlation": None
                if self.code_correlations is None
                else self.code_correlations.tolist(),
            },
            "z_dim": self.z_dim,
            "num_data": self.num_data,
            "num_prior": self.num_prior,
            "seed": self.seed,
            "protocol": self.protocol,
        }

    def to_markdown(self, reference: "AlignmentReport | None" = None) -> str:
        """Return one table, a row for each figure.

        Args:
            reference: Report of another model on the same data (a standard VAE), for a column beside.
        """
        other = None if reference is None else reference.measures()
        head = ["measure", "value", "95 % interval", "prior against prior", "perfect"]
        head += [] if other is None else ["reference"]
        lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
        for name, label, perfect in _TABLE:
            measure: Measure | None = getattr(self, name)
            if measure is None:
                continue
            interval = "" if math.isnan(measure.low) else f"{_figure(measure.low)} to {_figure(measure.high)}"
            label += f" (of {self.z_dim})" if name == "active_units" else ""
            label += " (saturated)" if self.saturated and name in _SPLIT else ""
            value = _figure(measure.value)
            value += "" if math.isnan(measure.p_value) else f" (p = {measure.p_value:.2g})"
            cells = [label, value, interval, _figure(measure.null), perfect]
            if other is not None:
                cells.append(_figure(other[name].value) if name in other else "")
            lines.append(_row(cells))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_markdown()

    def plot(self, path: str | Path, title: str = "") -> Path:
        """Write a picture: histograms of the worst dimensions, and both samples on their principal plane."""
        return plot_alignment(self.z_posterior, self.z_prior, self.prior_scales, Path(path), title)


_TABLE: tuple[tuple[str, str, str], ...] = (
    ("mean_gap", "mean gap, prior scales", "0"),
    ("log_std_ratio", "log std ratio", "0"),
    ("correlation_gap", "correlation gap", "0"),
    ("w2", "squared Gaussian W2, whitened", "0"),
    ("mmd2", "MMD²", "0"),
    ("c2st", "C2ST accuracy", "0.5"),
    ("c2st_with_y", "C2ST accuracy, with y", "0.5"),
    ("rate", "rate, nats", ""),
    ("mutual_information", "I(x; z), nats", ""),
    ("kl_aggregate", "KL(aggregate ‖ prior), nats", "0"),
    ("holes", "prior draws in holes", "0.01"),
    ("outside", "posterior draws outside the prior", "0.01"),
    ("elbo", "ELBO, nats", ""),
    ("reconstruction_mse", "reconstruction MSE", ""),
    ("active_units", "active units", ""),
    ("frechet_proxy", "Frechet distance (proxy) of samples", "0"),
    ("code_correlation", "correlation with the codes", "1"),
    ("code_r2", "linear R² of the codes", "1"),
    ("code_cka", "linear CKA with the codes", "1"),
    ("code_rms", "RMS distance to the codes, scales", "0"),
)
_SPLIT = ("mutual_information", "kl_aggregate")


def alignment_report(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_prior: int | None = None,
    codes: Tensor | None = None,
    features: FeatureExtractor | None = None,
    reference: Tensor | Split | None = None,
    num_bootstrap: int = 200,
    max_points: int = 2000,
    seed: int = 0,
) -> AlignmentReport:
    """Compare the aggregate posterior of held-out data with the prior, for any model and guide.

    Draws of the prior are runs of the model with nothing replayed, in a conditional model under the contexts
    of the data; latents of several sites stand side by side. The null column compares one sample of the
    prior with another. Intervals resample data and draws; the mixture behind ``mutual_information`` and
    ``holes`` stays as it is. Both programs run in evaluation mode and are left, with all random generators,
    as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``; its prior must have a density.
        guide: The guide program, with a density.
        x: Held-out data, shape ``(N, *x_shape)``, at least 20, or a split. Data the model was trained on make
            it look aligned.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_prior: Number of prior draws; by default N.
        codes: Codes of the same data by another encoder (an autoencoder), shape ``(N, e)``.
        features: Maps data ``(B, *x_shape)`` to features ``(B, F)``: asks for the Frechet distance.
        reference: Real data that samples are compared with there; by default x.
        num_bootstrap: Resamples behind an interval; 0 leaves the intervals out.
        max_points: Points per sample in the permutation test and the classifier, whose cost is quadratic.
        seed: Seed of every draw.

    Raises:
        ValueError: For sizes out of range, arguments that do not fit each other, data the likelihood does not
            support, or programs outside the contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.

    Example:
        >>> report = alignment_report(model, guide, data.test)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    x, y, protocol = held_out(model, x, y)
    num_prior = len(x) if num_prior is None else num_prior
    for name, size in (("x", len(x)), ("num_prior", num_prior), ("max_points", max_points)):
        if size < _LEAST:
            raise ValueError(f"{name} must be at least {_LEAST}, got {size}")
    if num_bootstrap < 0:
        raise ValueError(f"num_bootstrap must not be negative, got {num_bootstrap}")
    if codes is not None and (codes.ndim != 2 or len(codes) != len(x)):
        raise ValueError(f"codes must have shape ({len(x)}, e), got {tuple(codes.shape)}")
    if reference is not None and features is None:
        raise ValueError("reference needs features in which to compare")
    real = x if reference is None else held_out(model, reference, None)[0]
    owner = getattr(features, "__self__", features)
    device = device_of(model, guide)
    with evaluating(model, guide), evaluating(owner):
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = latent_names(model, guide, x, y)
        q = draw_posterior(model, guide, x, y, names, seed + 1)
        mean, error = means(guide, x, y, names, seed + 2, _MEAN_DRAWS)
        p = draw_prior(model, x, y, names, num_prior, seed + 3, features)
        null = draw_prior(model, x, y, names, len(x), seed + 4, features)
        group = _groups(y, len(x))
        log_own, log_others = log_aggregate(guide, q.values, x, y, group)
        log_holes = log_aggregate(guide, p.values, x, y)[0]
        real_features = None if features is None else _features(features, real, device)
    context = None if y is None else _context(y.cpu())
    samples = _Samples(q, p, null, context, num_bootstrap, max_points, seed)
    limit = float(torch.bincount(group)[group].double().log().mean())
    terms = {
        "rate": q.log_q - q.log_p,
        "information": q.log_q - log_own,
        "aggregate": log_own - q.log_p,
        "elbo": q.log_x + q.log_p - q.log_q,
        "mse": q.square_error,
    }
    split = dict(zip(terms, _means(samples, *terms.values()), strict=True))
    information = split["information"].value
    moments = samples.moments()
    gaps, ratios, _ = _moment_gaps(q.z, p.z)
    scales = torch.cat([p.z, null.z]).std(0)
    same_width = codes is not None and codes.shape[1] == mean.shape[1]
    agreement: list[Measure | None] = [None] * 4
    if codes is not None:
        agreement = _code_measures(samples, mean, codes)
    return AlignmentReport(
        mean_gap=moments[0],
        log_std_ratio=moments[1],
        correlation_gap=moments[2],
        w2=moments[3],
        mmd2=samples.mmd2(),
        c2st=samples.c2st(),
        c2st_with_y=None if context is None else samples.c2st(with_y=True),
        rate=split["rate"],
        mutual_information=split["information"],
        kl_aggregate=split["aggregate"],
        holes=samples.tail(log_others, log_holes),
        outside=samples.tail(p.log_p, q.log_p),
        elbo=split["elbo"],
        reconstruction_mse=split["mse"],
        active_units=_active(samples, mean, error, scales),
        frechet_proxy=None if real_features is None else _frechet(samples, real_features),
        code_correlation=agreement[0],
        code_r2=agreement[1],
        code_cka=agreement[2],
        code_rms=agreement[3],
        saturated=is_saturated(information, limit),
        information_limit=limit,
        mean_gaps=gaps,
        log_std_ratios=ratios,
        mean_variances=mean_variance(mean, error),
        prior_scales=scales,
        code_correlations=pearson(mean, codes) if codes is not None and same_width else None,
        z_posterior=q.z[samples.rows(len(q.z))],
        z_prior=p.z[samples.rows(len(p.z))],
        num_data=len(x),
        num_prior=num_prior,
        seed=seed,
        protocol=protocol,
    )


@dataclass(frozen=True)
class _Samples:
    """The three samples, and how they are resampled.

    The prior's white coordinates are those of both its samples, or of the null alone if ``apart``: then they
    depend on nothing that is tested.
    """

    q: Posterior
    p: Prior
    null: Prior
    context: Tensor | None
    num_bootstrap: int
    max_points: int
    seed: int
    apart: bool = False

    def bootstrap(
        self, statistic: Callable[..., Tensor], *sizes: int, least: float = -math.inf
    ) -> list[Interval]:
        return bootstrap_intervals(
            statistic, *sizes, num_bootstrap=self.num_bootstrap, seed=self.seed, least=least
        )

    def rows(self, size: int) -> Tensor:
        """At most ``max_points`` rows at random: data may be sorted."""
        return torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))[: self.max_points]

    def white(self) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior, prior and null in the coordinates where the prior's moments are 0 and 1."""
        pooled = self.null.z if self.apart else torch.cat([self.p.z, self.null.z])
        q, p, null = whitened(pooled, self.q.z, self.p.z, self.null.z)
        return q, p, null

    def moments(self) -> list[Measure]:
        """Mean gap, log std ratio, correlation gap and W2."""
        white_q, white_p, white_null = self.white()

        def compare(a: Tensor, white_a: Tensor, i: Tensor, j: Tensor) -> Tensor:
            gaps, ratios, correlation = _moment_gaps(a[i], self.p.z[j])
            w2 = gaussian_w2(white_a[i], white_p[j])
            return torch.stack(
                [
                    gaps.square().mean().sqrt(),
                    ratios.square().mean().sqrt(),
                    correlation,
                    torch.tensor(w2, dtype=torch.float64),
                ]
            )

        found = self.bootstrap(
            lambda i, j: compare(self.q.z, white_q, i, j), len(self.q.z), len(self.p.z), least=0.0
        )
        everything = torch.arange(len(self.null.z)), torch.arange(len(self.p.z))
        nulls = compare(self.null.z, white_null, *everything).tolist()
        return [_measure(interval, null) for interval, null in zip(found, nulls, strict=True)]

    def points(self, with_y: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The three samples whitened and cut down, with the contexts beside them if asked for."""
        q, p, null = self.white()
        if with_y and self.context is not None:
            contexts = self.context, self.context[self.p.rows], self.context[self.null.rows]
            q, p, null = (torch.cat(pair, -1) for pair in zip((q, p, null), contexts, strict=True))
        return q[self.rows(len(q))], p[self.rows(len(p))], null[self.rows(len(null))]

    def mmd2(self, kernel: Kernel = "rbf") -> Measure:
        q, p, null = self.points()
        test = mmd_permutation(q, p, max(self.num_bootstrap, 100), self.seed, kernel=kernel)
        interval = mmd_interval(q, p, self.num_bootstrap, self.seed, kernel=kernel)
        reference = mmd_interval(null, p, 0, self.seed, kernel=kernel).value
        return Measure(interval.value, interval.low, interval.high, reference, test.p_value)

    def c2st(self, with_y: bool = False) -> Measure:
        q, p, null = self.points(with_y)
        test: C2ST = classifier_two_sample(q, p, self.seed)
        reach = 1.96 * test.standard_error if self.num_bootstrap else math.nan
        reference = classifier_two_sample(null, p, self.seed).accuracy
        return Measure(test.accuracy, test.accuracy - reach, test.accuracy + reach, reference)

    def tail(self, own: Tensor, other: Tensor) -> Measure:
        """Share of another sample's log-densities below the first percentile of the density's own."""

        def statistic(i: Tensor, j: Tensor) -> Tensor:
            return (other[j] < own[i].quantile(_TAIL)).double().mean()

        return _measure(self.bootstrap(statistic, len(own), len(other), least=0.0)[0], _TAIL)


def is_saturated(information: float, limit: float) -> bool:
    """Whether a mixture of posteriors, ``limit`` the logarithm of their number, hides what there is."""
    return information > _SATURATED * limit or limit < math.log(10)


def _means(samples: _Samples, *columns: Tensor) -> list[Measure]:
    """Means over data of several columns ``(N,)``, resampled together."""
    table = torch.stack(columns, -1)
    found = samples.bootstrap(lambda i: table[i].mean(0), len(table))
    return [_measure(interval) for interval in found]


def _active(samples: _Samples, mean: Tensor, error: Tensor, scales: Tensor) -> Measure:
    def count(i: Tensor) -> Tensor:
        return (mean_variance(mean[i], error[i]).sqrt() > _RELATIVE * scales).double().sum()

    return _measure(samples.bootstrap(count, len(mean))[0])


def _frechet(samples: _Samples, real: Tensor) -> Measure:
    p, null = samples.p.features, samples.null.features
    assert p is not None
    assert null is not None
    interval = frechet_interval(p, real, samples.num_bootstrap, samples.seed)
    return _measure(interval, frechet_distance(p, null))


def _code_measures(samples: _Samples, mean: Tensor, codes: Tensor) -> list[Measure | None]:
    """Correlation, R², CKA and distance of posterior means and codes; the first and last need one width."""
    codes = codes.detach().cpu().double()
    same = mean.shape[1] == codes.shape[1]
    scale = codes.std(0)
    moving = scale > 0

    def statistic(i: Tensor) -> Tensor:
        a, b = mean[i], codes[i]
        values = [linear_r2(a, b), linear_cka(a, b)]
        if same:
            distance = ((a - b)[:, moving] / scale[moving]).square().mean().sqrt()
            values += [float(pearson(a, b).mean()), float(distance)]
        return torch.tensor(values, dtype=torch.float64)

    r2, cka, *rest = map(_measure, samples.bootstrap(statistic, len(mean)))
    return [rest[0] if same else None, r2, cka, rest[1] if same else None]


def _moment_gaps(a: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed mean gaps and log std ratios ``(d,)``, and the root mean square gap of the correlations."""
    tiny = 1e-12
    scale_a, scale_p = a.std(0).clamp(min=tiny), p.std(0).clamp(min=tiny)
    gaps = (a.mean(0) - p.mean(0)) / scale_p
    dim = a.shape[1]
    first, second = (
        ((z - z.mean(0)) / scale).T @ ((z - z.mean(0)) / scale) / (len(z) - 1)
        for z, scale in ((a, scale_a), (p, scale_p))
    )
    apart = (first - second).masked_fill(torch.eye(dim, dtype=torch.bool), 0.0)
    correlation = (apart.square().sum() / max(dim * (dim - 1), 1)).sqrt()
    return gaps, (scale_a / scale_p).log(), correlation


def _groups(y: Tensor | None, num_data: int) -> Tensor:
    """Number data so that those of equal context have the same number, shape ``(N,)``."""
    if y is None:
        return torch.zeros(num_data, dtype=torch.int64)
    number: Tensor = torch.unique(y.detach().cpu().reshape(num_data, -1), dim=0, return_inverse=True)[1]
    return number


def _context(y: Tensor) -> Tensor:
    """Contexts as inputs of a classifier, shape ``(N, c)``."""
    if y.ndim == 1 and not y.is_floating_point():
        return F.one_hot(y.long()).double()
    return y.double().reshape(len(y), -1)


def _features(features: FeatureExtractor, x: Tensor, device: torch.device) -> Tensor:
    return torch.cat([features(part.to(device)).detach().cpu().double() for part in x.split(_ROWS)])


def _measure(interval: Interval, null: float = math.nan) -> Measure:
    return Measure(interval.value, interval.low, interval.high, null)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""
