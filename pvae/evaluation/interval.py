"""Bootstrap intervals (Efron & Tibshirani 1993, ch. 13), freed of what resampling itself adds."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Interval", "bootstrap_intervals"]


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval, all in the estimate's units."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_intervals(
    statistic: Callable[..., Tensor],
    *sizes: int,
    num_bootstrap: int = 200,
    level: float = 0.95,
    seed: int = 0,
    least: float = -math.inf,
) -> list[Interval]:
    r"""Resample the rows of one or more independent samples.

    A distance between distributions can only grow when its samples are resampled, so that plain percentiles
    lie above the estimate. Here the resampled values are first centred on it:
    :math:`\theta + q_\alpha(\theta^* - \overline{\theta^*})`. The interval says how far the estimate varies
    with the data; it does not remove the estimate's own bias, which the comparison with a null shows.

    Args:
        statistic: Called with one vector of row numbers (int64, CPU) per sample; returns shape ``()`` or
            ``(S,)``.
        *sizes: Number of rows of each sample.
        num_bootstrap: Number of resamples; with 0 both ends are NaN.
        level: Coverage aimed at.
        seed: Seed of the row numbers.
        least: Value that the statistic cannot fall below; lower ends are cut off there.

    Returns:
        One interval for each entry of the statistic.

    Raises:
        ValueError: If ``num_bootstrap`` is negative or ``level`` is not between 0 and 1.
    """
    if num_bootstrap < 0:
        raise ValueError(f"num_bootstrap must not be negative, got {num_bootstrap}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    generator = torch.Generator().manual_seed(seed)
    value = statistic(*(torch.arange(size) for size in sizes)).double().cpu().reshape(-1)
    draws = [
        statistic(*(torch.randint(size, (size,), generator=generator) for size in sizes)).double().cpu()
        for _ in range(num_bootstrap)
    ]
    table = torch.stack(draws).reshape(num_bootstrap, -1) if draws else None
    return intervals_from(value, table, level, least)


def intervals_from(
    value: Tensor, draws: Tensor | None, level: float = 0.95, least: float = -math.inf
) -> list[Interval]:
    """Centre resampled values ``(B, S)`` on the estimates ``(S,)``; NaN ends if there are none."""
    if draws is None:
        return [Interval(v, math.nan, math.nan) for v in value.tolist()]
    tails = torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=draws.dtype)
    ends = (value + torch.quantile(draws - draws.mean(0), tails, dim=0)).clamp(min=least)
    return [Interval(v, *pair) for v, pair in zip(value.tolist(), ends.T.tolist(), strict=True)]
