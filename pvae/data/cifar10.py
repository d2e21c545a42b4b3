"""CIFAR-10, whole through torchvision, or a lossless subset where that is what there is (Krizhevsky 2009)."""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from . import _torchvision
from ._files import missing
from ._npz import Expected, read_npz
from ._pickled import read_batch
from ._request import Request
from .dataset import Source
from .errors import CorruptData, DataError, MissingData

__all__ = ["cifar10"]

_FOLDER = "cifar-10-batches-py"
_SUBSET = "cifar10/cifar10_train_first4000_lossless.npz"
_SUBSET_TEST = 500
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(request: Request, *, source: str = "auto") -> Source:
    """Read CIFAR-10, ``x_shape (3, 32, 32)``, ten classes.

    The whole set (``cifar-10-batches-py``) has 50,000 training images, of which the last 5,000 (``valid``)
    are the validation part, and 10,000 test images. The subset
    (``cifar10/cifar10_train_first4000_lossless.npz``: ``images`` (4000, 32, 32, 3) uint8, ``labels``) is
    the first 4,000 training images; its last 500 are held out for testing, the 500 before them (``valid``)
    for validation. The protocol says which was read.

    Args:
        request: What is asked for.
        source: ``"full"``, ``"subset"``, or ``"auto"``: the whole set where it is on disk or may be
            downloaded, else the subset.
    """
    if source not in ("auto", "full", "subset"):
        raise DataError(f"source must be 'auto', 'full' or 'subset', got {source!r}")
    whole = (request.root / _FOLDER).is_dir() or request.download
    if source == "full" or (source == "auto" and whole):
        return _full(request)
    if source == "auto" and not (request.root / _SUBSET).is_file():
        raise missing(request.name, f"{_FOLDER} or {_SUBSET}", request.root, ", or pass download=True")
    return _first_4000(request)


def _full(request: Request) -> Source:
    parts = {}
    if not (request.root / _FOLDER).is_dir() and not request.download:
        raise missing(request.name, _FOLDER, request.root, ", or pass download=True")
    try:
        parts["train"], parts["test"] = _read(request.root)
    except CorruptData:
        if not request.download:
            raise
        _download(request)
        parts["train"], parts["test"] = _read(request.root)
    return Source(
        kind="levels",
        levels=256,
        binarize=None,
        split="validation: last of train",
        parts={**request.hold_out(*parts["train"], default=5_000), "test": parts["test"]},
        class_names=_CLASSES,
    )


def _read(root: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    parts = []
    sums = _torchvision.cifar10_sums()
    for files in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]):
        try:
            batches = [read_batch(root / _FOLDER / file, sums[file]) for file in files]
            images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
            x, y = torch.from_numpy(images), torch.tensor([y for batch in batches for y in batch["labels"]])
        # An unpickled file of the wrong make fails in ways of its own (KeyError, EOFError, UnpicklingError).
        except Exception as error:
            raise CorruptData(
                f"cifar10: the batches in {_FOLDER} must be the published files, whole: {error} "
                "(download=True fetches them again)"
            ) from error
        number = 10_000 * len(files)
        if len(x) != number or x.dtype != torch.uint8 or y.shape != (number,) or y.dtype != torch.int64:
            raise CorruptData(
                f"cifar10: {', '.join(files)} must hold {number} images of 3 x 32 x 32, "
                f"got {len(x)}, {x.dtype}, with labels {tuple(y.shape)}, {y.dtype}"
            )
        if not 0 <= int(y.min()) <= int(y.max()) <= 9:
            raise CorruptData(f"cifar10: labels must lie in 0 ... 9, got {int(y.min())} ... {int(y.max())}")
        parts.append((x, y))
    return parts


def _download(request: Request) -> None:
    """Download to a temporary folder, check there, and only then put the files in place."""
    try:
        request.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=request.root) as folder:
            _torchvision.download_cifar10(Path(folder))
            (request.root / _FOLDER).mkdir(exist_ok=True)
            for file in sorted((Path(folder) / _FOLDER).iterdir()):
                os.replace(file, request.root / _FOLDER / file.name)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise MissingData(f"cifar10 could not be downloaded to {request.root}: {reason}") from error


def _first_4000(request: Request) -> Source:
    arrays = read_npz(
        request.name,
        request.root,
        _SUBSET,
        {"images": Expected("u", (4_000, 32, 32, 3)), "labels": Expected("i", (4_000,), 0, 9)},
    )
    x = torch.from_numpy(np.ascontiguousarray(arrays["images"].transpose(0, 3, 1, 2)))
    y = torch.from_numpy(arrays["labels"].astype(np.int64))
    rest = request.hold_out(x[:-_SUBSET_TEST], y[:-_SUBSET_TEST], default=500)
    return Source(
        kind="levels",
        levels=256,
        binarize=None,
        split="first 4,000 training images: train, validation, test in their order",
        parts={**rest, "test": (x[-_SUBSET_TEST:], y[-_SUBSET_TEST:])},
        note="lossless subset, tested on held-out training images; not comparable with the official test set",
        class_names=_CLASSES,
    )
