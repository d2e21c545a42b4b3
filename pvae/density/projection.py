"""Maps from data to the few numbers in which their density is estimated, fitted on training data only."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .neighbours import Floats

__all__ = ["CodeProjection", "IdentityProjection", "PCAProjection", "Projection", "RandomProjection", "flat"]

_ROWS = 4096
# Variance of a principal component, relative to the first, that is rounding.
_RANK = 1e-12


class Projection(ABC):
    """A map from data ``(N, *x_shape)`` to embeddings ``(N, d)``, float64.

    Subclasses give ``kind``, :meth:`fit`, :meth:`__call__` and :attr:`options`; those with fitted arrays also
    :attr:`state` and :meth:`restore`.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""

    @property
    def state(self) -> dict[str, Floats]:
        """Fitted arrays; empty where there are none."""
        return {}

    @abstractmethod
    def fit(self, x: Tensor | NDArray[Any]) -> Self:
        """Fit on training data, shape ``(N, *x_shape)``."""

    @abstractmethod
    def __call__(self, x: Tensor | NDArray[Any]) -> Floats:
        """Embed data ``(N, *x_shape)`` as ``(N, d)``."""

    def restore(self, state: dict[str, Floats]) -> Self:
        """Put fitted arrays back."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return kind and options: equal for projections that, fitted on the same data, do the same."""
        return {"kind": self.kind, **self.options}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({options})"


