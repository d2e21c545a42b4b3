"""A classifier's word on whether two samples have one distribution (Lopez-Paz & Oquab 2017,
arXiv:1610.06545v4, sec. 3).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .conformal import _binomial
from .interval import Interval
from .two_sample import _indicator, _points

__all__ = ["C2ST", "Classifier", "classifier_test", "classifier_two_sample"]

Classifier = Literal["mlp", "logistic"]

_CLASSIFIERS: tuple[Classifier, ...] = ("mlp", "logistic")


@dataclass(frozen=True)
class C2ST:
    """Held-out accuracy of a classifier that tells two samples of equal size apart.

    Attributes:
        accuracy: 0.5 if it cannot, 1 if it always can.
        num_points: Number of points judged, both samples together.
        crossed: Whether every point was judged in its turn, by a classifier trained on the others. Then no
            p-value exists: what two classifiers get right depends on each other's data, and their errors go
            together. Of 1000 pairs of samples of one distribution, a binomial p-value of five folds was below
            0.05 for 9 to 11 %.
    """

    accuracy: float
    num_points: int
    crossed: bool = True

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy; too small where ``crossed``."""
        return float((self.accuracy * (1 - self.accuracy) / self.num_points) ** 0.5)

    @property
    def interval(self) -> Interval:
        """Accuracy with its binomial interval of 95 % (Clopper & Pearson); too short where ``crossed``."""
        return _binomial(self._right, self.num_points)

    @property
    def p_value(self) -> float:
        """Chance of at least this accuracy if both samples have one distribution, at most; NaN if crossed.

        Binomial. With as many points of either sample the accuracy is spread no wider than a binomial one,
        whatever the classifier (Hoeffding 1956), so that the test keeps its level.
        """
        if self.crossed:
            return math.nan
        from scipy.stats import binom

        return float(binom.sf(self._right - 1, self.num_points, 0.5))

    @property
    def _right(self) -> int:
        return round(self.accuracy * self.num_points)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers that JSON can hold."""
        reach = self.interval
        return {
            "accuracy": self.accuracy,
            "low": reach.low,
            "high": reach.high,
            "p_value": None if self.crossed else self.p_value,
            "num_points": self.num_points,
            "crossed": self.crossed,
        }

    def __str__(self) -> str:
        reach = self.interval
        p = "" if self.crossed else f", p = {self.p_value:.2g}"
        return f"accuracy {self.accuracy:.3f} [{reach.low:.3f}, {reach.high:.3f}]{p}"


def classifier_two_sample(
    a: Tensor,
    b: Tensor,
    seed: int = 0,
    folds: int = 5,
    hidden: Sequence[int] = (64, 64),
    *,
    classifier: Classifier = "mlp",
) -> C2ST:
    """Train a small network to tell the samples apart, and judge every point by one that has not seen it.

    The larger sample is cut down at random to the size of the smaller, so that 0.5 is chance. The inputs are
    standardised by what the network was trained on. For a test, see :func:`classifier_test`.

    Args:
        a: Points, shape ``(n, d)``.
        b: Points, shape ``(m, d)``.
        seed: Seed of the cut, the folds and the networks.
        folds: Parts of the data, each judged by a network trained on the others; at least 2.
        hidden: Widths of the network's hidden layers.
        classifier: ``"mlp"``, or ``"logistic"``: a linear rule, which sees differences of means alone.

    Raises:
        ValueError: If the samples are not matrices of one width with ``folds`` rows or more, or there is no
            such classifier.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    points, label = _labelled(a, b, folds, seed)
    right = sum(
        _right(points, label, train, test, classifier, hidden, seed)
        for train, test in _folds(points, label, folds, seed)
    )
    return C2ST(right / len(points), len(points))


def classifier_test(
    a: Tensor,
    b: Tensor,
    seed: int = 0,
    *,
    classifier: Classifier = "mlp",
    hidden: Sequence[int] = (64, 64),
) -> C2ST:
    """Train a classifier on one half of the points and judge the other: a test that keeps its level.

    Samples are cut and standardised as in :func:`classifier_two_sample`.

    Args:
        a: Points, shape ``(n, d)``.
        b: Points, shape ``(m, d)``.
        seed: Seed of the cut, the halves and the network.
        classifier: ``"mlp"`` or ``"logistic"``.
        hidden: Widths of the network's hidden layers.

    Raises:
        ValueError: If the samples are not matrices of one width with two rows or more, or there is no such
            classifier.
    """
    points, label = _labelled(a, b, 2, seed)
    train, test = next(iter(_folds(points, label, 2, seed)))
    right = _right(points, label, train, test, classifier, hidden, seed)
    return C2ST(right / len(test), len(test), crossed=False)


def _labelled(a: Tensor, b: Tensor, least: int, seed: int) -> tuple[Any, Any]:
    """Points of both samples, as many of either, and the sample of each, as NumPy arrays."""
    a, b = _points(a, b, least=least)
    size = min(len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    rows = [sample[torch.randperm(len(sample), generator=generator)[:size]].cpu() for sample in (a, b)]
    return torch.cat(rows).numpy(), _indicator(2 * size, size).numpy().astype(int)


def _folds(points: Any, label: Any, folds: int, seed: int) -> Any:
    from sklearn.model_selection import StratifiedKFold

    return StratifiedKFold(folds, shuffle=True, random_state=seed).split(points, label)


def _right(
    points: Any, label: Any, train: Any, test: Any, classifier: Classifier, hidden: Sequence[int], seed: int
) -> int:
    """Number of test points that a classifier of the training points gets right."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    if classifier not in _CLASSIFIERS:
        raise ValueError(f"classifier must be one of {', '.join(_CLASSIFIERS)}, got {classifier!r}")
    loc, scale = points[train].mean(0), points[train].std(0)
    scale[scale == 0] = 1
    # A tenth of the training points says when to stop; fewer than 100 would say little.
    many = len(train) >= 1000
    net: Any = LogisticRegression(max_iter=200)
    if classifier == "mlp":
        net = MLPClassifier(
            tuple(hidden),
            alpha=1e-3,
            learning_rate_init=3e-3,
            max_iter=100 if many else 50,
            early_stopping=many,
            random_state=seed,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        net.fit((points[train] - loc) / scale, label[train])
    return int((net.predict((points[test] - loc) / scale) == label[test]).sum())
