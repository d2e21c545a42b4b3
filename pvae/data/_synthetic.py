"""What synthetic sets share: parts of given sizes, and the log-density of Gaussians on many centres."""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._request import Request
from ._seeds import derive_seed
from .dataset import Source
from .errors import DataError

__all__ = ["MOST_COMPONENTS", "Truth", "affordable", "isotropic_log_density", "known_source", "positive"]

MOST_COMPONENTS = 10_000
"""Components of a mixture, each of which is a class with a name."""

# Rows times centres held at once while a density is computed.
_BUDGET = 4_000_000
# Numbers of a part: a few arrays of 512 MiB while they are drawn.
_MOST = 2**26
# Size of the validation part when none is asked for.
_NUM_VALID = 2_000


class Truth(Protocol):
    """What synthetic data are drawn from: a sampler and its exact log-density."""

    def draw(
        self, generator: np.random.Generator, n: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64] | None]:
        """Draw ``n`` data, ``(n, D)``, and their labels ``(n,)`` or ``None``."""
        ...

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats, ``(*batch, D) -> (*batch,)``."""
        ...


def known_source(
    request: Request,
    truth: Truth,
    *,
    num_train: int,
    num_test: int,
    class_names: tuple[str, ...] | None = None,
    log_density_intrinsic: Callable[[Tensor], Tensor] | None = None,
) -> Source:
    """Draw each part from a stream of its own, so that its size does not change the others.

    Values are rounded to multiples of 2^-20, far below any noise here and far above the last digits in which
    sines and exponentials differ between machines: the data, and so their digest, are the same everywhere.

    Args:
        request: What is asked for.
        truth: What is drawn from.
        num_train: Size of the training part.
        num_test: Size of the test part.
        class_names: Name of each label.
        log_density_intrinsic: Log-density on the plane of the data, where they lie on one.
    """
    sizes = {
        "train": num_train,
        "valid": _NUM_VALID if request.valid is None else request.valid,
        "test": num_test,
    }
    x_dim = truth.draw(np.random.default_rng(0), 1)[0].shape[1]
    for part, size in sizes.items():
        if size < (0 if part == "valid" else 1):
            raise DataError(f"{'valid' if part == 'valid' else f'num_{part}'} must be positive, got {size}")
        affordable(**{"valid" if part == "valid" else f"num_{part}": size}, x_dim=x_dim)
    parts: dict[str, tuple[Tensor, Tensor | None]] = {}
    for part, size in sizes.items():
        if size > 0:
            x, y = truth.draw(np.random.default_rng(derive_seed(request.name, request.seed, part)), size)
            rounded = torch.from_numpy(np.round(x * 2.0**20) / 2.0**20).to(torch.float32)
            parts[part] = (rounded, None if y is None else torch.from_numpy(y.astype(np.int64)))
    return Source(
        kind="real",
        levels=None,
        binarize=None,
        split="independent draws",
        seeded=True,
        parts=parts,
        class_names=class_names,
        log_density=truth.log_density,
        log_density_intrinsic=log_density_intrinsic,
        truth=truth,
    )


def positive(*, most: float = 1e30, **values: float) -> None:
    """Refuse values that are not positive, or larger than what is drawn with them can be, by their names."""
    for name, value in values.items():
        if not value > 0:
            raise DataError(f"{name} must be positive, got {value}")
        if value > most:
            raise DataError(f"{name} must be at most {most:g}, got {value}")


def affordable(*, most: int = _MOST, **sizes: int) -> None:
    """Refuse an array of these named sizes, before it is made, that would not fit into most memories."""
    if math.prod(sizes.values()) > most:
        named = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"{' x '.join(sizes)} must be at most {most}, got {named}")


def isotropic_log_density(x: Tensor, centres: Tensor, log_weights: Tensor, std: float) -> Tensor:
    r"""Return :math:`\log \sum_k w_k \mathcal N(x; c_k, \sigma^2 I)` in nats.

    Args:
        x: Points, shape ``(*batch, D)``.
        centres: Centres, shape ``(K, D)``.
        log_weights: Logarithms of the weights, shape ``(K,)``.
        std: Standard deviation of every component.

    Returns:
        Shape ``(*batch,)``, in the type and on the device of ``x``.

    Raises:
        ValueError: If the last dimension of ``x`` is not ``D``.
    """
    if x.shape[-1:] != centres.shape[-1:]:
        raise ValueError(f"x must have shape (*batch, {centres.shape[-1]}), got {tuple(x.shape)}")
    centres, log_weights = centres.to(x), log_weights.to(x)
    rows = x.reshape(-1, x.shape[-1])
    values = []
    for chunk in rows.split(max(1, _BUDGET // len(centres))):
        # Differences, not the expanded square: the latter loses the digits of points near a centre. One axis
        # at a time: a last dimension of two is slow to sum over.
        squares = chunk.new_zeros(())
        for axis, centre in zip(chunk.T, centres.T, strict=True):
            squares = squares + (axis.unsqueeze(-1) - centre).square()
        values.append(torch.logsumexp(log_weights - squares / (2 * std**2), -1))
    constant = x.shape[-1] * (math.log(std) + 0.5 * math.log(2 * math.pi))
    return torch.cat(values).reshape(x.shape[:-1]) - constant if values else x.new_zeros(x.shape[:-1])