class IdentityProjection(Projection):
    """Flatten each datum: for data of few dimensions."""

    kind: ClassVar[str] = "identity"

    @property
    def options(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def fit(self, x: Tensor | NDArray[Any]) -> Self:
        """Do nothing."""
        return self

    def __call__(self, x: Tensor | NDArray[Any]) -> Floats:
        """Return ``x`` as ``(N, d)``."""
        return np.concatenate(list(_parts(x)))


class _LinearProjection(Projection):
    """Project on the orthonormal columns of a matrix, ``(x - loc) @ components``.

    Attributes:
        loc: Shape ``(x_dim,)``.
        components: Orthonormal, shape ``(x_dim, d)``.
    """

    loc: Floats
    components: Floats

    @property
    def state(self) -> dict[str, Floats]:
        """Location and components."""
        return {"loc": self.loc, "components": self.components}

    def restore(self, state: dict[str, Floats]) -> Self:
        """Put location and components back."""
        self.loc, self.components = state["loc"], state["components"]
        return self

    def __call__(self, x: Tensor | NDArray[Any]) -> Floats:
        """Embed data ``(N, *x_shape)`` as ``(N, d)``.

        Raises:
            ValueError: If the data have another size than those fitted, or are not finite.
            RuntimeError: If nothing was fitted.
        """
        if not hasattr(self, "components"):
            raise RuntimeError(f"{type(self).__name__} must be fitted before it is called")
        _check_width(x, len(self.loc))
        return np.concatenate([(part - self.loc) @ self.components for part in _parts(x)])


class PCAProjection(_LinearProjection):
    r"""Scores on the leading principal components of the training data, not whitened.

    Each component's entry of largest size is positive, so that signs do not depend on the machine. Time grows
    as :math:`N P^2 + P^3` with the size P of a datum, memory as :math:`8 P^2` bytes (5 MB and a second for
    60,000 images of 784 pixels); the data are passed over in chunks.

    Args:
        dim: Number of components d.

    Attributes:
        explained: Share of the variance that the components keep.

    Raises:
        ValueError: If ``dim`` is not positive.
    """

    kind: ClassVar[str] = "pca"

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self.dim = dim

    @property
    def options(self) -> dict[str, Any]:
        """The number of components."""
        return {"dim": self.dim}

    @property
    def state(self) -> dict[str, Floats]:
        """Location, components and the share they keep, shape ``(1,)``."""
        return {**super().state, "explained": np.array([self.explained])}

    def restore(self, state: dict[str, Floats]) -> Self:
        """Put location, components and their share back."""
        self.explained = float(state["explained"][0])
        return super().restore(state)

    def fit(self, x: Tensor | NDArray[Any]) -> Self:
        """Find the components.

        Raises:
            ValueError: If the data do not vary in ``dim`` directions, or are not finite.
        """
        from scipy.linalg import eigh

        size, width = flat(x).shape
        if size < 2:
            raise ValueError(f"x must hold at least 2 data, got {size}")
        self.loc = sum((part.sum(0) for part in _parts(x)), np.zeros(width)) / size
        covariance = np.zeros((width, width))
        for part in _parts(x):
            part -= self.loc
            covariance += part.T @ part
        covariance /= size - 1
        values, vectors = eigh(covariance, overwrite_a=True)
        rank = int((values > _RANK * max(float(values[-1]), 0.0)).sum())
        if self.dim > rank:
            raise ValueError(f"dim must be at most {rank}, the directions in which x varies, got {self.dim}")
        self.explained = float(values[-self.dim :].sum() / values.sum())
        self.components = _signed(vectors[:, : -self.dim - 1 : -1])
        return self


class RandomProjection(_LinearProjection):
    """Coordinates along random orthonormal directions, which no datum has a part in.

    Args:
        dim: Number of directions d.
        seed: Seed of the directions.

    Raises:
        ValueError: If ``dim`` is not positive.
    """

    kind: ClassVar[str] = "random"

    def __init__(self, dim: int, seed: int = 0) -> None:
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self.dim, self.seed = dim, seed

    @property
    def options(self) -> dict[str, Any]:
        """Number and seed of the directions."""
        return {"dim": self.dim, "seed": self.seed}

    def fit(self, x: Tensor | NDArray[Any]) -> Self:
        """Draw the directions for data of this size.

        Raises:
            ValueError: If a datum has fewer numbers than ``dim``.
        """
        width = flat(x).shape[1]
        if self.dim > width:
            raise ValueError(f"dim must be at most {width}, the size of a datum, got {self.dim}")
        normal = np.random.default_rng(self.seed).standard_normal((width, self.dim))
        self.loc = np.zeros(width)
        self.components = _signed(np.linalg.qr(normal)[0])
        return self


class CodeProjection(Projection):
    """Codes of a trained encoder, which runs in evaluation mode, without gradients, on its own device.

    The encoder is not stored with a target: to score new points, a loaded target must be given it again.

    Args:
        encoder: Maps ``(B, *x_shape)`` to the code, or to a tuple whose first entry is the code, shape
            ``(B, d)``.
        batch_size: Data per pass of the encoder.

    Raises:
        ValueError: If ``batch_size`` is not positive.
    """

    kind: ClassVar[str] = "code"

    def __init__(self, encoder: nn.Module, batch_size: int = 1000) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.encoder, self.batch_size = encoder, batch_size

    @property
    def options(self) -> dict[str, Any]:
        """Class and digest of the encoder: equal for equal parameters."""
        digest = hashlib.sha256()
        for name, tensor in self.encoder.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {"encoder": type(self.encoder).__name__, "sha256": digest.hexdigest()}

    def fit(self, x: Tensor | NDArray[Any]) -> Self:
        """Do nothing: the encoder was trained before."""
        return self

    def __call__(self, x: Tensor | NDArray[Any]) -> Floats:
        """Encode data ``(N, *x_shape)`` as ``(N, d)``.

        Raises:
            ValueError: If the codes are not vectors.
        """
        like = next(self.encoder.parameters(), torch.zeros(()))
        modes = {module: module.training for module in self.encoder.modules()}
        codes = []
        try:
            self.encoder.eval()
            with torch.no_grad():
                for start in range(0, len(x), self.batch_size):
                    part = torch.as_tensor(x[start : start + self.batch_size]).to(like)
                    out = self.encoder(part)
                    codes.append((out if isinstance(out, Tensor) else out[0]).cpu().double())
        finally:
            for module, training in modes.items():
                module.training = training
        code = torch.cat(codes)
        if code.ndim != 2 or len(code) != len(x):
            raise ValueError(f"encoder must give codes of shape (B, d), got {tuple(code.shape)} for {len(x)}")
        return code.numpy()


def flat(x: Tensor | NDArray[Any]) -> Tensor | NDArray[Any]:
    """Return data ``(N, *x_shape)`` as a view ``(N, x_dim)`` of one kind or the other.

    Raises:
        TypeError: If they are neither a tensor nor an array.
        ValueError: If there are none, or they are numbers and not data.
    """
    if not isinstance(x, Tensor | np.ndarray):
        raise TypeError(f"x must be a tensor or an array such as data.train.x, got {type(x).__name__}")
    if x.ndim < 2 or len(x) < 1:
        raise ValueError(f"x must have shape (N, *x_shape) with N at least 1, got {tuple(x.shape)}")
    return x.reshape(len(x), -1)


def _parts(x: Tensor | NDArray[Any]) -> Iterator[Floats]:
    """Yield the rows of ``x``, flattened and in double precision, in chunks that may be written to."""
    rows = flat(x)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        array = part.detach().cpu().numpy() if isinstance(part, Tensor) else part
        chunk = np.array(array, dtype=np.float64)
        odd = np.flatnonzero(~np.isfinite(chunk).all(1))
        if len(odd):
            raise ValueError(f"x must be finite, got nan or inf, first in datum {start + odd[0]}")
        yield chunk


def _check_width(x: Tensor | NDArray[Any], width: int) -> None:
    got = flat(x).shape[1]
    if got != width:
        raise ValueError(f"x must have {width} numbers in a datum, as those fitted, got {got}")


def _signed(components: Floats) -> Floats:
    """Turn columns so that the entry of largest size is positive."""
    largest = np.abs(components).argmax(0)
    signs = np.sign(components[largest, np.arange(components.shape[1])])
    return np.ascontiguousarray(components * signs)
