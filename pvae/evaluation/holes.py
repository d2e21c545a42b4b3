r"""Holes of the aggregate posterior: draws of the prior where no code lies near."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .conformal import _binomial, _chance, conformal_p_values
from .frechet import nearest_distance
from .interval import Interval

__all__ = ["Holes", "find_holes"]

_LEAST = 20
_SMALLEST = 1e-15


@dataclass(frozen=True)
class Holes:
    """Draws of the prior that lie farther from all codes than codes lie from one another.

    Attributes:
        share: Share of prior draws farther from their nearest code than all but ``level`` of other codes are,
            with its binomial interval of 95 % over prior draws.
        level: What the share is where the codes have the prior's distribution.
        p_value: Chance of so many such draws or more if they and the codes have one distribution, at most;
            never below 1e-15, where double precision ends.
        threshold: Distance beyond which a draw is far, in units of the coordinates.
        far: Which draws are, shape ``(M,)``, bool.
        distance: Distance of every draw to its nearest code, shape ``(M,)``.
        code_distance: The same of the codes held out, shape ``(N - N // 2,)``.
    """

    share: Interval
    level: float
    p_value: float
    threshold: float
    far: Tensor
    distance: Tensor
    code_distance: Tensor

    @property
    def mass(self) -> Interval:
        r"""Mass of the prior in holes, :math:`(s - \alpha) / (1 - \alpha)`, cut off at 0.

        It counts what lies beyond the threshold. Narrow holes, and codes near them, make it too small.
        """
        ends = (max(0.0, (v - self.level) / (1 - self.level)) for v in vars(self.share).values())
        return Interval(*ends)

    @property
    def found(self) -> bool:
        """Whether chance does not explain the share (``p_value`` below 0.01)."""
        return self.p_value < 0.01

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers that JSON can hold, without the distances."""
        return {
            "share": vars(self.share),
            "mass": vars(self.mass),
            "level": self.level,
            "p_value": self.p_value,
            "found": self.found,
            "threshold": self.threshold,
            "num_prior": len(self.distance),
            "num_codes": len(self.code_distance),
        }

    def __str__(self) -> str:
        said = f"{100 * self.mass.value:.1f} % of the prior in holes" if self.found else "no holes found"
        share, low, high = (100 * v for v in vars(self.share).values())
        return (
            f"{said}: {share:.1f} % [{low:.1f}, {high:.1f}] of its draws are as far from all codes as "
            f"{100 * self.level:g} % of codes are from the others (p = {self.p_value:.2g})"
        )


def find_holes(codes: Tensor, prior: Tensor, *, level: float = 0.05, seed: int = 0) -> Holes:
    r"""Look for draws of the prior that are far from all codes.

    One half of the codes, at random, stands for all of them. How far the others lie from their nearest one
    calibrates what is far: a draw of the prior is, if its conformal p-value is at most ``level``
    (:func:`conformal_p_values`), so that the share of such draws is no more than ``level`` on average where
    codes and draws have one distribution, in any number of dimensions. Distances are Euclidean: bring both
    samples to coordinates in which that means something first (:func:`whitened`). In many dimensions all
    distances are alike, and small holes are not seen.

    Args:
        codes: One draw of the guide for each datum, shape ``(N, d)``, at least 20.
        prior: Draws of the prior, shape ``(M, d)``.
        level: Share of codes that count as far.
        seed: Seed of the halves.

    Raises:
        ValueError: If the samples are no matrices of one width, there are too few, or ``level`` is not
            between 0 and 1.
    """
    for name, sample, least in (("codes", codes, _LEAST), ("prior", prior, 1)):
        if sample.ndim != 2 or len(sample) < least:
            raise ValueError(f"{name} must have shape (N, d) with N >= {least}, got {tuple(sample.shape)}")
    if codes.shape[1] != prior.shape[1]:
        raise ValueError(f"codes and prior must have one width, got {codes.shape[1]} and {prior.shape[1]}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level:g}")
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed)).to(codes.device)
    known, held = codes[order[: len(codes) // 2]], codes[order[len(codes) // 2 :]]
    code_distance, distance = nearest_distance(held, known), nearest_distance(prior, known)
    far = conformal_p_values(code_distance, distance) <= level
    # The largest distance that is not far yet.
    beyond = int(level * (len(code_distance) + 1) * (1 + 1e-12))
    ordered = code_distance.sort(descending=True).values
    count = int(far.sum())
    return Holes(
        share=_binomial(count, len(far)),
        level=level,
        p_value=max(_chance(count, len(far), len(code_distance), level), _SMALLEST),
        threshold=float(ordered[beyond - 1]) if beyond else float("inf"),
        far=far,
        distance=distance,
        code_distance=code_distance,
    )
