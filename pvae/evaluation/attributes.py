"""Do generated data show the labels they were made for? A classifier's word, beside its own ceiling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pvae.data import Split

__all__ = [
    "Accuracy",
    "Combination",
    "LabelScores",
    "RareScore",
    "accuracy_of",
    "label_scores",
    "rare_combinations",
]


class Scorer(Protocol):
    """What a classifier must offer."""

    def log_odds(self, x: Tensor) -> Tensor:
        """Log-odds of every label, shape ``(N, L)``; for classes the highest is the prediction."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """How well predictions agree with labels; every figure is a share between 0 and 1.

    Attributes:
        overall: Classes: right predictions. Attributes: mean of ``per_label``.
        balanced: Mean over the values a label takes of the share found: of classes, or of both values of an
            attribute and then over attributes. Chance is ``1 / classes`` or 0.5.
        auc: Mean area under the ROC curve, of each class against the rest or of each attribute; chance is
            0.5. NaN where no label takes two values.
        exact: Data whose labels are all right (classes: ``overall``).
        per_label: Share found of each class, or accuracy of each attribute, shape ``(L,)``; NaN for a class
            that does not occur.
        balanced_per_label: Shape ``(L,)``; for classes the same as ``per_label``.
        auc_per_label: Shape ``(L,)``; NaN where the label takes one value only.
        num_data: Number of data.
    """

    overall: float
    balanced: float
    auc: float
    exact: float
    per_label: Tensor
    balanced_per_label: Tensor
    auc_per_label: Tensor
    num_data: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold (what is undefined is ``None``)."""
        return {
            "overall": _number(self.overall),
            "balanced": _number(self.balanced),
            "auc": _number(self.auc),
            "exact": _number(self.exact),
            "per_label": [_number(v) for v in self.per_label.tolist()],
            "balanced_per_label": [_number(v) for v in self.balanced_per_label.tolist()],
            "auc_per_label": [_number(v) for v in self.auc_per_label.tolist()],
            "num_data": self.num_data,
        }


@dataclass(frozen=True)
class Combination:
    """Values of some attributes together.

    Attributes:
        columns: Columns of ``y``.
        values: Value of each, 0 or 1.
        count: How often the combination occurred in training.
        rate: Its training frequency.
    """

    columns: tuple[int, ...]
    values: tuple[int, ...]
    count: int
    rate: float

    def matches(self, y: Tensor) -> Tensor:
        """Whether each row of attributes ``(N, L)`` has these values, shape ``(N,)``, bool."""
        wanted = torch.tensor(self.values, device=y.device)
        return ((y[:, list(self.columns)] > 0.5) == (wanted > 0.5)).all(-1)

    def name(self, names: Sequence[str] | None = None) -> str:
        """Say it in words: ``"large, not filled"``."""
        words = [str(c) if names is None else names[c] for c in self.columns]
        return ", ".join(w if v else f"not {w}" for w, v in zip(words, self.values, strict=True))


@dataclass(frozen=True)
class RareScore:
    """Data of one rare combination.

    Attributes:
        combination: The combination.
        num_data: Number of generated data that were to show it.
        hit: Share of them in which the classifier finds all its values; NaN if there are none.
        num_real: Number of real data with the combination.
        ceiling: The same share on these; NaN if there are none.
        majority: The same share for a guess of each attribute's commoner value.
    """

    combination: Combination
    num_data: int
    hit: float
    num_real: int
    ceiling: float
    majority: float


