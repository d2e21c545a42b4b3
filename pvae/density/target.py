"""The log-density of training data with its errors, as alignment takes it; made once, kept in one file."""

import copy
import hashlib
import json
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from pvae.files import write_atomically

from .estimator import DensityEstimator, Scored
from .kde import KDE
from .neighbours import Floats, Progress
from .pak import KStar, PAk
from .projection import IdentityProjection, PCAProjection, Projection, RandomProjection, flat
from .report import DensityReport

__all__ = ["ESTIMATORS", "DensityTarget"]

ESTIMATORS: dict[str, type[DensityEstimator]] = {kind.kind: kind for kind in (PAk, KStar, KDE)}
"""Estimators by their name in a recipe."""

_PROJECTIONS: dict[str, type[Projection]] = {
    kind.kind: kind for kind in (PCAProjection, RandomProjection, IdentityProjection)
}
_KEY = "pvae.DensityTarget"
# Enters every cache key: moves when the same options come to give other numbers.
_VERSION = 1


@dataclass(eq=False)
class DensityTarget:
    r"""What each training datum's log-density is, and how sure that is.

    Estimated by :meth:`fit` on an embedding :math:`u_i` of the data, or given by :meth:`known`. The values
    are in nats per length of ``u`` to the power ``intrinsic_dim``: scaling the data by c moves all of them by
    :math:`-D \log c`.

    Args:
        log_density: Nats, shape ``(N,)``; row i belongs to training datum i.
        standard_error: Nats, shape ``(N,)``, positive.
        embedding: The data in which the density was estimated, shape ``(N, d)``.
        projection: Maps data to the embedding.
        estimator: Scores new embeddings; need not be fitted where ``notes`` hold its state.
        notes: How the target was made, as JSON can hold it.

    All tensors are kept on the CPU in double precision.

    Raises:
        ValueError: If shapes do not fit, a value is not finite or an error is not positive.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((500, 2))
        >>> target = DensityTarget.fit(x, estimator="kstar", max_neighbors=50)
        >>> target.log_density.shape, target.embedding.shape
        (torch.Size([500]), torch.Size([500, 2]))
    """

    log_density: Tensor
    standard_error: Tensor
    embedding: Tensor | None = None
    projection: Projection | None = None
    estimator: DensityEstimator | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log_density, self.standard_error = _wide(self.log_density), _wide(self.standard_error)
        shape = tuple(self.log_density.shape)
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(f"log_density must have shape (N,) with N at least 1, got {shape}")
        if self.standard_error.shape != self.log_density.shape:
            raise ValueError(
                f"standard_error must have shape {shape}, got {tuple(self.standard_error.shape)}"
            )
        if not self.log_density.isfinite().all():
            odd = int((~self.log_density.isfinite()).sum())
            raise ValueError(f"log_density must be finite, got nan or inf in {odd} of {shape[0]} data")
        if not (self.standard_error.isfinite() & (self.standard_error > 0)).all():
            least = float(self.standard_error.min())
            raise ValueError(f"standard_error must be positive and finite, got values from {least:.4g}")
        if self.embedding is not None:
            self.embedding = _wide(self.embedding)
            if self.embedding.ndim != 2 or len(self.embedding) != shape[0]:
                raise ValueError(
                    f"embedding must have shape ({shape[0]}, d), got {tuple(self.embedding.shape)}"
                )

    def __len__(self) -> int:
        return len(self.log_density)

    def __repr__(self) -> str:
        return f"DensityTarget({len(self)} data, {self.notes.get('estimator', {}).get('kind', 'known')})"

    @property
    def intrinsic_dim(self) -> float | None:
        """D of the unit, nats per length to the power D; ``None`` for a known density."""
        return self.notes.get("state", {}).get("intrinsic_dim")

    @classmethod
    def fit(
        cls,
        x_train: Tensor | NDArray[Any],
        *,
        dim: int = 10,
        estimator: str | DensityEstimator = "pak",
        projection: str | Projection = "pca",
        cache: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """Project training data and estimate their density.

        Args:
            x_train: Training data, in the order in which batches count them, shape ``(N, *x_shape)``. Its
                units are those of the density.
            dim: Width of the embedding; data of no more dimensions are taken as they are.
            estimator: ``"pak"``, ``"kstar"``, ``"kde"`` or an estimator, of which a copy is fitted.
            projection: ``"pca"``, ``"random"``, ``"identity"`` or a projection, of which a copy is fitted
                and which has a ``dim`` of its own.
            cache: Folder of targets made before, found again by the content of the data and all settings.
            progress: Told of the work done.
            **options: Arguments of a named estimator.

        Raises:
            TypeError: If an option is unknown, or belongs to an estimator given as an object.
            ValueError: If a name is unknown, or the data cannot be estimated (see :class:`DensityEstimator`).
        """
        width = flat(x_train).shape[1]
        maker = _projection(projection, dim, width)
        judge = _estimator(estimator, options)
        digest = _digest_of(x_train)
        path = None
        if cache is not None:
            made_from = {
                "version": _VERSION,
                "data": digest,
                "projection": maker.describe(),
                "estimator": judge.describe(),
            }
            key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
            path = Path(cache).expanduser() / f"density-{key[:16]}.safetensors"
            if path.exists():
                try:
                    return cls.load(path, projection=maker, estimator=judge)
                except ValueError as error:
                    warnings.warn(f"the cached density is made again: {error}", stacklevel=2)
        judge.fit(_merged(x_train, maker.fit(x_train)(x_train)), progress)
        notes = {
            "data": digest,
            "projection": maker.describe(),
            "estimator": judge.describe(),
            "state": judge.state,
            "num_duplicates": judge.num_duplicates,
            "diagnostics": judge.diagnostics(),
        }
        target = cls(
            torch.from_numpy(judge.log_density),
            torch.from_numpy(judge.standard_error),
            torch.from_numpy(judge.points),
            maker,
            judge,
            notes,
        )
        if path is not None:
            target.save(path)
        return target

    @classmethod
    def known(
        cls,
        log_density: Tensor,
        standard_error: Tensor | float = 1e-3,
        embedding: Tensor | None = None,
    ) -> Self:
        """Take an exact density ("oracle"), or one estimated elsewhere.

        Args:
            log_density: Nats, shape ``(N,)``.
            standard_error: Nats, shape ``(N,)`` or one for all, positive.
            embedding: Coordinates whose density it is, shape ``(N, d)``; a flow needs them.

        Raises:
            ValueError: As :class:`DensityTarget`.
        """
        error = torch.as_tensor(standard_error, dtype=torch.float64)
        if error.ndim == 0:
            error = error.expand(log_density.shape)
        return cls(log_density, error, embedding, notes={"estimator": {"kind": "known"}})

    def log_prob(self, x_new: Tensor | NDArray[Any], progress: Progress | None = None) -> Scored[Tensor]:
        """Estimate the density of the training data at other data, projected as they were.

        Args:
            x_new: Shape ``(M, *x_shape)``.
            progress: Told of the work done.

        Returns:
            Log-densities and errors, ``(M,)``; a training datum gets its own target. Neighbour estimates
            saturate far from the data: they are no score of how far off a datum is.

        Raises:
            ValueError: If the target has no projection or estimator: a known density, or one loaded without
                the encoder or the estimator of its user.
        """
        if self.projection is None or self.estimator is None or self.embedding is None:
            missing = "projection" if self.projection is None else "estimator"
            raise ValueError(
                f"new data need the target's {missing}, which {self!r} does not have: fit it, or pass "
                f"{missing} to load"
            )
        if not self.estimator.fitted:
            self._restore_estimator()
        scored = self.estimator.score(self.projection(x_new), progress)
        return Scored(torch.from_numpy(scored.log_density), torch.from_numpy(scored.standard_error))

    def report(self) -> DensityReport:
        """Summarise values, errors and how they came about; ``str()`` of it is a short text."""
        rho, precision = self.log_density, self.standard_error.pow(-2)
        heavy = precision.topk(max(1, math.ceil(0.01 * len(rho)))).values.sum() / precision.sum()
        low, high = torch.from_numpy(np.quantile(rho.numpy(), [0.01, 0.99])).tolist()
        median, error_high = np.quantile(self.standard_error.numpy(), [0.5, 0.95]).tolist()
        embedding = self.embedding
        return DensityReport(
            estimator=self.notes.get("estimator", {"kind": "known"}),
            projection=self.notes.get("projection", {}),
            num_data=len(self),
            num_duplicates=self.notes.get("num_duplicates", 0),
            dim=None if embedding is None else embedding.shape[1],
            intrinsic_dim=self.intrinsic_dim,
            explained=getattr(self.projection, "explained", None),
            log_scale=None if embedding is None else float(embedding.std(0, correction=0).log().sum()),
            mean=float(rho.mean()),
            std=float(rho.std(correction=0)),
            low=low,
            high=high,
            error_median=median,
            error_high=error_high,
            heavy_share=float(heavy),
            diagnostics=self.notes.get("diagnostics", {}),
        )

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of the content: equal for equal targets."""
        return _digest_of_content(self._header(), self._tensors())[:12]

    def describe(self) -> dict[str, Any]:
        """Return what a run must say of its target, as JSON can hold it."""
        return {
            "estimator": self.notes.get("estimator", {"kind": "known"}),
            "projection": self.notes.get("projection"),
            "data": self.notes.get("data"),
            "num_data": len(self),
            "dim": None if self.embedding is None else self.embedding.shape[1],
            "intrinsic_dim": self.intrinsic_dim,
            "hash": self.hash,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything but an encoder to one safetensors file, notes as JSON in its header.

        A neighbour estimator's search is not stored: after a load it is done again when new data are first
        scored.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = self._tensors()
        header = {_KEY: self._header(), "sha256": _digest_of_content(self._header(), tensors)}
        write_atomically(path, to_bytes(tensors, header))
        return path

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        projection: Projection | None = None,
        estimator: DensityEstimator | None = None,
    ) -> Self:
        """Read a target back and check its content; nothing is unpickled.

        Args:
            path: A file written by :meth:`save`.
            projection: The projection, where it is a :class:`CodeProjection` or the user's own.
            estimator: The estimator, where it is the user's own.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is something else or damaged, or what is given is not what was saved.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except SafetensorError as error:
            raise ValueError(f"path must be a safetensors file, but {path} is not: {error}") from None
        if _KEY not in header:
            raise ValueError(f"path must hold a target written by save, got {path}")
        if _digest_of_content(header[_KEY], tensors) != header.get("sha256"):
            raise ValueError(f"{path} is damaged: its content does not have the checksum written with it")
        try:
            return cls._rebuilt_from(tensors, json.loads(header[_KEY]), projection, estimator)
        # A checksum can be made by anyone: what is not as save writes it fails in any of these ways.
        except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{path} holds no target as save writes it: {error!r:.200}") from None

    @classmethod
    def _rebuilt_from(
        cls,
        tensors: dict[str, Tensor],
        notes: dict[str, Any],
        projection: Projection | None,
        estimator: DensityEstimator | None,
    ) -> Self:
        state = {
            name.removeprefix("projection."): tensors[name].numpy()
            for name in tensors
            if name.startswith("projection.")
        }
        target = cls(
            tensors["log_density"],
            tensors["standard_error"],
            tensors.get("embedding"),
            _rebuilt("projection", projection, notes.get("projection"), _PROJECTIONS),
            _rebuilt("estimator", estimator, notes.get("estimator"), ESTIMATORS),
            notes,
        )
        if target.projection is not None:
            target.projection.restore(state)
        if target.estimator is not None and target.estimator.fitted:  # on whatever its user had
            target._restore_estimator()
        return target

    def _restore_estimator(self) -> None:
        assert self.estimator is not None
        if self.embedding is None:
            raise KeyError("embedding")
        self.estimator.restore(
            self.embedding.numpy(),
            self.log_density.numpy(),
            self.standard_error.numpy(),
            self.notes["state"],
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"log_density": self.log_density, "standard_error": self.standard_error}
        if self.embedding is not None:
            tensors["embedding"] = self.embedding
        state = {} if self.projection is None else self.projection.state
        return tensors | {f"projection.{name}": torch.tensor(array) for name, array in state.items()}

    def _header(self) -> str:
        return json.dumps(self.notes, sort_keys=True)


def _wide(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64).contiguous()


def _projection(projection: str | Projection, dim: int, width: int) -> Projection:
    if isinstance(projection, Projection):
        return copy.copy(projection)
    if projection not in _PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(_PROJECTIONS)}, got {projection!r}")
    if projection == "identity" or dim >= width:
        return IdentityProjection()
    return PCAProjection(dim) if projection == "pca" else RandomProjection(dim)


