"""The idx reader: whatever its header says, no more is read than the set has."""

from pathlib import Path

import pytest

from pvae.data import CorruptData, load
from pvae.data._files import read_idx
from tests.data.files import write_mnist

from .confined import MEBIBYTES, confined

IMAGES = "MNIST/raw/train-images-idx3-ubyte"


def _header(magic: int, *sizes: int) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in (magic, *sizes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_header(0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "must hold shape"),
        (_header(0x0803, 0, 0, 0), "must hold shape"),
        (_header(0x08FF, *([2**32 - 1] * 255)), "magic number"),
        (_header(0x0E03, 2, 2, 2) + bytes(64), "magic number"),
        (_header(0x0803, 2, 2, 2) + bytes(7), "must have 24 bytes, got 23"),
        (_header(0x0803, 2, 2, 2) + bytes(9), "must have 24 bytes, got 25"),
        (_header(0x0803), "must have 24 bytes, got 4"),
        (b"", "must have 24 bytes, got 0"),
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CorruptData, match=message) as caught:
        read_idx("set", tmp_path / "file", (2, 2, 2))
    assert "\n" not in str(caught.value)


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_header(0x0803, 2, 2, 2) + bytes(range(8)))
    assert read_idx("set", tmp_path / "file", (2, 2, 2)).flatten().tolist() == list(range(8))


def test_a_folder_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match="cannot be read"):
        read_idx("set", tmp_path, (2, 2, 2))


def test_memory_is_bounded(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with (tmp_path / IMAGES).open("r+b") as file:
        file.write(_header(0x0803, 2**32 - 1, 28, 28))
        file.truncate(2**40)
    (outcome,) = confined(
        "from pvae.data import load", {"a tebibyte": f"load('mnist', root={str(tmp_path)!r})"}
    ).values()
    assert outcome.kind == "CorruptData", outcome
    assert outcome.grown < MEBIBYTES / 4, outcome
    with pytest.raises(CorruptData, match="must hold shape"):
        load("mnist", root=tmp_path)
