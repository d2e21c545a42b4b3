"""Missing, truncated, corrupt and mis-shaped files are refused in one sentence that names them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pvae.data import CorruptData, DataError, MissingData, load

from .files import NPZ, write_emnist, write_idx, write_mnist, write_npz

TRAIN_IMAGES = "MNIST/raw/train-images-idx3-ubyte"
TEST_LABELS = "MNIST/raw/t10k-labels-idx1-ubyte"


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    write_mnist(tmp_path)
    return tmp_path


def refusal(kind: type[DataError], name: str, root: Path, **options: Any) -> str:
    """The message of the error that loading gives; one sentence in one line."""
    with pytest.raises(kind) as caught:
        load(name, root=root, **options)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(name)
    return text


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


class TestIdx:
    @pytest.mark.parametrize("file", [TRAIN_IMAGES, TEST_LABELS])
    def test_missing(self, mnist: Path, file: str) -> None:
        (mnist / file).unlink()
        text = refusal(MissingData, "mnist", mnist)
        for part in (file, str(mnist), "PVAE_DATA", "download=True"):
            assert part in text

    def test_no_such_root(self, tmp_path: Path) -> None:
        assert "nowhere, which is no folder" in refusal(MissingData, "mnist", tmp_path / "nowhere")

    @pytest.mark.parametrize("size", [47_040_015, 16, 8, 3, 0])
    def test_truncated(self, mnist: Path, size: int) -> None:
        cut(mnist / TRAIN_IMAGES, size)
        text = refusal(CorruptData, "mnist", mnist)
        assert "train-images-idx3-ubyte" in text
        assert "download=True" in text

    def test_truncated_says_how_much(self, mnist: Path) -> None:
        cut(mnist / TEST_LABELS, 5000)
        assert "t10k-labels-idx1-ubyte must have 10008 bytes, got 5000" in refusal(
            CorruptData, "mnist", mnist
        )

    def test_too_long(self, mnist: Path) -> None:
        cut(mnist / TEST_LABELS, 10_009)
        assert "must have 10008 bytes, got 10009" in refusal(CorruptData, "mnist", mnist)

    def test_mis_shaped(self, mnist: Path) -> None:
        write_idx(mnist / TRAIN_IMAGES, (60_000, 14, 56), np.zeros(0, np.uint8))
        text = refusal(CorruptData, "mnist", mnist)
        assert "must hold shape (60000, 28, 28), got (60000, 14, 56)" in text

    def test_not_idx(self, mnist: Path) -> None:
        with (mnist / TRAIN_IMAGES).open("r+b") as file:
            file.write(b"\x1f\x8b\x08\x00")  # a gzip header
        assert "magic number 2051, got 529205248" in refusal(CorruptData, "mnist", mnist)

    def test_label_out_of_range(self, mnist: Path) -> None:
        with (mnist / TEST_LABELS).open("r+b") as file:
            file.seek(100)
            file.write(b"\x0a")
        text = refusal(CorruptData, "mnist", mnist)
        assert "labels in t10k-labels-idx1-ubyte must lie in 0 ... 9, got 0 ... 10" in text

    def test_emnist_label_out_of_range(self, tmp_path: Path) -> None:
        write_emnist(tmp_path, parts=("test",))
        with (tmp_path / "EMNIST/raw/emnist-letters-test-labels-idx1-ubyte").open("r+b") as file:
            file.seek(100)
            file.write(b"\x00")
        assert "must lie in 1 ... 26, got 0 ... 26" in refusal(CorruptData, "emnist", tmp_path, parts="test")

    def test_a_mended_file_is_read(self, mnist: Path) -> None:
        whole = (mnist / TEST_LABELS).read_bytes()
        cut(mnist / TEST_LABELS, 100)
        refusal(CorruptData, "mnist", mnist)
        (mnist / TEST_LABELS).write_bytes(whole)
        assert len(load("mnist", root=mnist).test) == 10_000


class TestNpz:
    @pytest.mark.parametrize("name", NPZ)
    def test_missing(self, tmp_path: Path, name: str) -> None:
        text = refusal(MissingData, name, tmp_path)
        assert NPZ[name] in text
        assert "PVAE_DATA" in text

    @pytest.mark.parametrize("keep", [0, 10, 500_000])
    def test_truncated(self, tmp_path: Path, keep: int) -> None:
        write_npz(tmp_path, "freyfaces")
        cut(tmp_path / NPZ["freyfaces"], keep)
        text = refusal(CorruptData, "freyfaces", tmp_path)
        assert "the file freyfaces.npz must be a whole NumPy archive" in text

    def test_flipped_bytes(self, tmp_path: Path) -> None:
        write_npz(tmp_path, "freyfaces")
        path = tmp_path / NPZ["freyfaces"]
        stored = bytearray(path.read_bytes())
        stored[300_000] ^= 0xFF
        path.write_bytes(stored)
        assert "freyfaces.npz" in refusal(CorruptData, "freyfaces", tmp_path)

    def test_bare_array(self, tmp_path: Path) -> None:
        write_npz(tmp_path, "freyfaces")
        with (tmp_path / NPZ["freyfaces"]).open("wb") as file:
            np.save(file, np.zeros(3))
        assert "bare array" in refusal(CorruptData, "freyfaces", tmp_path)

    def test_pickled_array(self, tmp_path: Path) -> None:
        path = tmp_path / NPZ["freyfaces"]
        path.parent.mkdir()
        np.savez(path, images=np.array([{"a": 1}], dtype=object))
        assert "allow_pickle=False" in refusal(CorruptData, "freyfaces", tmp_path)

    @pytest.mark.parametrize(
        ("name", "key", "change", "message"),
        [
            ("freyfaces", "images", None, "has no array 'images', only nothing"),
            ("freyfaces", "images", lambda a: a[:-1], r"shape (1965, 28, 20), got (1964, 28, 20)"),
            ("freyfaces", "images", lambda a: a / 255, "must hold uint8, got float64"),
            ("freyfaces", "images", lambda a: a.astype(np.int64), "must hold uint8, got int64"),
            (
                "binarized_mnist",
                "valid",
                lambda a: a * 255,
                "valid of binarized_mnist.npz must lie in 0 ... 1",
            ),
            ("binarized_mnist", "train", None, "has no array 'train', only train_labels"),
            ("omniglot", "drawer", lambda a: a + 1, "drawer of omniglot_28x28.npz must lie in 1 ... 20"),
            ("omniglot", "drawer", lambda a: np.maximum(a, 2), "each of 20 drawers must have drawn each"),
            ("omniglot", "alphabet", lambda a: a.astype(float), "alphabet of .* must hold whole numbers"),
            ("omniglot", "alphabet_names", lambda a: np.arange(50), "must hold text, got int64"),
            (
                "cifar10",
                "labels",
                lambda a: a.astype(np.int16) - 1,
                "labels of .* must lie in 0 ... 9, got -1",
            ),
            (
                "cifar10",
                "images",
                lambda a: a.transpose(0, 3, 1, 2),
                r"(4000, 32, 32, 3), got (4000, 3, 32, 32)",
            ),
        ],
    )
    def test_wrong_arrays(
        self,
        tmp_path: Path,
        name: str,
        key: str,
        change: Callable[[NDArray[Any]], NDArray[Any]] | None,
        message: str,
    ) -> None:
        write_npz(tmp_path, name)
        path = tmp_path / NPZ[name]
        with np.load(path) as archive:
            arrays = dict(archive)
        array = arrays.pop(key)
        arrays["nothing"] = np.zeros(1)
        if change is not None:
            arrays[key] = change(array)
        np.savez(path, **arrays)
        text = refusal(CorruptData, name, tmp_path)
        pattern = re.escape(message).replace(r"\.\*", ".*")
        assert re.search(pattern, text), text
        assert path.name in text or "drawers" in text