def _estimator(estimator: str | DensityEstimator, options: dict[str, Any]) -> DensityEstimator:
    if isinstance(estimator, DensityEstimator):
        if options:
            raise TypeError(f"options belong to an estimator given by its name, got {', '.join(options)}")
        return copy.copy(estimator)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    return ESTIMATORS[estimator](**options)


def _rebuilt(name: str, given: Any, saved: dict[str, Any] | None, known: dict[str, Any]) -> Any:
    """The part that was saved: as given, if it is the same, else from its options, if its kind is ours."""
    if given is not None:
        if given.describe() != saved:
            raise ValueError(f"{name} must be the one that was saved, {saved}, got {given.describe()}")
        return copy.copy(given)
    if saved is None or saved["kind"] not in known:
        return None
    return known[saved["kind"]](**{key: value for key, value in saved.items() if key != "kind"})


def _merged(x: Tensor | NDArray[Any], u: Floats) -> Floats:
    """Give equal data equal embeddings: products of matrices round a row differently in different places."""
    rows = flat(x)
    array = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else rows
    first: dict[bytes, int] = {}
    origin = [
        first.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), i)
        for i, row in enumerate(array)
    ]
    return u if len(first) == len(origin) else u[origin]


def _digest_of(x: Tensor | NDArray[Any]) -> str:
    """Digest of shape, type and content of the data."""
    array = np.ascontiguousarray(x.detach().cpu().numpy() if isinstance(x, Tensor) else x)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()


def _digest_of_content(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