@dataclass(frozen=True)
class LabelScores:
    """A classifier's word on generated data, with what it could at best and at least be.

    Attributes:
        generated: Agreement with the labels the data were generated from.
        ceiling: The classifier's agreement with the labels of real data: more cannot be asked for. ``None``
            where no real data were given.
        majority: Agreement of the commonest class, or the commoner value of each attribute, with the labels.
        rare: One entry for each rare combination.
        names: Name of each label, or ``None``.
    """

    generated: Accuracy
    ceiling: Accuracy | None
    majority: Accuracy
    rare: tuple[RareScore, ...] = ()
    names: tuple[str, ...] | None = None

    @property
    def rare_hit(self) -> float:
        """Share of hits over all rare combinations, each datum of each counting once; NaN without any."""
        return _pooled([(r.hit, r.num_data) for r in self.rare])

    @property
    def rare_ceiling(self) -> float:
        """The same share on real data."""
        return _pooled([(r.ceiling, r.num_real) for r in self.rare])

    @property
    def rare_majority(self) -> float:
        """The same share for a guess of each attribute's commoner value."""
        return _pooled([(r.majority, r.num_data) for r in self.rare])

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold (what is undefined is ``None``)."""
        return {
            "generated": self.generated.to_dict(),
            "ceiling": None if self.ceiling is None else self.ceiling.to_dict(),
            "majority": self.majority.to_dict(),
            "rare_hit": _number(self.rare_hit),
            "rare_ceiling": _number(self.rare_ceiling),
            "rare_majority": _number(self.rare_majority),
            "rare": [
                {
                    "combination": r.combination.name(self.names),
                    "columns": list(r.combination.columns),
                    "values": list(r.combination.values),
                    "rate": r.combination.rate,
                    "num_data": r.num_data,
                    "hit": _number(r.hit),
                    "num_real": r.num_real,
                    "ceiling": _number(r.ceiling),
                    "majority": _number(r.majority),
                }
                for r in self.rare
            ],
            "names": None if self.names is None else list(self.names),
        }

    def to_markdown(self) -> str:
        """Return one table: a row for each measure, then for each label."""
        sets = (self.generated, self.ceiling, self.majority)

        def cells(name: str) -> list[float]:
            return [math.nan if s is None else getattr(s, name) for s in sets]

        size = len(self.generated.per_label)
        names = self.names or tuple(f"label {i}" for i in range(size))
        rows = [
            ("accuracy", cells("overall")),
            ("balanced accuracy", cells("balanced")),
            ("AUC", cells("auc")),
            ("all labels right", cells("exact")),
        ]
        if self.rare:
            rows.append(("rare combinations", [self.rare_hit, self.rare_ceiling, self.rare_majority]))
        for i, name in enumerate(names):
            values = [math.nan if s is None else float(s.per_label[i]) for s in sets]
            rows.append((name, values))
        lines = [
            f"| {self.generated.num_data} data | generated | real (ceiling) | majority |",
            "|---|---:|---:|---:|",
        ]
        lines += [f"| {name} | {' | '.join(map(_percent, values))} |" for name, values in rows]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_markdown()


def accuracy_of(log_odds: Tensor, y: Tensor) -> Accuracy:
    """Compare predictions with labels.

    Args:
        log_odds: Shape ``(N, L)``: higher is surer. Attributes are predicted where it is positive, classes
            where it is highest.
        y: Class numbers ``(N,)`` int64, or attributes ``(N, L)``, 0 or 1.

    Raises:
        ValueError: If the shapes do not agree or there are no data.
    """
    log_odds, y = log_odds.detach().double().cpu(), y.detach().cpu()
    if log_odds.ndim != 2 or len(log_odds) < 1 or len(y) != len(log_odds):
        raise ValueError(
            f"log_odds and y must have shapes (N, L) and (N,) or (N, L), "
            f"got {tuple(log_odds.shape)} and {tuple(y.shape)}"
        )
    labels = log_odds.shape[1]
    if y.ndim == 1:
        if not 0 <= int(y.min()) <= int(y.max()) < labels:
            raise ValueError(f"y must lie in 0 ... {labels - 1}, got {int(y.min())} ... {int(y.max())}")
        right = log_odds.argmax(-1) == y
        shares = [right[y == i].double().mean() for i in range(labels)]  # NaN where a class is missing
        per_label = torch.stack(shares)
        truth = y.unsqueeze(-1) == torch.arange(labels)
        overall = exact = float(right.double().mean())
        balanced_per_label = per_label
    else:
        if y.shape != log_odds.shape:
            raise ValueError(f"y must have shape {tuple(log_odds.shape)}, got {tuple(y.shape)}")
        truth = y > 0.5
        hits = (log_odds > 0) == truth
        per_label = hits.double().mean(0)
        overall, exact = float(per_label.mean()), float(hits.all(-1).double().mean())
        found = torch.stack([_share(hits, truth), _share(hits, ~truth)])
        balanced_per_label = found.nanmean(0)
    auc = _auc(log_odds, truth)
    return Accuracy(
        overall,
        float(balanced_per_label.nanmean()),
        float(auc.nanmean()),
        exact,
        per_label,
        balanced_per_label,
        auc,
        len(y),
    )


def rare_combinations(
    y_train: Tensor,
    max_rate: float = 0.005,
    min_count: int = 1,
    kind: Literal["pairs", "vectors"] = "pairs",
) -> tuple[Combination, ...]:
    """Find the combinations of attribute values that training seldom showed.

    Args:
        y_train: Labels of the training data: attributes ``(N, L)``, 0 or 1. Class numbers ``(N,)`` have no
            combinations, and none are found.
        max_rate: Frequency that a rare combination stays below.
        min_count: Times it must occur at least; 0 also finds pairs never seen.
        kind: ``"pairs"``: values of two attributes, as in "male, heavy make-up". ``"vectors"``: values of
            all attributes; those that never occur are not listed.

    Returns:
        The combinations, rarest first.

    Raises:
        ValueError: For an unknown kind, or labels of another shape.
    """
    if kind not in ("pairs", "vectors"):
        raise ValueError(f"kind must be 'pairs' or 'vectors', got {kind!r}")
    if y_train.ndim not in (1, 2) or len(y_train) < 1:
        raise ValueError(f"y_train must have shape (N,) or (N, L), got {tuple(y_train.shape)}")
    if y_train.ndim == 1:
        return ()
    y = (y_train.detach().cpu() > 0.5).double()
    found: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
    if kind == "pairs":
        tables = {
            values: _indicator(y, values[0]).T @ _indicator(y, values[1])
            for values in product((0, 1), repeat=2)
        }
        for columns in combinations(range(y.shape[1]), 2):
            found += [(columns, values, int(table[columns])) for values, table in tables.items()]
    else:
        vectors, counts = torch.unique(y, dim=0, return_counts=True)
        everything = tuple(range(y.shape[1]))
        for vector, count in zip(vectors.int().tolist(), counts.tolist(), strict=True):
            found.append((everything, tuple(vector), count))
    rare = [
        Combination(columns, values, count, count / len(y))
        for columns, values, count in found
        if count >= min_count and count / len(y) < max_rate
    ]
    return tuple(sorted(rare, key=lambda c: (c.count, c.columns, c.values)))


def label_scores(
    classifier: Scorer,
    x: Tensor,
    y: Tensor,
    ceiling: Split | tuple[Tensor, Tensor] | None = None,
    rare: Sequence[Combination] | None = None,
    names: Sequence[str] | None = None,
) -> LabelScores:
    """Score generated data against the labels they were generated from.

    Args:
        classifier: A :class:`LabelClassifier` trained on real training data, or anything with ``log_odds``.
        x: Generated data, shape ``(N, *x_shape)``.
        y: Their labels: class numbers ``(N,)`` int64, or attributes ``(N, L)``.
        ceiling: Real held-out data with their labels, a split or ``(x, y)``.
        rare: Combinations from :func:`rare_combinations`, scored each for itself.
        names: Name of each label; a split given as ``ceiling`` brings its own.

    Raises:
        ValueError: If shapes do not agree, or a split has no labels.
    """
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same number of rows, got {len(x)} and {len(y)}")
    log_odds = classifier.log_odds(x).detach().cpu()
    y = y.detach().cpu()
    real: tuple[Tensor, Tensor] | None = None
    if isinstance(ceiling, Split):
        if ceiling.y is None:
            raise ValueError("ceiling must have labels, got a split without")
        names = names or ceiling.attribute_names or ceiling.class_names
        ceiling = ceiling.x, ceiling.y
    if ceiling is not None:
        real = classifier.log_odds(ceiling[0]).detach().cpu(), ceiling[1].detach().cpu()
    if names is not None and len(names) != log_odds.shape[1]:
        raise ValueError(f"names must have {log_odds.shape[1]} entries, got {len(names)}")
    guess = _majority(y, log_odds.shape[1])
    return LabelScores(
        generated=accuracy_of(log_odds, y),
        ceiling=None if real is None else accuracy_of(*real),
        majority=accuracy_of(guess, y),
        rare=tuple(_rare_score(c, log_odds, y, real, guess) for c in rare or ()),
        names=None if names is None else tuple(names),
    )


def _rare_score(
    combination: Combination,
    log_odds: Tensor,
    y: Tensor,
    real: tuple[Tensor, Tensor] | None,
    guess: Tensor,
) -> RareScore:
    if y.ndim != 2:
        raise ValueError(
            f"rare combinations need attributes of shape (N, L), got y of shape {tuple(y.shape)}"
        )
    meant = combination.matches(y)
    hit = combination.matches((log_odds[meant] > 0).double())
    guessed = combination.matches((guess[meant] > 0).double())
    found, num_real = math.nan, 0
    if real is not None:
        there = combination.matches(real[1])
        num_real = int(there.sum())
        found = float(combination.matches((real[0][there] > 0).double()).double().mean())
    share, majority = float(hit.double().mean()), float(guessed.double().mean())
    return RareScore(combination, int(meant.sum()), share, num_real, found, majority)


def _majority(y: Tensor, labels: int) -> Tensor:
    """Log-odds of a guess that ignores the data, shape ``(N, L)``."""
    if y.ndim == 1:
        return torch.bincount(y, minlength=labels).double().expand(len(y), labels)
    return ((y > 0.5).double().mean(0) - 0.5).expand(len(y), labels)


def _share(hits: Tensor, among: Tensor) -> Tensor:
    """Share of hits among some entries, column by column; NaN where there are none."""
    return (hits & among).sum(0).double() / among.sum(0)


def _auc(log_odds: Tensor, truth: Tensor) -> Tensor:
    from sklearn.metrics import roc_auc_score

    values = [
        roc_auc_score(is_.numpy(), score.numpy()) if 0 < int(is_.sum()) < len(is_) else math.nan
        for score, is_ in zip(log_odds.T, truth.T, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _indicator(y: Tensor, value: int) -> Tensor:
    return y if value else 1 - y


def _pooled(shares: Sequence[tuple[float, int]]) -> float:
    total = sum(number for _, number in shares)
    return sum(share * number for share, number in shares if number) / total if total else math.nan


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %" if math.isfinite(value) else ""
