"""A distribution under test in double precision, and what several of its checks share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .grid import Grid
from .importance import importance_sample
from .rebuild import Recipe
from .report import ExactnessError
from .space import Unconstrained, finite_values, is_discrete

__all__ = ["Subject", "element", "relative_error"]

# Statistical checks look at no more elements of a batch than this.
_MOST_ELEMENTS = 8


@dataclass
class Subject:
    """What the checks of a distribution look at; draws, quadrature and proposals are made once.

    Args:
        name: How messages call it.
        d: The distribution in double precision.
        recipe: How to build it again.
        given_values: Its finite support, shape ``(num_values, *event_shape)``, if the user listed it.
        num_samples: Draws for statistical checks.
        false_alarm: Probability that a right distribution fails one statistical check.
        check: Name of the check that is running.
    """

    name: str
    d: dist.TorchDistribution
    recipe: Recipe
    given_values: Tensor | None
    num_samples: int
    false_alarm: float
    check: str = ""
    _made: dict[str, Any] = field(default_factory=dict)

    def require(self, holds: bool | Tensor, finding: str) -> None:
        """Raise the running check's error unless ``holds``."""
        if not bool(holds):
            raise ExactnessError(self.name, self.check, finding)

    @property
    def discrete(self) -> bool:
        """Whether the values can be listed rather than integrated over."""
        return self.given_values is not None or is_discrete(self.d)

    @property
    def num_elements(self) -> int:
        """Number of elements of the batch that statistical checks look at."""
        return min(_MOST_ELEMENTS, math.prod(self.d.batch_shape))

    @property
    def samples(self) -> Tensor:
        """Draws as ``pyro.sample`` makes them, ``(num_samples, *batch, *event)``, once for all checks."""
        return self._once("samples", lambda: self.d(torch.Size((self.num_samples,))))

    @property
    def values(self) -> Tensor:
        """The finite support, shape ``(num_values, *event)``."""
        if self.given_values is not None:
            return self.given_values.to(self.samples.dtype)
        return self._once("values", lambda: finite_values(self.d, self.samples))

    @property
    def log_mass(self) -> Tensor:
        """Log-probabilities of the finite support, shape ``(num_values, elements)``."""

        def compute() -> Tensor:
            batch, event = self.d.batch_shape, self.d.event_shape
            value = self.values.reshape(-1, *(1 for _ in batch), *event).expand(-1, *batch, *event)
            return self.d.log_prob(value).reshape(len(value), -1)[:, : self.num_elements]

        return self._once("log_mass", compute)

    @property
    def space(self) -> Unconstrained:
        """The distribution of the unconstrained vector behind its values."""
        return self._once("space", lambda: Unconstrained(self.d))

    @property
    def u(self) -> Tensor:
        """Draws as real vectors, shape ``(num_samples, *batch, dim)``."""
        return self._once("u", lambda: self.space.flat(self.samples))

    @property
    def grid(self) -> Grid:
        """Quadrature nodes that have settled on the density."""
        return self._once("grid", lambda: Grid(self.space.log_prob, self.u))

    def importance(self, index: int) -> tuple[Tensor, Tensor]:
        """Draws and log-weights for one element of the batch, shapes ``(n, dim)`` and ``(n,)``."""
        batch = self.d.batch_shape

        def log_prob(u: Tensor) -> Tensor:
            spread = u.reshape(len(u), *(1 for _ in batch), -1).expand(len(u), *batch, -1)
            return self.space.log_prob(spread).reshape(len(u), -1)[:, index]

        return self._once(
            f"importance {index}",
            lambda: importance_sample(log_prob, element(self.u, index), self.num_samples),
        )

    def _once(self, key: str, compute: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = compute()
        return self._made[key]


def element(vectors: Tensor, index: int) -> Tensor:
    """Take one element of the batch from shape ``(n, *batch, dim)``; shape ``(n, dim)``."""
    return vectors.reshape(len(vectors), -1, vectors.shape[-1])[:, index]


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Largest difference relative to 1 + the size of the exact value; infinite where one is not a number."""
    difference = ((ours - exact).abs() / (1 + exact.abs())).nan_to_num(nan=math.inf)
    return float(difference.max())
