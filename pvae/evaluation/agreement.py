r"""Does log p(z) say of data what an external log-density says of them? (DiVAE 2025, arXiv:2512.03928v1)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .interval import Interval, bootstrap_intervals

__all__ = ["DensityAgreement", "density_agreement"]

_LEAST = 3  # data; fewer have no slope with an error


@dataclass(frozen=True)
class DensityAgreement:
    r"""How the log-densities :math:`s_i` of a model agree with log-densities :math:`\rho_i` of the same data.

    Raw figures compare nats with nats. A density per volume of codes and one per volume of (embedded) data
    may differ by a constant that means nothing, which the centred figures take out: both samples less their
    means. Intervals are bootstrap ones of 95 %, over data.

    Attributes:
        ks: Kolmogorov-Smirnov distance of the laws of s and :math:`\rho`: 0 for equal laws, at most 1.
        ks_centred: The same, centred.
        wasserstein: Wasserstein-1 distance of the two laws, nats.
        wasserstein_centred: The same, centred.
        pearson: Correlation of s and :math:`\rho`, datum by datum; 0 if one of them is constant.
        spearman: Correlation of their ranks.
        offset: Mean of :math:`s - \rho`, nats.
        slope: Least-squares slope of s over :math:`\rho`: how many nats s moves with one of :math:`\rho`.
            Errors of :math:`\rho` flatten it by ``reliability``.
        pull_mean: Mean of :math:`(\rho_i - s_i) / \sigma_i`; 0 if the two differ by the density's error
            alone, which the standard error would then describe. ``None`` without standard errors.
        pull_std: Standard deviation of the same; 1 if they do. With a true log-density for s this is the
            calibration of the density estimate: 2 means errors twice as large as said.
        reliability: :math:`1 - \overline{\sigma^2} / \mathrm{Var}\, \rho`, the share of the variance of
            :math:`\rho` that is no error by its own account; ``None`` without standard errors.
        num_data: Number of data.
    """

    ks: Interval
    ks_centred: Interval
    wasserstein: Interval
    wasserstein_centred: Interval
    pearson: Interval
    spearman: Interval
    offset: Interval
    slope: Interval
    pull_mean: Interval | None
    pull_std: Interval | None
    reliability: Interval | None
    num_data: int

    def measures(self) -> dict[str, Interval]:
        """Return every figure there is, by name, in the order of the table."""
        found = {name: getattr(self, name) for name, _, _ in _TABLE}
        return {name: interval for name, interval in found.items() if interval is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers that JSON can hold; what is not defined is ``None``."""
        return {
            "measures": {
                name: {key: v if math.isfinite(v) else None for key, v in vars(interval).items()}
                for name, interval in self.measures().items()
            },
            "num_data": self.num_data,
        }

    def to_markdown(self) -> str:
        """Return one table, a row for each figure."""
        lines = [
            "| log p(z) against the density | value | 95 % interval | perfect |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, label, perfect in _TABLE:
            interval: Interval | None = getattr(self, name)
            if interval is not None:
                reach = "" if math.isnan(interval.low) else f"{interval.low:.3g} to {interval.high:.3g}"
                lines.append(f"| {label} | {interval.value:.3g} | {reach} | {perfect} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        parts = [
            f"KS {self.ks.value:.3f} (centred {self.ks_centred.value:.3f})",
            f"W1 {self.wasserstein.value:.2f} nats (centred {self.wasserstein_centred.value:.2f})",
            f"Pearson {self.pearson.value:.3f}",
            f"Spearman {self.spearman.value:.3f}",
            f"slope {self.slope.value:.2f}",
        ]
        if self.pull_mean is not None and self.pull_std is not None:
            parts.append(f"pull {self.pull_mean.value:.2f} ± {self.pull_std.value:.2f}")
        return f"{', '.join(parts)} on {self.num_data} data"


_TABLE: tuple[tuple[str, str, str], ...] = (
    ("ks", "KS distance", "0"),
    ("ks_centred", "KS distance, centred", "0"),
    ("wasserstein", "Wasserstein-1, nats", "0"),
    ("wasserstein_centred", "Wasserstein-1 centred, nats", "0"),
    ("pearson", "Pearson correlation", "1"),
    ("spearman", "Spearman correlation", "1"),
    ("offset", "mean difference, nats", "0"),
    ("slope", "slope of log p(z)", "1"),
    ("pull_mean", "pull, mean", "0"),
    ("pull_std", "pull, standard deviation", "1"),
    ("reliability", "reliability of the density", "1"),
)

# Ends that a figure, and so its interval, cannot pass.
_RANGES = {
    "ks": (0.0, 1.0),
    "ks_centred": (0.0, 1.0),
    "wasserstein": (0.0, math.inf),
    "wasserstein_centred": (0.0, math.inf),
    "pearson": (-1.0, 1.0),
    "spearman": (-1.0, 1.0),
    "reliability": (-math.inf, 1.0),
}


def density_agreement(
    log_prior: Tensor,
    log_density: Tensor,
    standard_error: Tensor | None = None,
    *,
    num_bootstrap: int = 200,
    seed: int = 0,
) -> DensityAgreement:
    r"""Compare log-densities of data under a model's prior with external log-densities of the same data.

    Pass :attr:`LatentScores.log_p_draw` for the law of log p(z) (one draw for each datum, as published),
    ``log_p_mean`` for a ranking of data. Where the alignment was through a flow, what estimates the density
    is log p(z) plus the flow's log-determinant.

    Args:
        log_prior: :math:`s_i`, nats, shape ``(N,)``.
        log_density: :math:`\rho_i`, nats, shape ``(N,)``: an estimate at data that it was not fitted to, or
            the truth.
        standard_error: Standard error :math:`\sigma_i` of :math:`\rho_i`, positive, shape ``(N,)``.
        num_bootstrap: Resamples behind an interval; 0 leaves the intervals out.
        seed: Seed of the resamples.

    Raises:
        ValueError: If the shapes differ or are no vectors, there are fewer than three data, a number is not
            finite, a standard error is not positive, or ``num_bootstrap`` is negative.

    Example:
        >>> s = torch.tensor([-3.0, -2.0, -1.0])
        >>> found = density_agreement(s, s - 5, num_bootstrap=0)
        >>> found.ks.value, found.ks_centred.value, found.wasserstein.value
        (1.0, 0.0, 5.0)
    """
    s, rho = _vector("log_prior", log_prior), _vector("log_density", log_density)
    sigma = None if standard_error is None else _vector("standard_error", standard_error)
    for name, other in (("log_density", rho), ("standard_error", sigma)):
        if other is not None and len(other) != len(s):
            raise ValueError(f"{name} must have one entry for each of the {len(s)} data, got {len(other)}")
    if len(s) < _LEAST:
        raise ValueError(f"log_prior must hold at least {_LEAST} data, got {len(s)}")
    if sigma is not None and not bool((sigma > 0).all()):
        raise ValueError(f"standard_error must be positive, got {float(sigma.min()):g}")
    if num_bootstrap < 0:
        raise ValueError(f"num_bootstrap must not be negative, got {num_bootstrap}")

    def statistic(i: Tensor) -> Tensor:
        return _figures(s[i], rho[i], None if sigma is None else sigma[i])

    intervals = bootstrap_intervals(statistic, len(s), num_bootstrap=num_bootstrap, seed=seed)
    found: dict[str, Any] = dict.fromkeys(name for name, _, _ in _TABLE)
    # Without standard errors the last figures of the table are not there.
    for name, interval in zip(found, intervals, strict=False):
        low, high = _RANGES.get(name, (-math.inf, math.inf))
        ends = (end if math.isnan(end) else min(max(end, low), high) for end in (interval.low, interval.high))
        found[name] = Interval(interval.value, *ends)
    return DensityAgreement(**found, num_data=len(s))


def _figures(s: Tensor, rho: Tensor, sigma: Tensor | None) -> Tensor:
    """Every figure of a report in its order, shape ``(8,)`` or ``(11,)``."""
    centred_s, centred_rho = s - s.mean(), rho - rho.mean()
    figures = [
        ks_distance(s, rho),
        ks_distance(centred_s, centred_rho),
        _wasserstein(s, rho),
        _wasserstein(centred_s, centred_rho),
        _correlation(centred_s, centred_rho),
        _correlation(_ranks(s), _ranks(rho)),
        (s - rho).mean(),
        (centred_s * centred_rho).sum() / centred_rho.square().sum(),
    ]
    if sigma is not None:
        pull = (rho - s) / sigma
        figures += [pull.mean(), pull.std(), 1 - sigma.square().mean() / rho.var()]
    return torch.stack(figures)


def ks_distance(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference of the distribution functions of two samples ``(N,)`` and ``(M,)``, shape ``()``."""
    a, b = a.sort().values, b.sort().values
    at = torch.cat([a, b])
    below_a, below_b = (torch.searchsorted(x, at, right=True).double() / len(x) for x in (a, b))
    return (below_a - below_b).abs().amax()


def _wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """Wasserstein-1 distance of two samples of one size: the mean distance of their order statistics."""
    return (a.sort().values - b.sort().values).abs().mean()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of two samples, 0 if one is constant."""
    # A sample that does not move may differ from its mean by rounding: that is no variance.
    a, b = (torch.zeros_like(x) if x.amax() == x.amin() else x - x.mean() for x in (a, b))
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return torch.where(scale > 0, (a * b).sum() / scale.clamp(min=torch.finfo(a.dtype).tiny), 0.0)


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _vector(name: str, value: Tensor) -> Tensor:
    if value.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), got {tuple(value.shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {int((~value.isfinite()).sum())} other entries")
    return value.detach().cpu().double()
