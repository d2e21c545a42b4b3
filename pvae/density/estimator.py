"""What every density estimator of this room does alike: checks, duplicates, new points that are old."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .neighbours import Floats, Neighbours, NeighbourSearch, Progress

__all__ = ["DensityEstimator", "Scored", "finite_matrix", "part_of"]

Array = TypeVar("Array")

# Share of repeated rows above which the data are taken for quantised.
_TIES = 0.01
_MANY_DIMENSIONS = 20
# A new point nearer to a datum than this, in units of the data's spread, is that datum: embeddings of the
# same x in batches of different sizes differ by rounding, those of an encoder by that of single precision.
# For a new point that comes so near by chance the datum's estimate is as good as its own.
_SAME = 1e-6


@dataclass(frozen=True)
class Scored(Generic[Array]):
    """Log-densities of points with their errors; arrays from an estimator, tensors from a target.

    Attributes:
        log_density: Nats (of the density per length to the power of the estimator's ``intrinsic_dim``), shape
            ``(M,)``, float64.
        standard_error: Standard error of it in nats, shape ``(M,)``, float64, positive.
    """

    log_density: Array
    standard_error: Array


class DensityEstimator(ABC):
    r"""Log-density of points with a standard error for each.

    A datum's own estimate leaves the datum out. Exact duplicates are put together: the density is estimated
    on the :math:`N_u` different points, and one that stands :math:`m` times gets

    .. math:: \rho = \log \hat p_u + \log m + \log (N_u / N).

    Subclasses give ``kind``, :attr:`options`, :meth:`_fit`, :meth:`_score` and :meth:`_restore`.

    Args:
        jitter: Width of uniform noise added to every coordinate of the data before the fit, in units of
            ``u``: for data on a grid of this step, whose density is that of the noisy data.
        seed: Seed of the noise.

    Attributes:
        points: The data fitted, with their noise, shape ``(N, d)``.
        log_density: Nats, shape ``(N,)``; row i belongs to row i of ``u``.
        standard_error: Nats, shape ``(N,)``.
        intrinsic_dim: D of the density's unit, nats per length to the power D.
        num_duplicates: Number of rows that repeat another.

    Raises:
        ValueError: If ``jitter`` is negative.
    """

    kind: ClassVar[str]
    points: Floats
    log_density: Floats
    standard_error: Floats
    intrinsic_dim: float
    num_duplicates: int

    def __init__(self, jitter: float = 0.0, seed: int = 0) -> None:
        if not 0 <= jitter < np.inf:
            raise ValueError(f"jitter must not be negative, got {jitter}")
        self.jitter, self.seed = float(jitter), seed
        self._search: NeighbourSearch | None = None

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({options})"

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""

    @property
    def fitted(self) -> bool:
        """Whether :meth:`score` can be called."""
        return hasattr(self, "points")

    @property
    def _num_neighbours(self) -> int:
        """Number of nearest data that :meth:`_score` is given for each new point."""
        return 1

    @abstractmethod
    def _fit(self, points: Floats, progress: Progress | None) -> Scored[Floats]:
        """Estimate the density of different points ``(N, d)`` at each, and set ``intrinsic_dim``."""

    @abstractmethod
    def _score(
        self, queries: Floats, near: Neighbours, report: Callable[[int], None] | None
    ) -> Scored[Floats]:
        """Estimate the density at points ``(M, d)`` that are no data, given their nearest data.

        ``report`` is told the number of rows done.
        """

    @abstractmethod
    def _restore(self, points: Floats, state: dict[str, float]) -> None:
        """Put back what :meth:`_fit` and :attr:`state` keep."""

    @property
    def state(self) -> dict[str, float]:
        """Fitted numbers from which, with the points, :meth:`restore` makes a fitted estimator."""
        return {"intrinsic_dim": self.intrinsic_dim}

    def diagnostics(self) -> dict[str, float]:
        """Return what a fit tells about itself beyond the state; empty where there is nothing."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Return kind and options: equal for estimators that do the same."""
        return {"kind": self.kind, **self.options}

    def fit(self, u: NDArray[Any] | Tensor, progress: Progress | None = None) -> Self:
        """Estimate the density of the data at each datum.

        Args:
            u: Data, shape ``(N, d)``, any numeric type.
            progress: Told of the work done.

        Returns:
            Itself, with the attributes set.

        Raises:
            ValueError: If ``u`` is not a finite matrix, has a constant column, too few rows for the settings,
                or repeats more than 1 % of its rows.
        """
        points = finite_matrix("u", u)
        if self.jitter:
            noise = np.random.default_rng(self.seed).random(points.shape)
            points = points + self.jitter * (noise - 0.5)
        dim = points.shape[1]
        constant = np.flatnonzero(points.max(0) == points.min(0)) if len(points) else np.arange(dim)
        if len(constant):
            raise ValueError(
                f"u must vary in every column, got {len(constant)} constant of {dim}, the first number "
                f"{constant[0]}: leave them out, or lower the projection's dim"
            )
        if dim > _MANY_DIMENSIONS:
            warnings.warn(
                f"u has {dim} dimensions: above {_MANY_DIMENSIONS} the error of an estimated log-density is "
                "mostly bias, which standard_error does not know, and its range is compressed",
                stacklevel=2,
            )
        unique = self._hold(points)
        if self.num_duplicates > _TIES * len(points):
            raise ValueError(
                f"u must have at most {_TIES:.0%} repeated rows, got {self.num_duplicates} of {len(points)}: "
                "the data look quantised; pass jitter, the width of a step, or leave the copies out"
            )
        fitted = self._fit(unique, progress)
        shift = np.log(self._counts) + np.log(len(unique) / len(points))
        self.log_density = (fitted.log_density + shift)[self._inverse]
        self.standard_error = fitted.standard_error[self._inverse]
        return self

    def score(self, u_new: NDArray[Any] | Tensor, progress: Progress | None = None) -> Scored[Floats]:
        """Estimate the density of the data fitted at other points.

        A point that is a datum (to 1e-6 of the data's spread) gets the datum's own estimate, which leaves the
        datum out. Far from all data the estimate of a neighbour method saturates at a value much too high.

        Args:
            u_new: Shape ``(M, d)``.
            progress: Told of the work done.

        Raises:
            ValueError: If it has another width than the data, or is not finite.
            RuntimeError: If nothing was fitted.
        """
        search = self._fitted()
        queries = finite_matrix("u_new", u_new)
        if queries.shape[1] != self.points.shape[1]:
            raise ValueError(f"u_new must have {self.points.shape[1]} columns, got {queries.shape[1]}")
        size = len(queries)
        near = search(queries, self._num_neighbours, part_of(progress, 0, 2 * size))
        old = near.radii[:, 0] <= _SAME * np.sqrt(self.points.var(0).sum())
        datum = self._first[near.index[old, 0]]
        log_density, standard_error = np.empty(size), np.empty(size)
        log_density[old], standard_error[old] = self.log_density[datum], self.standard_error[datum]
        if not old.all():
            new = ~old
            some = Neighbours(near.radii[new], near.index[new])
            scored = self._score(queries[new], some, part_of(progress, size, 2 * size))
            # One new point has no multiplicity, but the data are N, not as many as differ.
            log_density[new] = scored.log_density + np.log(len(self._counts) / len(self.points))
            standard_error[new] = scored.standard_error
        if progress is not None:
            progress(2 * size, 2 * size)
        return Scored(log_density, standard_error)

    def restore(
        self, points: Floats, log_density: Floats, standard_error: Floats, state: dict[str, float]
    ) -> Self:
        """Make this a fitted estimator again, from its attributes and :attr:`state`, without a fit."""
        self.log_density, self.standard_error = log_density, standard_error
        self.intrinsic_dim = state["intrinsic_dim"]
        self._restore(self._hold(finite_matrix("points", points)), state)
        return self

    def _hold(self, points: Floats) -> Floats:
        """Keep the data and which of them are the same; return the different ones, ``(N_u, d)``."""
        self.points, self._search = points, None
        _, first, inverse, counts = np.unique(
            points, axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        # Numbered as they first come, not as they are sorted: without duplicates nothing moves.
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        self._first: NDArray[np.int64] = first[order]
        self._inverse: NDArray[np.int64] = rank[inverse.reshape(-1)]
        self._counts: NDArray[np.int64] = counts[order]
        self.num_duplicates = len(points) - len(first)
        return points[self._first] if self.num_duplicates else points

    def _fitted(self) -> NeighbourSearch:
        """The search among the different data, made when it is first needed."""
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__} must be fitted before it scores")
        if self._search is None:
            self._search = NeighbourSearch(self.points[self._first])
        return self._search


def finite_matrix(name: str, value: NDArray[Any] | Tensor) -> Floats:
    """Return ``value`` as a float64 matrix, with zeros of one sign, or say what is wrong with it."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim != 2 or array.shape[1] < 1:
        raise ValueError(f"{name} must have shape (N, d) with d at least 1, got {array.shape}")
    matrix: Floats = np.ascontiguousarray(array, dtype=np.float64) + 0.0
    odd = np.flatnonzero(~np.isfinite(matrix).all(1))
    if len(odd):
        raise ValueError(
            f"{name} must be finite, got nan or inf in {len(odd)} of {len(matrix)} rows, first in {odd[0]}"
        )
    return matrix


def part_of(progress: Progress | None, before: int, total: int) -> Callable[[int], None] | None:
    """Progress of one part of the work, as a function of the units done in it."""
    if progress is None:
        return None
    told = progress
    return lambda done: told(before + done, total)
