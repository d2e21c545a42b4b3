"""MNIST binarised once and for all, as used for published likelihoods (Larochelle and Murray 2011)."""

import numpy as np
import torch

from ._npz import Expected, read_npz
from ._request import Request
from .dataset import Source
from .errors import DataError

__all__ = ["binarized_mnist"]

_FILE = "binarized_mnist/binarized_mnist.npz"
_SIZES = {"train": 50_000, "valid": 10_000, "test": 10_000}


def binarized_mnist(request: Request, *, labels: str = "none") -> Source:
    """Read ``binarized_mnist/binarized_mnist.npz``, ``x_shape (1, 28, 28)``, with its own three parts.

    The archive holds ``train`` (50000, 784), ``valid`` (10000, 784) and ``test`` (10000, 784), uint8 in {0,
    1}, the bits of the three ``.amat`` files. The set has no labels.

    Args:
        request: What is asked for.
        labels: ``"none"``, or ``"matched"`` for the labels of the most likely MNIST originals, where the
            archive has them (``train_labels_matched`` and so on); they are not part of the published set.
    """
    if labels not in ("none", "matched"):
        raise DataError(f"labels must be 'none' or 'matched', got {labels!r}")
    request.own_valid()
    expected = {part: Expected("u", (size, 784), 0, 1) for part, size in _SIZES.items()}
    if labels == "matched":
        expected |= {f"{part}_labels_matched": Expected("i", (size,), 0, 9) for part, size in _SIZES.items()}
    arrays = read_npz(request.name, request.root, _FILE, expected, "; there is no download of this archive")
    source = Source(
        kind="levels",
        levels=2,
        binarize="static",
        split="the published parts",
        note="bits of Larochelle and Murray; train and valid are a shuffled split of MNIST's training images",
    )
    for part in _SIZES:
        y = None
        if labels == "matched":
            y = torch.from_numpy(arrays[f"{part}_labels_matched"].astype(np.int64))
        source.parts[part] = (torch.from_numpy(arrays[part]).reshape(-1, 1, 28, 28), y)
    if labels == "matched":
        source.class_names = tuple(str(digit) for digit in range(10))
        source.note += "; labels matched to MNIST, not published"
    return source
