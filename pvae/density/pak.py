r"""Point-adaptive k-nearest-neighbour density with an error bar (PAk: Rodriguez et al. 2018,
doi:10.1021/acs.jctc.7b00916), and the same without its correction.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np

from .adaptive import LEAST, Counts, adaptive_counts
from .estimator import DensityEstimator, Scored, part_of
from .intrinsic import two_nn
from .neighbours import Floats, Neighbours, Progress
from .shells import corrected, uncorrected

__all__ = ["KStar", "PAk"]

# Shares of the data with k* at an end of its range that are worth a warning: at the upper end the error is
# honest, and only larger than it could be.
_AT_CAP, _AT_FLOOR = 0.9, 0.5


class PAk(DensityEstimator):
    r"""k-nearest-neighbour density whose k is found for each point, with a linear correction.

    :math:`k^*` grows until a likelihood-ratio test tells the density at the point from that at its next
    neighbour. Within the k* neighbours the log-density may change linearly with their rank l: with shells
    :math:`v_l` between successive neighbours, :math:`\rho = \hat F - \log N` for the maximum of

    .. math:: L(F, a) = k F + a \tfrac{k (k + 1)}{2} - \sum_{l=1}^{k} v_l \, e^{F + a l}

    and the standard error :math:`\sqrt{(4 k + 2) / (k (k - 1))}` is that of :math:`F` by the Fisher
    information at :math:`a = 0`. The error is variance: it is honest to about 5 dimensions, and beyond 10 the
    bias, which it does not know, is larger. Where shells of no volume (points equally far, as on a grid)
    leave L without a maximum, the uncorrected :math:`\log k - \log V_k - \log N` stands.

    Memory: 20 bytes for each datum and neighbour (240 MB for 60,000 data and 199 neighbours) while fitting,
    8 of them as long as new points may be scored.

    Args:
        max_neighbors: Number K of neighbours looked at; k* is at most K - 1.
        alpha: Level of the test; a small one lets k* grow.
        dim: D of the volumes: ``"twonn"`` estimates it, ``"embedding"`` takes the width of ``u``, a number
            is taken as it is.
        correction: Whether to correct; :class:`KStar` does not.
        jitter: See :class:`DensityEstimator`.
        seed: See :class:`DensityEstimator`.

    Attributes:
        k_star: k* of each datum, shape ``(N,)``.
        num_uncorrected: Number of data whose likelihood has no maximum.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> u = np.random.default_rng(0).standard_normal((500, 2))
        >>> fit = PAk(max_neighbors=50, dim="embedding").fit(u)
        >>> bool(abs(fit.score(np.zeros((1, 2))).log_density[0] + np.log(2 * np.pi)) < 0.5)
        True
    """

    kind: ClassVar[str] = "pak"
    k_star: Counts
    num_uncorrected: int

    def __init__(
        self,
        max_neighbors: int = 199,
        alpha: float = 1e-6,
        dim: Literal["twonn", "embedding"] | float = "twonn",
        correction: bool = True,
        *,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(jitter, seed)
        if max_neighbors < LEAST + 1:
            raise ValueError(f"max_neighbors must be at least {LEAST + 1}, got {max_neighbors}")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
        if isinstance(dim, str):
            if dim not in ("twonn", "embedding"):
                raise ValueError(f"dim must be 'twonn', 'embedding' or a positive number, got {dim!r}")
        elif not 0 < dim < math.inf:
            raise ValueError(f"dim must be 'twonn', 'embedding' or a positive number, got {dim}")
        self.max_neighbors, self.alpha, self.dim, self.correction = max_neighbors, alpha, dim, correction
        self._log_radii: Floats | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "max_neighbors": self.max_neighbors,
            "alpha": self.alpha,
            "dim": self.dim,
            "correction": self.correction,
            "jitter": self.jitter,
            "seed": self.seed,
        }

    def diagnostics(self) -> dict[str, float]:
        """Return quantiles of k*, the shares of data at its least and its largest value, and failures."""
        cap = self.max_neighbors - 1
        found = {
            f"k_star_{name}": float(np.quantile(self.k_star, q))
            for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95))
        }
        return {
            **found,
            "share_k_star_floor": float((self.k_star == LEAST).mean()),
            "share_k_star_cap": float((self.k_star == cap).mean()),
            "num_uncorrected": float(self.num_uncorrected),
        }

    @property
    def _num_neighbours(self) -> int:
        return self.max_neighbors

    def _fit(self, points: Floats, progress: Progress | None) -> Scored[Floats]:
        size, width = points.shape
        if size <= self.max_neighbors:
            raise ValueError(
                f"u must have more than max_neighbors = {self.max_neighbors} different rows, got {size}: "
                "lower max_neighbors"
            )
        near = self._fitted().among(self.max_neighbors, part_of(progress, 0, 2 * size))
        if self.dim == "twonn":
            self.intrinsic_dim = two_nn(near.radii)
        else:
            self.intrinsic_dim = float(width if self.dim == "embedding" else self.dim)
        self._log_radii = np.log(near.radii)
        scored, counts, self.num_uncorrected = self._estimate(near, part_of(progress, size, 2 * size))
        self.k_star = counts[self._inverse]
        self._warn(size)
        return scored

    def _score(
        self, queries: Floats, near: Neighbours, report: Callable[[int], None] | None
    ) -> Scored[Floats]:
        return self._estimate(near, report)[0]

    def _restore(self, points: Floats, state: dict[str, float]) -> None:
        self._log_radii = None

    def _estimate(
        self, near: Neighbours, report: Callable[[int], None] | None
    ) -> tuple[Scored[Floats], Counts, int]:
        """Estimate at points with given neighbours; also return k* and how many have no correction."""
        from scipy.stats import chi2

        if self._log_radii is None:  # restored: the search among the data was not stored
            self._log_radii = np.log(self._fitted().among(self.max_neighbors).radii)
        counts = adaptive_counts(
            near, self._log_radii, self.intrinsic_dim, threshold=float(chi2.isf(self.alpha, 1))
        )
        log_density = uncorrected(near.radii, counts, self.intrinsic_dim)
        if not self.correction:
            return Scored(log_density - self._log_size, 1 / np.sqrt(counts)), counts, 0
        free = corrected(near.radii, counts, self.intrinsic_dim, report)
        found = ~np.isnan(free)
        log_density[found] = free[found]
        error = np.sqrt((4 * counts + 2) / (counts * (counts - 1)))
        return Scored(log_density - self._log_size, error), counts, int((~found).sum())

    @property
    def _log_size(self) -> float:
        return math.log(len(self._counts))

    def _warn(self, size: int) -> None:
        """Say where k* was no choice, and where the correction failed."""
        seen = self.diagnostics()
        if seen["share_k_star_cap"] > _AT_CAP:
            warnings.warn(
                f"k* is at its largest value {self.max_neighbors - 1} for "
                f"{seen['share_k_star_cap']:.0%} of the data: a larger max_neighbors would lower the errors",
                stacklevel=4,
            )
        if seen["share_k_star_floor"] > _AT_FLOOR:
            warnings.warn(
                f"k* is {LEAST} for {seen['share_k_star_floor']:.0%} of the data: the density changes within "
                "three neighbours, and its estimate means little",
                stacklevel=4,
            )
        if self.num_uncorrected:
            warnings.warn(
                f"{self.num_uncorrected} of {size} points have neighbours equally far, as on a grid, and no "
                "correction: jitter spreads them",
                stacklevel=4,
            )


class KStar(PAk):
    r"""k-nearest-neighbour density with PAk's k* and no correction.

    .. math::
        \rho = \log k^* - \log \omega_D - D \log r_{k^*} - \log N, \qquad \sigma = 1 / \sqrt{k^*}

    Beyond 10 dimensions it ranks data better than :class:`PAk` does.

    Args:
        max_neighbors: See :class:`PAk`.
        alpha: See :class:`PAk`.
        dim: See :class:`PAk`.
        jitter: See :class:`DensityEstimator`.
        seed: See :class:`DensityEstimator`.
    """

    kind: ClassVar[str] = "kstar"

    def __init__(
        self,
        max_neighbors: int = 199,
        alpha: float = 1e-6,
        dim: Literal["twonn", "embedding"] | float = "twonn",
        *,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(max_neighbors, alpha, dim, correction=False, jitter=jitter, seed=seed)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: value for name, value in super().options.items() if name != "correction"}
