"""What an estimated density is like, before anything is aligned with it."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["DensityReport"]

# Share of all precision held by a hundredth of the data above which these decide the alignment.
_HEAVY = 0.2


@dataclass(frozen=True)
class DensityReport:
    r"""Summary of a density target.

    Attributes:
        estimator: Kind and options.
        projection: Kind and options; empty for a known density.
        num_data: N.
        num_duplicates: Number of data that repeat another.
        dim: Width of the embedding, ``None`` without one.
        intrinsic_dim: D of the unit, nats per length to the power D; ``None`` for a known density. Where it
            is not the number of latent dimensions, log p(z) has another unit than the target.
        explained: Share of the variance that principal components keep, else ``None``.
        log_scale: Sum over dimensions of the logarithm of the embedding's standard deviation: standardised
            coordinates have densities larger by this many nats.
        mean: Of the log-density, nats; minus it estimates the entropy of the embedding.
        std: Of the log-density, nats; a standard normal in d dimensions has :math:`\sqrt{d/2}`.
        low: 1 % quantile of the log-density.
        high: 99 % quantile.
        error_median: Median standard error, nats.
        error_high: 95 % quantile of the standard errors.
        heavy_share: Share of the sum of :math:`\sigma^{-2}` that the most precise 1 % of the data hold.
        diagnostics: What the estimator tells of its fit: of k*, or of the bandwidth.
    """

    estimator: dict[str, Any]
    projection: dict[str, Any]
    num_data: int
    num_duplicates: int
    dim: int | None
    intrinsic_dim: float | None
    explained: float | None
    log_scale: float | None
    mean: float
    std: float
    low: float
    high: float
    error_median: float
    error_high: float
    heavy_share: float
    diagnostics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"log-density of {self.num_data} data by {_words(self.estimator)}"]
        if self.dim is not None and self.intrinsic_dim is not None:
            kept = "" if self.explained is None else f", {self.explained:.1%} of the variance"
            lines.append(
                f"  embedding     {_words(self.projection)}: {self.dim} dimensions{kept}; "
                f"intrinsic dimension {self.intrinsic_dim:.2f}"
            )
        lines += [
            f"  log-density   mean {self.mean:.3f}, std {self.std:.3f}, 1 % to 99 % {self.low:.3f} to "
            f"{self.high:.3f} nats",
            f"  error         median {self.error_median:.3f}, 95 % {self.error_high:.3f} nats; the most "
            f"precise 1 % hold {self.heavy_share:.1%} of the precision"
            + (", so that they decide: clip the weights" if self.heavy_share > _HEAVY else ""),
        ]
        if self.num_duplicates:
            lines.append(f"  duplicates    {self.num_duplicates}")
        if self.diagnostics:
            found = ", ".join(f"{name} {value:.4g}" for name, value in self.diagnostics.items())
            lines.append(f"  fit           {found}")
        return "\n".join(lines)


def _words(described: dict[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in described.items() if name != "kind")
    return f"{described.get('kind', 'none')}({options})"
