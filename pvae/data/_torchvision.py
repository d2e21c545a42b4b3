"""The one place where torchvision is imported: lazily, and past operators that do not load.

A torchvision built for CUDA does not find its libraries beside a CPU-only torch. Its compiled operators
then do not load, and its import fails where it registers a fake kernel for an operator that nobody declared
(pytorch/vision issues 9077 and 9085). Data sets need none of those operators: declaring their schemas is
enough.
"""

import functools
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "datasets",
    "download_celeba",
    "download_idx",
    "inception_network",
    "read_cifar10",
    "read_idx",
    "read_square",
]


@functools.cache
def datasets() -> Any:
    """Import and return ``torchvision.datasets``."""
    with warnings.catch_warnings():
        # torchvision still decorates with torch.jit at import, which torch has deprecated.
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        try:
            return importlib.import_module("torchvision.datasets")
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare()
        return importlib.import_module("torchvision.datasets")


@functools.cache  # the declarations live as long as the library object does
def _declare() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def read_idx(kind: str, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Read one part of MNIST, FashionMNIST, KMNIST or EMNIST (letters) from checked files.

    Args:
        kind: Name of torchvision's class.
        root: Folder that holds ``<kind>/raw``.
        train: Whether to read the training part.

    Returns:
        Images, uint8, ``(N, 28, 28)``, and labels, int64, ``(N,)``, as stored.
    """
    options: dict[str, Any] = {"split": "letters"} if kind == "EMNIST" else {}
    part = getattr(datasets(), kind)(str(root), train=train, download=False, **options)
    return part.data, part.targets


def download_idx(kind: str, root: Path) -> None:
    """Download all files of such a set into ``root``; torchvision checks their sums."""
    options: dict[str, Any] = {"split": "letters"} if kind == "EMNIST" else {}
    getattr(datasets(), kind)(str(root), train=True, download=True, **options)


def read_cifar10(root: Path, *, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
    """Read one part of CIFAR-10; torchvision checks the sums of its files before it unpickles them.

    Args:
        root: Folder that holds ``cifar-10-batches-py``.
        train: Whether to read the training part.
        download: Whether to download the files first.

    Returns:
        Images, uint8, ``(N, 3, 32, 32)``, and labels, int64, ``(N,)``.
    """
    part = datasets().CIFAR10(str(root), train=train, download=download)
    images = torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)))
    return images, torch.tensor(part.targets, dtype=torch.int64)


def read_square(path: Path, size: int) -> Tensor:
    """Read an image in colour, resize its shorter side to ``size`` and keep the middle square.

    As ``Resize(size)`` and ``CenterCrop(size)`` of torchvision do, bilinearly.

    Args:
        path: An image file.
        size: Height and width of the result.

    Returns:
        The image, uint8, ``(3, size, size)``.
    """
    image = datasets().folder.pil_loader(path)
    functional = importlib.import_module("torchvision.transforms.functional")
    square: Tensor = functional.pil_to_tensor(
        functional.center_crop(functional.resize(image, [size]), [size])
    )
    return square


def download_celeba(root: Path) -> None:
    """Download all files of CelebA into ``root``; torchvision checks their sums and unpacks the images."""
    datasets().CelebA(str(root), split="all", download=True)


def inception_network() -> Any:
    """Return torchvision's Inception v3 without weights; nothing is downloaded."""
    datasets()  # past the operators that do not load
    models = importlib.import_module("torchvision.models")
    return models.inception_v3(weights=None, init_weights=False, transform_input=False)
