"""Scikit-learn's 8x8 digits: 1,797 images of 17 levels, in every installation (Alpaydin and Kaynak 1998)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._request import Request
from ._seeds import derive_seed
from .dataset import Source

__all__ = ["digits"]

_TEST = 300
_VALID = 200


def digits(request: Request) -> Source:
    """Read the digits, ``x_shape (1, 8, 8)``, ten classes.

    The parts are drawn once and for all, whatever ``seed`` is, each with the classes in proportion: 300 for
    testing, then ``valid`` (200) for validation, and the rest (1,297) for training. Test data do not depend
    on ``valid``. Images of one writer may stand in several parts; the set does not say who wrote what.
    """
    # Imported here: scikit-learn costs half a second, and no other set needs it.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    y = torch.from_numpy(bunch.target.astype(np.int64))
    valid = request.valid_size(_VALID, len(x) - _TEST)
    order = _stratified_order(bunch.target)
    bounds = {"test": (0, _TEST), "valid": (_TEST, _TEST + valid), "train": (_TEST + valid, len(x))}
    parts: dict[str, tuple[Tensor, Tensor | None]] = {}
    for part, (first, last) in bounds.items():
        if last > first:
            rows = torch.from_numpy(np.sort(order[first:last]))
            parts[part] = (x[rows], y[rows])
    return Source(
        kind="levels",
        levels=17,
        binarize="dynamic",
        split="stratified at random, fixed",
        parts=parts,
        class_names=tuple(str(digit) for digit in range(10)),
    )


def _stratified_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """An order in which every stretch has the classes in proportion.

    The members of a class are shuffled and placed evenly on [0, 1), each class from an offset of its own;
    sorting the places interleaves the classes.
    """
    generator = np.random.default_rng(derive_seed("digits", "split"))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(place, kind="stable")
