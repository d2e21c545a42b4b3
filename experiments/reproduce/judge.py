"""What real data of a set look like to a classifier: worked out once, and the same for all cells."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.data import Data, Split
from pvae.evaluation import (
    Combination,
    LabelClassifier,
    fit_classifier,
    rare_combinations,
)
from pvae.files import locked

from .study import Context

__all__ = ["HeldOut", "Judge", "evenly", "held_out", "judge"]

_TRAIN = 10_000  # training data among which a sample's nearest neighbour is sought


class HeldOut(NamedTuple):
    """Three views of the test split, each spread evenly over it, since some test sets are sorted.

    Attributes:
        scored: Data whose likelihood is estimated.
        shown: Data that are reconstructed, and whose labels samples are drawn for.
        real: As many others, which samples are compared with.
    """

    scored: Split
    shown: Split
    real: Split


class Judge(NamedTuple):
    """A trained classifier and the features of real data.

    Attributes:
        classifier: Trained on the training split.
        held_out: The test split's three views.
        shown: Features of ``held_out.shown``, shape ``(N, F)``.
        real: Features of ``held_out.real``, shape ``(N, F)``.
        train: Features of training data spread evenly, shape ``(M, F)``.
        rare: Pairs of attribute values that fewer than 0.5 % of the training data show.
    """

    classifier: LabelClassifier
    held_out: HeldOut
    shown: Tensor
    real: Tensor
    train: Tensor
    rare: tuple[Combination, ...]

    def features(self, x: Tensor) -> Tensor:
        """Return the features of pictures, whose values are cut off at 0 and 1."""
        return self.classifier.features(x.clamp(0, 1))


@functools.lru_cache(maxsize=1)
def judge(data: Data, context: Context) -> Judge:
    """Return the judge of a data set; the classifier is trained by the first process that asks for it."""
    path = context.shared / f"classifier-{data.train.protocol.hash}.safetensors"
    with locked(path.with_suffix(".lock")):
        if not path.is_file():
            fit_classifier(
                data.train,
                data.valid if "valid" in data.parts else None,
                epochs=context.scale.classifier_epochs,
                device=context.device,
                progress=False,
            ).save(path)
    classifier = LabelClassifier.load(path, context.device)
    held = held_out(data, context)
    y = data.train.y
    return Judge(
        classifier,
        held,
        classifier.features(held.shown.x),
        classifier.features(held.real.x),
        classifier.features(evenly(data.train, _TRAIN).x),
        () if y is None else rare_combinations(y, min_count=0),
    )


def held_out(data: Data, context: Context) -> HeldOut:
    """Cut the test split into its three views."""
    test, scale = data.test, context.scale
    half = len(test) // 2
    number = min(scale.num_images, half)
    # Every other datum on either side: both halves are alike even where the split is sorted.
    even = 2 * torch.linspace(0, half - 1, number, dtype=torch.float64).long()
    return HeldOut(evenly(test, scale.num_data), test[even + 1], test[even])


def evenly(split: Split, number: int) -> Split:
    """Take at most so many data, spread evenly."""
    if number >= len(split):
        return split
    return split[torch.linspace(0, len(split) - 1, number, dtype=torch.float64).long()]
