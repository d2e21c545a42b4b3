r"""Whether a prior can have the log-density that it is to be aligned with."""

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .expectation import expected_log_prob

__all__ = ["Feasibility", "PriorFigures", "feasibility", "measure_prior", "warn"]

_DRAWS = 10_000
_INFEASIBLE = 0.2


@dataclass(frozen=True)
class PriorFigures:
    """A prior's log-density of its own draws, in nats.

    Attributes:
        mean: Its mean, minus the entropy.
        std: Its standard deviation.
        ceiling: The largest log-density anywhere; of 10,000 draws where that is not known.
        exact_ceiling: Whether it is known.
        learnable: Whether the log-density has parameters.
    """

    mean: float
    std: float
    ceiling: float
    exact_ceiling: bool
    learnable: bool


@dataclass(frozen=True)
class Feasibility:
    r"""Targets beside what the prior offers, in nats, before training or at any time.

    In the mean over data :math:`E[s] = E[t - c]` wherever alignment succeeds, and :math:`E[s] = -H(p_Z)`
    wherever codes follow the prior: both at once need targets with that mean. A prior with parameters can
    move to meet it; a fixed one has a ceiling.

    Attributes:
        target_mean: Mean of the targets less the offset.
        target_std: Their standard deviation.
        offset: The offset c.
        prior: Figures of the prior; ``None`` if it cannot be called without data.
        infeasible: Share of targets above the ceiling; ``None`` if that is not known, or if the targets are
            still to be learned (a flow's).
        heavy_share: Share of all weight that the heaviest hundredth of the data has.
    """

    target_mean: float
    target_std: float
    offset: float
    prior: PriorFigures | None
    infeasible: float | None
    heavy_share: float

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"targets {self.target_mean:.2f} +- {self.target_std:.2f} nats (offset {self.offset:.2f})"
        if self.prior is not None:
            about = "" if self.prior.exact_ceiling else "about "
            text += (
                f"; log p(z) of the prior {self.prior.mean:.2f} +- {self.prior.std:.2f}, at most "
                f"{about}{self.prior.ceiling:.2f}"
            )
        if self.infeasible is not None:
            text += f"; {self.infeasible:.0%} of targets above that"
        return text


def measure_prior(p: Any, device: torch.device) -> PriorFigures:
    """Measure a prior, by 10,000 draws of a seed of their own, or in closed form where it is normal.

    Args:
        p: The prior.
        device: Where it lies.

    Raises:
        ValueError: If it is flat: it has no density.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        z = p.sample((max(1, _DRAWS // max(1, math.prod(p.batch_shape))),))
    with torch.enable_grad():
        log_p = p.log_prob(z)
    learnable = bool(log_p.requires_grad)
    drawn = log_p.detach().double()
    if not (drawn != 0).any():
        raise ValueError("the prior must have a density to be aligned, got a flat one")
    with torch.no_grad():
        exact = expected_log_prob(p, p)
        mean = drawn.mean() if exact is None else exact.double().mean()
        # A normal is highest at its mean.
        ceiling = drawn.max() if exact is None else p.log_prob(p.mean).double().max()
    return PriorFigures(float(mean), float(drawn.std()), float(ceiling), exact is not None, learnable)


def feasibility(
    targets: Tensor, offset: float, prior: PriorFigures | None, heavy_share: float, settled: bool
) -> Feasibility:
    """Compare targets with a prior.

    Args:
        targets: In nats, before the offset, shape ``(N,)``.
        offset: The offset.
        prior: Figures of the prior.
        heavy_share: Share of weight of the heaviest hundredth.
        settled: Whether the targets are what they will be in training.
    """
    shifted = targets.detach().double() - offset
    known = settled and prior is not None and prior.exact_ceiling
    infeasible = float((shifted > prior.ceiling).double().mean()) if known and prior is not None else None
    std = float(shifted.std(correction=0))
    return Feasibility(float(shifted.mean()), std, offset, prior, infeasible, heavy_share)


def warn(found: Feasibility, heavy: bool, matched: bool) -> None:
    """Warn of targets that a fixed prior cannot reach, and of weights that a few data dominate.

    Args:
        found: The figures.
        heavy: Whether a few data dominate.
        matched: Whether the offset already matches the entropies.
    """
    prior = found.prior
    if prior is not None and not prior.learnable and (found.infeasible or 0) > _INFEASIBLE:
        cure = "use a prior with parameters" if matched else "use offset='entropy'"
        warnings.warn(
            f"{found.infeasible:.0%} of the targets lie above {prior.ceiling:.2f}, the largest log-density "
            f"of this fixed prior, where alignment crushes the codes: {cure}",
            stacklevel=3,
        )
    if heavy:
        warnings.warn(
            f"the heaviest 1 % of the data have {found.heavy_share:.0%} of the weight: give a floor, or clip "
            "the weights",
            stacklevel=3,
        )
