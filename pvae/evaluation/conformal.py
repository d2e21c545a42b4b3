r"""p-values for "this datum is like those" (Vovk et al. 2005; Bates et al. 2023, arXiv:2104.08279v4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .interval import Interval

__all__ = [
    "ConformalLevel",
    "ConformalTest",
    "benjamini_hochberg",
    "conformal_p_values",
    "conformal_test",
]

_CONFIDENCE = 0.95


def conformal_p_values(calibration: Tensor, scores: Tensor) -> Tensor:
    r"""Return how extreme scores are among those of data that are known to be in distribution.

    .. math:: p(s) = \frac{1 + \#\{i : c_i \ge s\}}{n + 1}

    For a datum that is exchangeable with the calibration data :math:`P(p \le \alpha) \le \alpha` at every
    :math:`\alpha`, whatever the score and whatever its ties; without ties p is uniform on
    :math:`\{1, \dots, n + 1\} / (n + 1)`. The probability is over calibration data and datum together.

    Args:
        calibration: Scores of calibration data that nothing was fitted to, larger for stranger ones, shape
            ``(n,)``, ``n >= 1``.
        scores: Scores to judge, shape ``(M,)``.

    Returns:
        Shape ``(M,)``, float64, at least ``1 / (n + 1)``.

    Raises:
        ValueError: If a shape is another one, ``calibration`` is empty, or a score is NaN.

    Example:
        >>> conformal_p_values(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 9.0])).tolist()
        [1.0, 0.75, 0.25]
    """
    calibration, scores = _scores("calibration", calibration), _scores("scores", scores)
    if len(calibration) < 1:
        raise ValueError("calibration must hold at least one score, got none")
    below = torch.searchsorted(calibration.sort().values, scores, right=False)
    return (1 + len(calibration) - below).double() / (len(calibration) + 1)


def benjamini_hochberg(p_values: Tensor, level: float) -> Tensor:
    """Say which of many p-values are discoveries when their false discovery rate is to be at most ``level``.

    With conformal p-values of one calibration set, which depend on one another, the rate is kept too (Bates
    et al. 2023, theorem 2): among data called out of distribution, at most this share is in distribution, on
    average.

    Args:
        p_values: Shape ``(M,)``, between 0 and 1.
        level: Share of false discoveries aimed at, between 0 and 1.

    Returns:
        Whether each is a discovery, shape ``(M,)``, bool.

    Raises:
        ValueError: If the shape is another one, a p-value is outside [0, 1], or ``level`` outside (0, 1).
    """
    p_values = _scores("p_values", p_values)
    if not bool(((p_values >= 0) & (p_values <= 1)).all()):
        raise ValueError("p_values must lie between 0 and 1")
    _check_level(level)
    total = len(p_values)
    ordered = p_values.sort().values
    passed = (ordered <= level * torch.arange(1, total + 1, dtype=ordered.dtype) / total).nonzero()
    if not len(passed):
        return torch.zeros(total, dtype=torch.bool)
    return p_values <= ordered[passed[-1, 0]]


@dataclass(frozen=True)
class ConformalLevel:
    """A test "p <= alpha" on data whose origin is known.

    Attributes:
        alpha: Level of the test.
        false_alarms: Share of other in-distribution data that it calls strange, with the binomial interval
            (Clopper & Pearson 1934) of 95 %.
        p_value: Chance of as many false alarms or more if these data are exchangeable with the calibration
            data, at most (it is exact without ties): beta-binomial, as the calibration data are a sample too.
            A small one says that the promise is broken.
        detections: Share of data from elsewhere that it calls strange, with the same interval.
    """

    alpha: float
    false_alarms: Interval
    p_value: float
    detections: Interval

    @property
    def holds(self) -> bool:
        """Whether the false alarms are no more than chance explains (``p_value`` of at least 0.01)."""
        return self.p_value >= 0.01

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {
            "alpha": self.alpha,
            "false_alarms": vars(self.false_alarms),
            "p_value": self.p_value,
            "holds": self.holds,
            "detections": vars(self.detections),
        }


@dataclass(frozen=True)
class ConformalTest:
    """Conformal p-values of data from inside and from outside, and what tests at some levels make of them.

    Attributes:
        p_inside: p-values of in-distribution data that are not the calibration data, shape ``(n,)``.
        p_outside: p-values of data from elsewhere, shape ``(m,)``.
        levels: One entry for each level.
        num_calibration: Number of calibration data; no p-value is below ``1 / (num_calibration + 1)``.
        fdr: Level of the procedure of Benjamini and Hochberg on all data together, or ``None``.
        discoveries: Number of data that it calls strange.
        false_discoveries: How many of them are from inside.
    """

    p_inside: Tensor
    p_outside: Tensor
    levels: tuple[ConformalLevel, ...]
    num_calibration: int
    fdr: float | None = None
    discoveries: int = 0
    false_discoveries: int = 0

    @property
    def false_discovery_proportion(self) -> float:
        """Share of the discoveries that is from inside; 0 without discoveries."""
        return self.false_discoveries / max(1, self.discoveries)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers that JSON can hold, without the p-values."""
        record: dict[str, Any] = {
            "num_calibration": self.num_calibration,
            "num_inside": len(self.p_inside),
            "num_outside": len(self.p_outside),
            "levels": [level.to_dict() for level in self.levels],
        }
        if self.fdr is not None:
            record["benjamini_hochberg"] = {
                "fdr": self.fdr,
                "discoveries": self.discoveries,
                "false_discoveries": self.false_discoveries,
                "false_discovery_proportion": self.false_discovery_proportion,
            }
        return record

    def __str__(self) -> str:
        said = [
            f"alpha {level.alpha:g}: {_percent(level.false_alarms)} false alarms, "
            f"{_percent(level.detections)} detected" + ("" if level.holds else " (too many false alarms)")
            for level in self.levels
        ]
        if self.fdr is not None:
            said.append(
                f"false discovery rate {self.fdr:g}: {self.discoveries} discoveries, "
                f"{self.false_discoveries} of them false"
            )
        return "; ".join(said)


