"""An estimator of log p(x) under test, and how its answers are read."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .report import ExactnessError

__all__ = ["NUM_DATA", "ROUNDING", "Bench", "difference"]

# Data of one check.
NUM_DATA = 8
# Two numbers that must be one and the same may differ by rounding in another order of summation.
ROUNDING = 1e-9


@dataclass
class Bench:
    """The estimator, how strictly it is judged, and the check that is running.

    Args:
        name: How messages call the estimator.
        estimator: See :func:`pvae.testing.check_likelihood_estimator`.
        num_particles: The K at which bounds are tested, rising.
        tolerance: Largest error in nats under an exact posterior.
        false_alarm: Probability that a right estimator fails one statistical check.
        seed: Seed of the estimates.
        check: Name of the check that is running.
        made: Estimates that two checks look at.
    """

    name: str
    estimator: Callable[..., Any]
    num_particles: tuple[int, ...]
    tolerance: float
    false_alarm: float
    seed: int
    check: str = ""
    made: dict[str, Tensor] = field(default_factory=dict)

    def require(self, holds: bool | Tensor, finding: str) -> None:
        """Raise the running check's error unless ``holds``."""
        if not bool(holds):
            raise ExactnessError(self.name, self.check, finding)

    def run(
        self,
        model: nn.Module,
        guide: nn.Module,
        x: Tensor,
        y: Tensor | None = None,
        *,
        num_particles: int,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return values and k-hats, each ``(N,)`` in double precision."""
        seed = self.seed if seed is None else seed
        result = self.estimator(
            model, guide, x, y, num_particles=num_particles, batch_size=batch_size, seed=seed
        )
        log_prob, khat = getattr(result, "log_prob", result), getattr(result, "pareto_k", None)
        shape = tuple(getattr(log_prob, "shape", ()))
        self.require(shape == (len(x),), f"log_prob must have shape {(len(x),)}, got {shape}")
        if khat is not None:
            khat = torch.as_tensor(khat).detach().double()
            self.require(
                khat.shape == (len(x),), f"pareto_k must have shape {(len(x),)}, got {tuple(khat.shape)}"
            )
        return log_prob.detach().double(), khat

    def value(self, *args: Any, **keywords: Any) -> Tensor:
        """Return the values alone; arguments as for :meth:`run`."""
        return self.run(*args, **keywords)[0]


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference between entries that are not equal (infinities and NaN in the same place are)."""
    same = (a == b) | (a.isnan() & b.isnan())
    return float((a - b).abs().nan_to_num(nan=math.inf).masked_fill(same, 0.0).max())
