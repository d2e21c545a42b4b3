"""Samples of a model against real data in features: distances, coverage and copies, each with what held-out
data score in the samples' place.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pvae.data import Data, Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program
from pvae.inference.progress import reporting

from .features import FeatureExtractor, fit_classifier
from .frechet import frechet_distance, frechet_interval, nearest_distance
from .interval import Interval
from .kernel_distance import KernelDistance, kernel_distance
from .latents import _run, _wide
from .precision_recall import PrecisionRecall, precision_recall
from .weights import held_out

__all__ = ["SampleQuality", "Shown", "sample_quality", "shown"]

Shown = Literal["draws", "means"]

_ROWS = 500  # data in one pass
_MOST = 10_000
_FEWEST = 20


@dataclass(frozen=True)
class SampleQuality:
    """Samples against test data, and training data against the same test data: the floor.

    All four sets that are compared have the same number of data N, as every figure but the kernel distance
    depends on it.

    Attributes:
        frechet: Frechet distance, squared, in squared units of the features. Biased upwards, by the more the
            fewer the data (about as much as ``frechet_floor`` is above zero).
        frechet_floor: That of training data.
        kernel: Kernel distance, unbiased.
        kernel_floor: That of training data.
        precision_recall: Precision, recall, density and coverage.
        precision_recall_floor: Those of training data: what a perfect model is expected to score.
        nearest: Distance of each sample to its nearest training datum in features, shape ``(N,)``, double.
        nearest_floor: That of each test datum.
        num_samples: N.
        shown: Whether samples are draws of x or means of p(x | z).
        extractor: What made the features.
        seed: Seed of all draws.
        protocol: What the test data were.
    """

    frechet: Interval
    frechet_floor: float
    kernel: KernelDistance
    kernel_floor: KernelDistance
    precision_recall: PrecisionRecall
    precision_recall_floor: PrecisionRecall
    nearest: Tensor
    nearest_floor: Tensor
    num_samples: int
    shown: Shown
    extractor: str
    seed: int
    protocol: dict[str, Any] | None = None

    @property
    def copying(self) -> float:
        """Median distance of samples to the training data over that of test data; far below 1: copies."""
        floor = float(self.nearest_floor.median())
        return float(self.nearest.median()) / floor if floor > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold (what is not finite is ``None``)."""
        frechet = {name: _finite(value) for name, value in vars(self.frechet).items()}
        kernel, floor = (
            {name: _finite(value) for name, value in asdict(found).items()}
            for found in (self.kernel, self.kernel_floor)
        )
        return {
            "frechet": frechet,
            "frechet_floor": self.frechet_floor,
            "kernel": kernel,
            "kernel_floor": floor,
            "precision_recall": asdict(self.precision_recall),
            "precision_recall_floor": asdict(self.precision_recall_floor),
            "copying": _finite(self.copying),
            "num_samples": self.num_samples,
            "shown": self.shown,
            "extractor": self.extractor,
            "seed": self.seed,
            "protocol": self.protocol,
            "per_datum": {"nearest": self.nearest.tolist(), "nearest_floor": self.nearest_floor.tolist()},
        }

    def to_markdown(self) -> str:
        """Write the table, samples beside the floor."""
        ours, floor = self.precision_recall, self.precision_recall_floor
        rows = [
            ("Frechet distance (biased upwards)", str(self.frechet), f"{self.frechet_floor:.4g}"),
            ("kernel distance (unbiased)", str(self.kernel), str(self.kernel_floor)),
            *(
                (name, f"{getattr(ours, name):.3f}", f"{getattr(floor, name):.3f}")
                for name in ("precision", "recall", "density", "coverage")
            ),
            (
                "median distance to the training data",
                f"{float(self.nearest.median()):.4g}",
                f"{float(self.nearest_floor.median()):.4g} (test data)",
            ),
        ]
        head = (
            f"| {self.num_samples} {self.shown}, {self.extractor} | samples | training data |\n|---|---|---|"
        )
        return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows)])

    def __str__(self) -> str:
        return (
            f"Frechet {self.frechet} (biased upwards; training data {self.frechet_floor:.4g}), kernel "
            f"{self.kernel} (unbiased; training data {self.kernel_floor}), {self.precision_recall} "
            f"({self.num_samples} {self.shown} against as many test data, {self.extractor})"
        )


