"""Area under the ROC curve: the chance that one score exceeds another (Hanley & McNeil 1982)."""

import math

import torch
from torch import Tensor

from .interval import Interval

__all__ = ["auroc", "auroc_interval", "roc_curve"]


def auroc(inside: Tensor, outside: Tensor) -> float:
    r"""Chance that an outside score is larger than an inside one, ties counted half.

    .. math:: P(s_{out} > s_{in}) + \tfrac12 P(s_{out} = s_{in})

    Args:
        inside: Scores of data that are in distribution, shape ``(n,)``.
        outside: Scores of data that are not, shape ``(m,)``; a detector gives larger ones.

    Returns:
        0.5 for a score that says nothing, 1 for one that separates the samples.

    Raises:
        ValueError: If a sample is empty or no vector, or a score is NaN.
    """
    place_in, place_out, size = _places(inside, outside)
    return float(_area(place_in, place_out, size))


def auroc_interval(
    inside: Tensor, outside: Tensor, *, num_bootstrap: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return :func:`auroc` with the percentiles of a bootstrap that resamples each sample by itself.

    Where the samples are separated the interval has no length: the bootstrap knows no overlap that it has
    not seen.

    Args:
        inside: Shape ``(n,)``.
        outside: Shape ``(m,)``.
        num_bootstrap: Number of resamples; with 0 both ends are NaN.
        level: Coverage aimed at.
        seed: Seed of the resamples.

    Raises:
        ValueError: As :func:`auroc`, or if ``num_bootstrap`` is negative or ``level`` not between 0 and 1.
    """
    if num_bootstrap < 0:
        raise ValueError(f"num_bootstrap must not be negative, got {num_bootstrap}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    place_in, place_out, size = _places(inside, outside)
    value = float(_area(place_in, place_out, size))
    if num_bootstrap == 0:
        return Interval(value, math.nan, math.nan)
    generator = torch.Generator().manual_seed(seed)

    def resampled(places: Tensor) -> Tensor:
        return places[torch.randint(len(places), (len(places),), generator=generator)]

    draws = [_area(resampled(place_in), resampled(place_out), size) for _ in range(num_bootstrap)]
    tails = torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=torch.float64)
    low, high = torch.stack(draws).quantile(tails).tolist()
    return Interval(value, low, high)


def roc_curve(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of inside and of outside data at or above every threshold, from (0, 0) to (1, 1).

    Args:
        inside: Shape ``(n,)``.
        outside: Shape ``(m,)``.

    Returns:
        False-positive and true-positive rates, each ``(T,)``, rising. The straight lines between the points
        enclose the area of :func:`auroc`.

    Raises:
        ValueError: As :func:`auroc`.
    """
    place_in, place_out, size = _places(inside, outside)
    rates = []
    for places in (place_in, place_out):
        above = torch.bincount(places, minlength=size).flip(0).cumsum(0).double() / len(places)
        rates.append(torch.cat([above.new_zeros(1), above]))
    return rates[0], rates[1]


def _places(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor, int]:
    """Number every score among all different ones, from the smallest; and the number of those."""
    for name, sample in (("inside", inside), ("outside", outside)):
        if sample.ndim != 1 or len(sample) < 1:
            raise ValueError(f"{name} must have shape (N,) with N at least 1, got {tuple(sample.shape)}")
        if bool(sample.isnan().any()):
            raise ValueError(f"{name} must not be NaN, got {int(sample.isnan().sum())} such scores")
    scores = torch.cat([inside.detach().cpu().double(), outside.detach().cpu().double()])
    different, places = torch.unique(scores, return_inverse=True)
    return places[: len(inside)], places[len(inside) :], len(different)


def _area(place_in: Tensor, place_out: Tensor, size: int) -> Tensor:
    count_in = torch.bincount(place_in, minlength=size).double()
    count_out = torch.bincount(place_out, minlength=size).double()
    below = count_in.cumsum(0) - count_in / 2
    return (count_out * below).sum() / (len(place_in) * len(place_out))
