"""MNIST and its relatives in the idx format: MNIST, Fashion-MNIST, Kuzushiji-MNIST, EMNIST letters."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from . import _torchvision
from ._files import check_idx, missing, read_idx
from ._request import Request
from .dataset import Source
from .errors import CorruptData, DataError, MissingData

__all__ = ["emnist", "fashion_mnist", "kmnist", "mnist"]


@dataclass(frozen=True)
class _Idx:
    """A set of torchvision's idx format: its class there, its files and what they hold."""

    kind: str
    train: tuple[str, str, int]
    test: tuple[str, str, int]
    labels: tuple[int, int] = (0, 9)

    def files(self, parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """Expected shape of each file, by its path under the data root."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in parts:
            images, labels, number = self.train if part == "train" else self.test
            shapes[f"{self.kind}/raw/{images}"] = (number, 28, 28)
            shapes[f"{self.kind}/raw/{labels}"] = (number,)
        return shapes


def _like_mnist(kind: str) -> _Idx:
    return _Idx(
        kind,
        train=("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 60_000),
        test=("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 10_000),
    )


_EMNIST = _Idx(
    "EMNIST",
    train=("emnist-letters-train-images-idx3-ubyte", "emnist-letters-train-labels-idx1-ubyte", 124_800),
    test=("emnist-letters-test-images-idx3-ubyte", "emnist-letters-test-labels-idx1-ubyte", 20_800),
    labels=(1, 26),
)


def mnist(request: Request) -> Source:
    """Read MNIST (LeCun et al. 1998), ``x_shape (1, 28, 28)``, ten classes.

    The last 10,000 of the 60,000 training images (``valid``) are the validation part.
    """
    source = _ten_classes(request, _like_mnist("MNIST"), tuple(str(digit) for digit in range(10)))
    source.binarize = "dynamic"
    return source


def fashion_mnist(request: Request) -> Source:
    """Read Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747), ``x_shape (1, 28, 28)``, ten classes.

    The last 10,000 of the 60,000 training images (``valid``) are the validation part.
    """
    names = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot"
    return _ten_classes(request, _like_mnist("FashionMNIST"), tuple(names.split()))


def kmnist(request: Request) -> Source:
    """Read Kuzushiji-MNIST (Clanuwat et al. 2018, arXiv:1812.01718), ``x_shape (1, 28, 28)``, ten classes.

    The last 10,000 of the 60,000 training images (``valid``) are the validation part.
    """
    names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    source = _ten_classes(request, _like_mnist("KMNIST"), names)
    source.binarize = "dynamic"
    return source


def emnist(request: Request, *, parts: str = "all") -> Source:
    """Read the letters of EMNIST (Cohen et al. 2017, arXiv:1702.05373), ``x_shape (1, 28, 28)``, 26 classes.

    Images are stored transposed; here they are upright. Labels 1 ... 26 become 0 ... 25. The last 20,800 of
    the 124,800 training images (``valid``) are the validation part, as many as there are test images.

    Args:
        request: What is asked for.
        parts: ``"all"``, or ``"test"`` for the test part alone, which is all that scoring letters under a
            model of something else takes.
    """
    if parts not in ("all", "test"):
        raise DataError(f"parts must be 'all' or 'test', got {parts!r}")
    wanted = ("train", "test") if parts == "all" else ("test",)
    try:
        read = _read(request, _EMNIST, wanted)
    except MissingData as error:
        there = all((request.root / file).is_file() for file in _EMNIST.files(("test",)))
        if parts == "all" and there:
            raise MissingData(f"{error}; the test part is there, parts='test' loads it alone") from error
        raise
    upright = {part: (x.transpose(-1, -2).contiguous(), y - 1) for part, (x, y) in read.items()}
    source = _source(request, upright, valid=20_800)
    source.binarize = "dynamic"
    source.class_names = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return source


def _ten_classes(request: Request, idx: _Idx, class_names: tuple[str, ...]) -> Source:
    source = _source(request, _read(request, idx, ("train", "test")), valid=10_000)
    source.class_names = class_names
    return source


def _source(request: Request, read: dict[str, tuple[Tensor, Tensor]], *, valid: int) -> Source:
    parts: dict[str, tuple[Tensor, Tensor | None]] = {}
    if "train" in read:
        parts.update(request.hold_out(*read["train"], default=valid))
    elif request.valid is not None:
        raise DataError(f"valid must be None without a training part, got {request.valid}")
    parts["test"] = read["test"]
    split = "validation: last of train" if "train" in read else "test part alone"
    return Source(kind="levels", levels=256, binarize=None, split=split, parts=parts)


def _read(request: Request, idx: _Idx, parts: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Read whole parts: images uint8 ``(N, 1, 28, 28)``, labels int64 ``(N,)``, checked."""
    try:
        _check(request.name, idx, request.root, parts)
    except (MissingData, CorruptData):
        if not request.download:
            raise
        _download(request, idx)
    read = {}
    for part in parts:
        images, labels, number = idx.train if part == "train" else idx.test
        folder = request.root / idx.kind / "raw"
        x = read_idx(request.name, folder / images, (number, 28, 28))
        y = read_idx(request.name, folder / labels, (number,)).long()
        low, high = idx.labels
        if not low <= int(y.min()) <= int(y.max()) <= high:
            raise CorruptData(
                f"{request.name}: labels in {labels} must lie in {low} ... {high}, "
                f"got {int(y.min())} ... {int(y.max())}"
            )
        read[part] = (x.unsqueeze(1), y)
    return read


def _check(name: str, idx: _Idx, root: Path, parts: tuple[str, ...]) -> None:
    """Check that every file is there, and whole by its header and its size."""
    files = idx.files(parts)
    for file in files:
        if not (root / file).is_file():
            raise missing(name, file, root, ", or pass download=True")
    for file, shape in files.items():
        check_idx(name, root / file, shape)


def _download(request: Request, idx: _Idx) -> None:
    """Download to a temporary folder beside the files, check there, and only then put the files in place."""
    try:
        request.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=request.root) as folder:
            _torchvision.download_idx(idx.kind, Path(folder))
            _check(request.name, idx, Path(folder), ("train", "test"))
            for file in idx.files(("train", "test")):
                (request.root / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(folder) / file, request.root / file)
    except DataError:
        raise
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise MissingData(f"{request.name} could not be downloaded to {request.root}: {reason}") from error