def sample_quality(
    model: Program,
    data: Data,
    *,
    features: FeatureExtractor | None = None,
    num_samples: int | None = None,
    values: Shown = "draws",
    neighbours: int = 3,
    num_bootstrap: int = 100,
    seed: int = 0,
    progress: bool | None = None,
) -> SampleQuality:
    """Compare samples of a model with test data, and training data with the same test data.

    The distances are in squared units of the features and mean nothing by themselves: what training data
    score against test data, with as many data on each side, is what samples of the true distribution
    would. A Frechet distance grows as samples shrink, whatever the model, and precision and recall change
    with N too: values for different N, or in features of different extractors, do not compare. No value is
    an FID or KID but in the features of their Inception network.

    A conditional model draws under the labels of the test data. The model runs in evaluation mode and is
    left, as are all random generators, as it was.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``, with the data at site ``"x"``.
        data: A data set with training and test parts.
        features: Maps data ``(N, *x_shape)`` to features ``(N, F)``. By default those of a classifier that
            is trained on the labelled training part (see :func:`fit_classifier`, which is best called once
            for several models).
        num_samples: Number N of samples and of test and training data they are compared with, at least 20;
            by default as many as both parts have, at most 10,000.
        values: ``"draws"``: x drawn from p(x | z), which is the model. ``"means"``: means of p(x | z), which
            is what is usually shown; they lack the noise of the data.
        neighbours: See :func:`precision_recall`.
        num_bootstrap: Resamples for the interval of the Frechet distance.
        seed: Seed of all draws.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: If N is out of range, there are no labels to train a classifier with, features are no
            matrix, or means are asked for of a distribution that has none.
        TypeError: If ``data`` is no data set.
        pvae.data.MissingPart: If it lacks a part.

    Example:
        >>> judge = fit_classifier(data.train, data.valid)  # doctest: +SKIP
        >>> print(sample_quality(model, data, features=judge.features))  # doctest: +SKIP
    """
    if not isinstance(data, Data):
        raise TypeError(f"data must be a data set with train and test parts, got {type(data).__name__}")
    if values not in ("draws", "means"):
        raise ValueError(f"values must be 'draws' or 'means', got {values!r}")
    least = min(len(data.train), len(data.test))
    num = min(least, _MOST) if num_samples is None else num_samples
    if not _FEWEST <= num <= least:
        raise ValueError(
            f"num_samples must lie between {_FEWEST} and {least}, the size of the smaller part, got {num}"
        )
    name = "features given"
    if features is None:
        if data.train.y is None:
            raise ValueError("features must be given: the data have no labels to train a classifier with")
        valid = data.valid if "valid" in data.parts else None
        features = fit_classifier(data.train, valid, seed=seed, progress=progress).features
        name = "features of a classifier of these data"
    train, test = (_some(split, num, seed + i) for i, split in enumerate((data.train, data.test)))
    x, y, protocol = held_out(model, test, None)
    device = device_of(model)
    # What is drawn from a normal may lie beyond the range that the extractor knows.
    unit = data.protocol.values in ("binary", "unit")
    with evaluating(model), reporting("samples", 3 * num, progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        torch.manual_seed(seed)
        sets = []
        for made in (_samples(model, x, y, values), test.x.to(device).split(_ROWS), train.x.split(_ROWS)):
            # An extractor is asked about data as the set has them, whatever the precision of the programs.
            sets.append(_features(features, (part.to(test.x.dtype) for part in made), unit))
            report(len(sets) * num)
    ours, real, other = sets
    return SampleQuality(
        frechet=frechet_interval(ours, real, num_bootstrap, seed),
        frechet_floor=frechet_distance(other, real),
        kernel=kernel_distance(ours, real, seed=seed),
        kernel_floor=kernel_distance(other, real, seed=seed),
        precision_recall=precision_recall(real, ours, neighbours=neighbours),
        precision_recall_floor=precision_recall(real, other, neighbours=neighbours),
        nearest=nearest_distance(ours, other),
        nearest_floor=nearest_distance(real, other),
        num_samples=num,
        shown=values,
        extractor=name,
        seed=seed,
        protocol=protocol,
    )


def shown(fn: Any, values: Shown) -> Tensor:
    """A draw from p(x | z), or its mean.

    Raises:
        ValueError: If the mean is asked for and there is none.
    """
    if values == "draws":
        draw: Tensor = fn.sample()
        return draw
    try:
        mean: Tensor = fn.mean
    except NotImplementedError:
        raise ValueError(
            f"values must be 'draws' for a {type(fn).__name__}, which has no mean, got 'means'"
        ) from None
    return mean


def _some(split: Split, num: int, seed: int) -> Split:
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split[order[:num].sort().values]


def _samples(model: Program, x: Tensor, y: Tensor | None, values: Shown) -> Iterator[Tensor]:
    """Run the model freely under the contexts of some data."""
    for start in range(0, len(x), _ROWS):
        part = slice(start, start + _ROWS)
        yield shown(_run(model, x[part], None if y is None else y[part])["x"].fn, values).to(x)


def _features(features: FeatureExtractor, parts: Any, unit: bool) -> Tensor:
    """Features of some data, in double precision on the CPU."""
    found = []
    with evaluating(*([features] if isinstance(features, nn.Module) else [])):
        for part in parts:
            value = features(part.clamp(0, 1) if unit else part)
            if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != len(part):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"features must return shape ({len(part)}, F), got {got}")
            found.append(_wide(value))
    return torch.cat(found)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
