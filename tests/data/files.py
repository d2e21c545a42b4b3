"""Files in the on-disk formats that the loaders read: of full size, mostly empty, for any machine."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["write_all", "write_celeba", "write_emnist", "write_idx", "write_mnist", "write_npz"]

NPZ = {
    "omniglot": "omniglot/omniglot_28x28.npz",
    "binarized_mnist": "binarized_mnist/binarized_mnist.npz",
    "freyfaces": "freyfaces/freyfaces.npz",
    "cifar10": "cifar10/cifar10_train_first4000_lossless.npz",
}


def write_idx(path: Path, shape: tuple[int, ...], values: NDArray[np.uint8]) -> None:
    """Write an idx file of bytes whose first entries are ``values`` and whose rest is a hole of zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = b"".join(number.to_bytes(4, "big") for number in (0x0800 + len(shape), *shape))
    with path.open("wb") as file:
        file.write(header + values.tobytes())
        file.truncate(len(header) + int(np.prod(shape)))


def write_mnist(root: Path, kind: str = "MNIST") -> None:
    """Write the four files of MNIST, FashionMNIST or KMNIST."""
    generator = np.random.default_rng(0)
    for part, number in (("train", 60_000), ("t10k", 10_000)):
        images = generator.integers(0, 256, (200, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, number, dtype=np.uint8)
        write_idx(root / kind / "raw" / f"{part}-images-idx3-ubyte", (number, 28, 28), images)
        write_idx(root / kind / "raw" / f"{part}-labels-idx1-ubyte", (number,), labels)


def write_emnist(root: Path, parts: tuple[str, ...] = ("train", "test")) -> None:
    """Write the letters of EMNIST; the first image of each part is a bar along its stored first row."""
    generator = np.random.default_rng(0)
    for part, number in (("train", 124_800), ("test", 20_800)):
        if part in parts:
            images = generator.integers(0, 256, (200, 28, 28), dtype=np.uint8)
            images[0] = 0
            images[0, 0] = 255
            labels = generator.integers(1, 27, number, dtype=np.uint8)
            stem = root / "EMNIST" / "raw" / f"emnist-letters-{part}"
            write_idx(Path(f"{stem}-images-idx3-ubyte"), (number, 28, 28), images)
            write_idx(Path(f"{stem}-labels-idx1-ubyte"), (number,), labels)


def write_npz(root: Path, name: str) -> None:
    """Write one of the NumPy archives."""
    generator = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.generic]] = {}
    if name == "omniglot":
        images = np.zeros((32_460, 28, 28), np.uint8)
        images[:200] = generator.integers(0, 256, (200, 28, 28))
        character = np.repeat(np.arange(1, 1_624, dtype=np.int16), 20)
        arrays["images"] = images
        arrays["character"] = character
        arrays["drawer"] = np.tile(np.arange(1, 21, dtype=np.uint8), 1_623)
        arrays["alphabet"] = (character.astype(np.int64) * 50 // 1_624).astype(np.uint8)
        arrays["alphabet_names"] = np.array([f"alphabet {i}" for i in range(50)])
    elif name == "binarized_mnist":
        for part, number in (("train", 50_000), ("valid", 10_000), ("test", 10_000)):
            bits = np.zeros((number, 784), np.uint8)
            bits[:200] = generator.integers(0, 2, (200, 784))
            arrays[part] = bits
            arrays[f"{part}_labels_matched"] = generator.integers(0, 10, number, dtype=np.uint8)
    elif name == "freyfaces":
        arrays["images"] = generator.integers(0, 256, (1_965, 28, 20), dtype=np.uint8)
    else:
        images = np.zeros((4_000, 32, 32, 3), np.uint8)
        images[:200] = generator.integers(0, 256, (200, 32, 32, 3))
        arrays["images"] = images
        arrays["labels"] = generator.integers(0, 10, 4_000, dtype=np.uint8)
    path = root / NPZ[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def write_celeba(root: Path, parts: str = "001021102000") -> tuple[list[str], NDArray[np.int64]]:
    """Write a tiny CelebA: an image for each character of ``parts``, and the two lists.

    The list of the partition is in the reverse order; the second image is as wide as others are high, and
    attributes 7, 8 and 9 are equally frequent.

    Returns:
        Names of the images, and their attributes, -1 or 1, ``(N, 40)``.
    """
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    files = [f"{i + 1:06d}.jpg" for i in range(len(parts))]
    for i, file in enumerate(files):
        blocks = generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)
        size = (218, 178) if i == 1 else (178, 218)
        Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(folder / file, quality=90)
    rates = generator.permutation(np.linspace(0.05, 0.95, 40))
    values = np.where(generator.random((len(files), 40)) < rates, 1, -1)
    values[:, 8:10] = values[:, 7:8]
    rows = [
        f"{file}  {' '.join(f'{value:2d}' for value in row)}" for file, row in zip(files, values, strict=True)
    ]
    header = [str(len(files)), " ".join(f"Attribute_{i}" for i in range(40)) + " "]
    (root / "celeba" / "list_attr_celeba.txt").write_text("\n".join([*header, *rows]) + "\n")
    lines = [f"{file} {part}" for file, part in zip(files, parts, strict=True)]
    (root / "celeba" / "list_eval_partition.txt").write_text("\n".join(lines[::-1]) + "\n")
    return files, values


def write_all(root: Path) -> None:
    """Write every set but the whole CIFAR-10, whose files torchvision knows by their sums."""
    for kind in ("MNIST", "FashionMNIST", "KMNIST"):
        write_mnist(root, kind)
    write_emnist(root)
    for name in NPZ:
        write_npz(root, name)
