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

import torch
from torch import Tensor

__all__ = [
    "cifar10_sums",
    "datasets",
    "download_celeba",
    "download_cifar10",
    "download_idx",
    "inception_network",
    "read_square",
]

_FORMATS = ("JPEG", "PNG")
# Pixels of an image, 48 MiB of them in colour, and its longer side in shorter ones.
_PIXELS, _LONGEST = 2**24, 8


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


def download_idx(kind: str, root: Path) -> None:
    """Download all files of such a set into ``root``; torchvision checks their sums."""
    options: dict[str, Any] = {"split": "letters"} if kind == "EMNIST" else {}
    getattr(datasets(), kind)(str(root), train=True, download=True, **options)


def cifar10_sums() -> dict[str, str]:
    """MD5 sums of the files of CIFAR-10 that hold images, by name, as published."""
    published = datasets().CIFAR10
    return dict((*published.train_list, *published.test_list))


def download_cifar10(root: Path) -> None:
    """Download CIFAR-10 into ``root``; torchvision checks the sums of the archive and of its files."""
    datasets().CIFAR10(str(root), train=True, download=True)


def read_square(path: Path, size: int) -> Tensor:
    """Read an image in colour, resize its shorter side to ``size`` and keep the middle square.

    As ``Resize(size)`` and ``CenterCrop(size)`` of torchvision do, bilinearly. Size and format are known
    before anything is decoded: of Pillow's decoders one runs another program, and a small file can be a
    picture of gigabytes.

    Args:
        path: An image file, JPEG or PNG.
        size: Height and width of the result.

    Returns:
        The image, uint8, ``(3, size, size)``.

    Raises:
        OSError: If it is no such file, or is truncated.
        ValueError: If it has far more pixels than a photograph, or is a strip.
        SyntaxError: If it is broken inside.
    """
    datasets()  # past the operators that do not load
    pillow = importlib.import_module("PIL.Image")
    functional = importlib.import_module("torchvision.transforms.functional")
    try:
        with pillow.open(path, formats=_FORMATS) as image:
            short, long = sorted(image.size)
            if short * long > _PIXELS or long > _LONGEST * short:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            colour = image.convert("RGB")
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise ValueError(str(error)) from error
    square: Tensor = functional.pil_to_tensor(
        functional.center_crop(functional.resize(colour, [size]), [size])
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