def conformal_test(
    calibration: Tensor,
    inside: Tensor,
    outside: Tensor,
    *,
    levels: Sequence[float] = (0.01, 0.05, 0.1),
    fdr: float | None = None,
) -> ConformalTest:
    """Calibrate a score on in-distribution data, and count false alarms and detections on other data.

    Args:
        calibration: Scores of held-out in-distribution data, larger for stranger ones, shape ``(n,)``.
        inside: Scores of other in-distribution data, on which the false alarms are counted.
        outside: Scores of data from elsewhere.
        levels: Levels of the tests, between 0 and 1.
        fdr: Also call discoveries among inside and outside data together at this false discovery rate.

    Raises:
        ValueError: If a sample is empty or no vector, a score is NaN, or a level is outside (0, 1).
    """
    for name, sample in (("inside", inside), ("outside", outside)):
        if sample.ndim == 1 and len(sample) < 1:
            raise ValueError(f"{name} must hold at least one score, got none")
    p_inside, p_outside = (conformal_p_values(calibration, sample) for sample in (inside, outside))
    num = len(calibration)
    rows = []
    for alpha in levels:
        _check_level(alpha)
        alarms = int((p_inside <= alpha).sum())
        rows.append(
            ConformalLevel(
                alpha,
                _binomial(alarms, len(p_inside)),
                _chance(alarms, len(p_inside), num, alpha),
                _binomial(int((p_outside <= alpha).sum()), len(p_outside)),
            )
        )
    found = {}
    if fdr is not None:
        called = benjamini_hochberg(torch.cat([p_inside, p_outside]), fdr)
        wrong = int(called[: len(p_inside)].sum())
        found = {"discoveries": int(called.sum()), "false_discoveries": wrong}
    return ConformalTest(p_inside, p_outside, tuple(rows), num, fdr, **found)


def _binomial(count: int, total: int) -> Interval:
    """Exact interval of a share (Clopper & Pearson)."""
    from scipy.stats import beta

    tail = (1 - _CONFIDENCE) / 2
    low = 0.0 if count == 0 else float(beta.ppf(tail, count, total - count + 1))
    high = 1.0 if count == total else float(beta.ppf(1 - tail, count + 1, total - count))
    return Interval(count / total, low, high)


def _chance(alarms: int, total: int, num_calibration: int, alpha: float) -> float:
    """Chance of ``alarms`` or more among ``total`` data exchangeable with the calibration data."""
    from scipy.stats import betabinom

    # p <= alpha is a score above the k-th largest calibration score; the level is rounded up by no more than
    # a float's error, so that alpha (n + 1) = 5 is 5.
    k = math.floor(alpha * (num_calibration + 1) * (1 + 1e-12))
    if alarms == 0:
        return 1.0
    if k == 0:
        return 0.0
    return float(betabinom.sf(alarms - 1, total, k, num_calibration + 1 - k))


def _scores(name: str, value: Tensor) -> Tensor:
    if value.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), got {tuple(value.shape)}")
    if bool(value.isnan().any()):
        raise ValueError(f"{name} must not be NaN, got {int(value.isnan().sum())} such entries")
    return value.detach().cpu().double()


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"a level must lie between 0 and 1, got {level:g}")


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"
