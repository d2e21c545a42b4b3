r"""Streaming statistics of an autoencoder's codes (X-VAE, arXiv:2607.01275v1; merging: Chan et al. 1983;
higher moments: Pebay 2008, SAND2008-6212).
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

__all__ = ["CodeScale", "CodeShift", "CodeStats", "CovarianceFactor", "collect_codes"]

# A normal's median absolute deviation times this is its standard deviation.
_MAD_TO_STD = 1.4826
# Standardised gap or log-ratio between training and held-out codes that is worth a warning.
_LARGE_SHIFT = 0.2
_SUMS = ("mean", "m2", "m3", "m4", "min", "max")


@dataclass(frozen=True)
class CodeScale:
    """Location and floored scale of each code dimension.

    Attributes:
        loc: Mean, or median, shape ``(z_dim,)``.
        scale: Standard deviation, or 1.4826 times the median absolute deviation, at least ``floor``.
        floor: The smallest scale allowed.
        dead: Which dimensions were lifted to the floor, bool, shape ``(z_dim,)``.
    """

    loc: Tensor
    scale: Tensor
    floor: float
    dead: Tensor


@dataclass(frozen=True)
class CovarianceFactor:
    """A Cholesky factor of the code covariance and what it took to get it.

    Attributes:
        scale_tril: Lower triangular, shape ``(z_dim, z_dim)``.
        shrinkage: Share r of the diagonal in :math:`(1 - r) C + r \\, \\mathrm{diag}\\, C`.
        jitter: Relative amount added to every variance.
        condition: Condition number of the covariance that was factorised.
    """

    scale_tril: Tensor
    shrinkage: float
    jitter: float
    condition: float


@dataclass(frozen=True)
class CodeShift:
    """How held-out codes differ from those of the training set, dimension by dimension.

    Attributes:
        mean_gap: Difference of the means in units of the training scale, shape ``(z_dim,)``.
        log_std_ratio: Logarithm of the ratio of standard deviations, shape ``(z_dim,)``.
        largest: Largest absolute value of the two.
    """

    mean_gap: Tensor
    log_std_ratio: Tensor
    largest: float


class CodeStats:
    r"""Moments, range and a random subset of codes, gathered batch by batch.

    With batch mean :math:`m_b`, centred second moment :math:`M_b` and :math:`\delta = m_b - m`,

    .. math:: m' = m + \delta \, n_b / n', \qquad M' = M + M_b + \delta \delta^\top \, n n_b / n'

    in double precision whatever the codes' type: :math:`E[a^2] - E[a]^2` in single precision loses the
    variance entirely where means are large. Merging is associative and does not depend on the order (to
    rounding), so shards can be gathered apart.

    The ``max_codes`` codes that are kept raw are those with the smallest hash of their datum's index (of
    their own bytes where no index is given): a random subset that depends neither on order nor on shards,
    and of which any first part is one too.

    Args:
        z_dim: Number of code dimensions.
        covariance: ``"full"`` also gathers the covariance between dimensions.
        max_codes: Most raw codes kept.
        floor_abs: Least scale of a dimension, in units of the codes.
        floor_rel: Least scale relative to the median scale over dimensions.

    Attributes:
        n: Number of codes seen.
        min: Least code in each dimension, shape ``(z_dim,)``.
        max: Largest code in each dimension, shape ``(z_dim,)``.

    Raises:
        ValueError: If a size or a floor is not positive, or ``covariance`` is unknown.

    Example:
        >>> stats = CodeStats(2)
        >>> stats.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> stats.mean.tolist(), stats.var.tolist()
        ([1.0, 1.0], [2.0, 0.0])
    """

    def __init__(
        self,
        z_dim: int,
        covariance: Literal["diag", "full"] = "diag",
        max_codes: int = 10_000,
        floor_abs: float = 1e-4,
        floor_rel: float = 1e-2,
    ) -> None:
        if z_dim < 1 or max_codes < 1:
            raise ValueError(f"z_dim and max_codes must be positive, got {z_dim} and {max_codes}")
        if covariance not in ("diag", "full"):
            raise ValueError(f"covariance must be 'diag' or 'full', got {covariance!r}")
        if not (floor_abs > 0 and floor_rel > 0):
            raise ValueError(f"floor_abs and floor_rel must be positive, got {floor_abs} and {floor_rel}")
        self.z_dim, self.covariance, self.max_codes = z_dim, covariance, max_codes
        self.floor_abs, self.floor_rel = floor_abs, floor_rel
        self.n = 0
        zeros = torch.zeros(z_dim, dtype=torch.float64)
        self._mean, self._m3, self._m4 = zeros, zeros, zeros
        self._m2 = torch.diag(zeros) if covariance == "full" else zeros
        self.min, self.max = zeros + math.inf, zeros - math.inf
        self._codes = torch.empty(0, z_dim, dtype=torch.float64)
        self._keys = torch.empty(0, dtype=torch.int64)
        self._warned = False

    def __repr__(self) -> str:
        return f"CodeStats(n={self.n}, z_dim={self.z_dim}, {self.covariance}, {len(self._codes)} codes kept)"

    def update(self, codes: Tensor, index: Tensor | None = None) -> None:
        """Add a batch of codes.

        Args:
            codes: Shape ``(B, z_dim)``, any floating type, any device.
            index: Number of each datum, shape ``(B,)``, int64, different for different data.

        Raises:
            ValueError: If a shape does not fit or a code is not finite; nothing is added then.
        """
        if codes.ndim != 2 or codes.shape[1] != self.z_dim:
            raise ValueError(f"codes must have shape (B, {self.z_dim}), got {tuple(codes.shape)}")
        if index is not None and (index.shape != codes.shape[:1] or index.dtype != torch.int64):
            raise ValueError(
                f"index must be int64 of shape ({len(codes)},), got {index.dtype} of shape "
                f"{tuple(index.shape)}"
            )
        wide = codes.detach().cpu().double()
        odd = (~wide.isfinite()).any(1).nonzero().squeeze(1)
        if len(odd):
            first = int(odd[0] if index is None else index[int(odd[0])])
            raise ValueError(
                f"codes must be finite, got nan or inf in {len(odd)} of {len(wide)} codes, first in that of "
                f"datum {first}"
            )
        if len(wide) == 0:
            return
        batch = CodeStats(self.z_dim, self.covariance, self.max_codes)
        batch.n, batch._mean = len(wide), wide.mean(0)
        centred = wide - batch._mean
        # The mean of large numbers is itself rounded: centring twice removes what is left of it.
        rest = centred.mean(0)
        batch._mean, centred = batch._mean + rest, centred - rest
        batch._m2 = centred.mT @ centred if self.covariance == "full" else centred.square().sum(0)
        batch._m3, batch._m4 = centred.pow(3).sum(0), centred.pow(4).sum(0)
        batch.min, batch.max = wide.amin(0), wide.amax(0)
        batch._codes, batch._keys = wide, _hash(wide, None if index is None else index.cpu())
        self._absorb(batch)

    def merge(self, other: "CodeStats") -> "CodeStats":
        """Return the statistics of both sets of codes together; neither is changed.

        Raises:
            ValueError: If the two do not gather the same things.
        """
        ours, theirs = ((s.z_dim, s.covariance, s.max_codes, s.floor_abs, s.floor_rel) for s in (self, other))
        if ours != theirs:
            raise ValueError(
                "other must have the same z_dim, covariance, max_codes, floor_abs and floor_rel, "
                f"got {theirs} for {ours}"
            )
        merged = CodeStats(*ours)
        merged._absorb(self)
        merged._absorb(other)
        return merged

    @property
    def mean(self) -> Tensor:
        """Mean, float64, shape ``(z_dim,)``."""
        self._check_count(1)
        return self._mean

    @property
    def var(self) -> Tensor:
        """Variance with divisor n - 1, float64, shape ``(z_dim,)``."""
        self._check_count(2)
        return self._squares / (self.n - 1)

    @property
    def std(self) -> Tensor:
        """Standard deviation, without floors, float64, shape ``(z_dim,)``."""
        return self.var.sqrt()

    @property
    def cov(self) -> Tensor:
        """Covariance with divisor n - 1, float64, shape ``(z_dim, z_dim)``.

        Raises:
            ValueError: If only variances were gathered.
        """
        self._check_count(2)
        if self.covariance != "full":
            raise ValueError("cov needs statistics gathered with covariance='full', got 'diag'")
        return self._m2 / (self.n - 1)

    @property
    def kurtosis(self) -> Tensor:
        """Excess kurtosis (0 for a normal, large where there are outliers), shape ``(z_dim,)``.

        Zero in a dimension that does not vary.
        """
        self._check_count(2)
        squares = self._squares
        ratio = self.n * self._m4 / squares.square().clamp(min=torch.finfo(torch.float64).tiny)
        return torch.where(squares > 0, ratio - 3, 0.0)

    @property
    def codes(self) -> Tensor:
        """The raw codes kept, in the random order of their hashes, shape ``(min(n, max_codes), z_dim)``."""
        return self._codes

    def scale(self, robust: bool = False) -> CodeScale:
        """Return location and scale of each dimension, floored; the first time a floor is needed it warns.

        Args:
            robust: Median and 1.4826 times the median absolute deviation of the codes kept, which
                outliers do not inflate, in place of mean and standard deviation.

        Raises:
            ValueError: If there are fewer than two codes.
        """
        self._check_count(2)
        if robust:
            loc = _median(self._codes)
            std = _MAD_TO_STD * _median((self._codes - loc).abs())
        else:
            loc, std = self._mean, self.std
        floor = max(self.floor_abs, self.floor_rel * float(std.median()))
        dead = std < floor
        if dead.any() and not self._warned:
            self._warned = True
            figures = ", ".join(f"{j} ({float(std[j]):.2g})" for j in dead.nonzero().squeeze(1).tolist())
            warnings.warn(
                f"{int(dead.sum())} of {self.z_dim} code dimensions hardly vary; their scale is lifted to "
                f"{floor:.3g}: {figures}",
                stacklevel=2,
            )
        return CodeScale(loc, std.clamp(min=floor), floor, dead)

    def factor(self, shrinkage: float = 1e-3, robust: bool = False) -> CovarianceFactor:
        r"""Factorise the covariance, shrunk towards its diagonal and jittered until that succeeds.

        The jitter is relative to each variance, from 1e-6 upwards by factors of ten, so that dimensions of
        different units are treated alike. Dimensions on the floor keep the floor and no correlation.

        Args:
            shrinkage: Share r of the diagonal, in [0, 1].
            robust: Put the correlations between scales from the median absolute deviation.

        Raises:
            ValueError: If only variances were gathered, or ``shrinkage`` is not in [0, 1].
        """
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
        cov, scale = self.cov, self.scale(robust)
        live = torch.where(scale.dead, 0.0, 1.0)
        std = cov.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        correlation = cov / std / std[:, None] * live * live[:, None]
        correlation = (1 - shrinkage) * correlation
        correlation.diagonal().fill_(1.0)
        eye = torch.eye(self.z_dim, dtype=torch.float64)
        jitter, info = 1e-7, 1
        while info:  # ends: no eigenvalue of a correlation matrix is below zero by more than rounding
            jitter *= 10
            matrix = correlation + jitter * eye
            tril, failed = torch.linalg.cholesky_ex(matrix)
            info = int(failed)
        covariance = scale.scale[:, None] * matrix * scale.scale
        condition = float(torch.linalg.cond(covariance))
        return CovarianceFactor(scale.scale[:, None] * tril, shrinkage, jitter, condition)

    def compare(self, other: "CodeStats") -> CodeShift:
        """Compare with the codes of other data, such as the validation part; warn where they differ.

        An autoencoder that has overfitted gives held-out data other codes than those its prior is made of.

        Args:
            other: Statistics of held-out codes.

        Raises:
            ValueError: If ``z_dim`` differs, or either has fewer than two codes.
        """
        if other.z_dim != self.z_dim:
            raise ValueError(f"other must have z_dim {self.z_dim}, got {other.z_dim}")
        other._check_count(2)
        here = self.scale()
        gap = (other.mean - self.mean) / here.scale
        ratio = (other.std.clamp(min=here.floor) / here.scale).log()
        largest = float(torch.maximum(gap.abs(), ratio.abs()).max())
        if largest > _LARGE_SHIFT:
            j = int(torch.maximum(gap.abs(), ratio.abs()).argmax())
            warnings.warn(
                f"held-out codes differ from those of training by {largest:.2f} > {_LARGE_SHIFT} in "
                f"dimension {j} (standardised mean gap {float(gap[j]):.2f}, log std ratio "
                f"{float(ratio[j]):.2f}): the autoencoder may have overfitted",
                stacklevel=2,
            )
        return CodeShift(gap, ratio, largest)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return everything as a plain dict of tensors, which safetensors can store."""
        sums = {name: getattr(self, name if name in ("min", "max") else f"_{name}") for name in _SUMS}
        return {
            **{name: tensor.clone().contiguous() for name, tensor in sums.items()},
            "codes": self._codes.clone().contiguous(),
            "keys": self._keys.clone(),
            "counts": torch.tensor([self.n, self.max_codes]),
            "floors": torch.tensor([self.floor_abs, self.floor_rel], dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild from what :meth:`to_tensors` returned.

        Raises:
            ValueError: If a tensor is missing.
        """
        missing = [name for name in (*_SUMS, "codes", "keys", "counts", "floors") if name not in tensors]
        if missing:
            raise ValueError(f"tensors must hold all that to_tensors returns, {missing[0]!r} is missing")
        kind: Literal["diag", "full"] = "full" if tensors["m2"].ndim == 2 else "diag"
        n, max_codes = tensors["counts"].tolist()
        stats = cls(len(tensors["mean"]), kind, max_codes, *tensors["floors"].tolist())
        stats.n = n
        for name in _SUMS:
            setattr(stats, name if name in ("min", "max") else f"_{name}", tensors[name].clone())
        stats._codes, stats._keys = tensors["codes"].clone(), tensors["keys"].clone()
        return stats

    @property
    def _squares(self) -> Tensor:
        return self._m2.diagonal() if self.covariance == "full" else self._m2

    def _check_count(self, least: int) -> None:
        if self.n < least:
            raise ValueError(f"code statistics need at least {least} codes, got {self.n}")

    def _absorb(self, other: "CodeStats") -> None:
        """Add ``other`` in place."""
        if other.n == 0:
            return
        a, b, n = self.n, other.n, self.n + other.n
        delta = other._mean - self._mean
        squares, theirs = self._squares, other._squares
        self._m4 = (
            self._m4
            + other._m4
            + delta**4 * (a * b * (a * a - a * b + b * b) / n**3)
            + 6 * delta**2 * (a * a * theirs + b * b * squares) / n**2
            + 4 * delta * (a * other._m3 - b * self._m3) / n
        )
        self._m3 = (
            self._m3
            + other._m3
            + delta**3 * (a * b * (a - b) / n**2)
            + 3 * delta * (a * theirs - b * squares) / n
        )
        outer = torch.outer(delta, delta) if self.covariance == "full" else delta.square()
        self._m2 = self._m2 + other._m2 + outer * (a * b / n)
        self._mean = self._mean + delta * (b / n)
        self.n = n
        self.min, self.max = torch.minimum(self.min, other.min), torch.maximum(self.max, other.max)
        keys = torch.cat([self._keys, other._keys])
        order = keys.argsort(stable=True)[: self.max_codes]
        self._keys, self._codes = keys[order], torch.cat([self._codes, other._codes])[order]


class _Split(Protocol):
    """What :func:`collect_codes` asks of a part of a data set."""

    @property
    def fits_device(self) -> bool: ...

    @property
    def positions(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice) -> Any: ...

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, drop_last: bool, shuffle: bool
    ) -> Iterator[Any]: ...


def collect_codes(
    encoder: nn.Module,
    split: _Split,
    batch_size: int = 1000,
    *,
    covariance: Literal["diag", "full"] = "full",
    max_codes: int = 10_000,
) -> CodeStats:
    """Pass data through an encoder and gather the statistics of their codes.

    The encoder runs in evaluation mode, without gradients, on its own device, and is left in the modes it
    had. Data in memory are those that are evaluated (a training part's dynamic binarisation is not drawn
    anew); streamed data come in order, their noise seeded. Two passes give the same statistics.

    Args:
        encoder: Maps ``x`` ``(B, *x_shape)`` to the code, or to a tuple whose first entry is the code (the
            location of a Gaussian encoder), shape ``(B, z_dim)``.
        split: Part of a data set; for a prior the training part, as codes of held-out data would leak
            into it.
        batch_size: Data per pass of the encoder.
        covariance: As in :class:`CodeStats`.
        max_codes: As in :class:`CodeStats`.

    Returns:
        The statistics, the data's positions as their index.

    Raises:
        ValueError: If ``batch_size`` is not positive or a code is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    stats: CodeStats | None = None
    with _evaluating(encoder), torch.no_grad():
        for x, index in _data(split, batch_size):
            out = encoder(x.to(device))
            codes = out if isinstance(out, Tensor) else out[0]
            stats = stats or CodeStats(codes.shape[-1], covariance, max_codes)
            stats.update(codes, index)
    assert stats is not None
    return stats


def _data(split: _Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield data as evaluated and their positions in the whole part, in order."""
    if split.fits_device:
        for start in range(0, len(split), batch_size):
            part = split[start : start + batch_size]
            yield part.x, part.positions
        return
    positions = split.positions
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        for batch in split.batches(batch_size, seed=0, epoch=0, drop_last=False, shuffle=False):
            yield batch.x, positions[batch.index.cpu()]


@contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    """Switch batch normalisation and dropout off, and give every module its own mode back."""
    modes = {module: module.training for module in encoder.modules()}
    try:
        encoder.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _median(x: Tensor) -> Tensor:
    """Median of each column: torch's is the lower of the two in the middle."""
    return 0.5 * (x.median(0).values - (-x).median(0).values)


def _hash(codes: Tensor, index: Tensor | None) -> Tensor:
    """Pseudorandom int64 of each datum: of its index, or of its code's bytes."""
    if index is not None:
        return _mix(index)
    # -0.0 and 0.0 are one code.
    words = (codes + 0.0).view(torch.int64)
    key = torch.zeros(len(codes), dtype=torch.int64)
    for column in words.unbind(1):
        key = _mix(key ^ column)
    return key


def _mix(key: Tensor) -> Tensor:
    """SplitMix64 (Steele et al. 2014); int64 arithmetic wraps around as its unsigned integers do."""
    key = key + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ _shift_right(key, shift)) * _signed(factor)
    return key ^ _shift_right(key, 31)


def _shift_right(key: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own drags the sign bit along."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
