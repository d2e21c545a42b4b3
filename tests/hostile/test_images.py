"""Images and lists of CelebA, and images of a user's dataset: refused by their headers, before decoding."""

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pvae.data import CorruptData, DataError, MissingData, from_datasets, load
from tests.data.files import write_celeba

from .bombs import MARK
from .confined import MEBIBYTES, confined


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        framed = kind + content
        return struct.pack(">I", len(content)) + framed + struct.pack(">I", zlib.crc32(framed))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def eps(folder: Path) -> bytes:
    """PostScript, which Pillow hands to another program to draw."""
    return (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 178 218\n%%EndComments\n"
        + f"({folder / MARK}) (w) file closefile\nshowpage\n%%EOF\n".encode()
    )


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """A tiny CelebA, and the path of one of its images of training."""
    write_celeba(tmp_path)
    return tmp_path / "celeba" / "img_align_celeba" / "000001.jpg"


def refusal(root: Path) -> str:
    with pytest.raises(
        CorruptData, match=r"celeba: the image 000001.jpg must be a whole JPEG file"
    ) as caught:
        load("celeba", root=root, num_workers=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(60_000, 60_000), "pixels"),
        (png(12_000, 10_000), "pixels"),
        (png(5_000, 5_000), "it has 5000 x 5000 pixels"),
        (png(1, 16_000_000), "it has 1 x 16000000 pixels"),
        (png(0, 5), "identify"),
        (b"GIF89a" + struct.pack("<HH", 178, 218) + bytes(20), "identify"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_images_that_claim_too_much(faces: Path, tmp_path: Path, content: bytes, message: str) -> None:
    faces.write_bytes(content)
    assert message in refusal(tmp_path)


def test_an_image_that_is_a_program(faces: Path, tmp_path: Path) -> None:
    faces.write_bytes(eps(tmp_path))
    assert "identify" in refusal(tmp_path)
    assert not (tmp_path / MARK).exists()


def test_memory_is_bounded(faces: Path, tmp_path: Path) -> None:
    loads = f"load('celeba', root={str(tmp_path)!r}, num_workers=0)"
    statements = {
        f"{w} x {h}": f"Path({str(faces)!r}).write_bytes(bytes.fromhex({png(w, h).hex()!r})); {loads}"
        for w, h in ((60_000, 60_000), (13_000, 13_000), (1, 2**24))
    }
    lists = tmp_path / "celeba" / "list_attr_celeba.txt"
    statements["a list of a tebibyte"] = f"os.truncate({str(lists)!r}, 2**40); {loads}"
    imports = (
        "import warnings; from pvae.data import load, _torchvision; _torchvision.datasets()\n"
        "import PIL.Image, torchvision.transforms.functional; warnings.simplefilter('ignore')"
    )
    for name, outcome in confined(imports, statements).items():
        assert outcome.kind == "CorruptData", (name, outcome)
        assert outcome.grown < MEBIBYTES / 2, (name, outcome)


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/passwd", "..", "a/../000001.jpg"])
def test_a_list_that_leads_out_of_the_folder(faces: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(faces.read_bytes())
    for file in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        path = tmp_path / "celeba" / file
        path.write_text(path.read_text().replace("000001.jpg", name))
    with pytest.raises(MissingData, match="which is missing"):
        load("celeba", root=tmp_path)


def test_names_that_would_write_on_a_terminal(faces: Path, tmp_path: Path) -> None:
    path = tmp_path / "celeba" / "list_attr_celeba.txt"
    path.write_text(path.read_text().replace("Attribute_3 ", "\x1b[2J "))
    with pytest.raises(CorruptData, match="characters that can be shown") as caught:
        load("celeba", root=tmp_path)
    assert "\x1b" not in str(caught.value)


class _Pictures(Dataset[Any]):
    """A user's dataset that hands out images as Pillow opens them: not decoded yet."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> Any:
        return Image.open(self._paths[position])


def test_images_of_a_user_are_not_decoded_unless_they_fit(tmp_path: Path) -> None:
    Image.new("RGB", (4, 6)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png(9_000, 9_000))
    (tmp_path / "c.png").write_bytes(png(60_000, 60_000))
    data = from_datasets(
        _Pictures(*(tmp_path / f"{n}.png" for n in "abc")), name="own", fingerprint="1", num_workers=0
    )
    assert data.x_shape == (3, 6, 4)
    with pytest.raises(CorruptData, match=r"must have shape \(3, 6, 4\), got \(3, 9000, 9000\)"):
        data.train.sample(torch.tensor([1]))
    with pytest.raises(DataError, match="datum 2 cannot be read: DecompressionBombError"):
        data.train.sample(torch.tensor([2]))


class _Lying(Dataset[Tensor]):
    """A dataset whose later data are of another shape."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, position: int) -> Tensor:
        return torch.zeros(1, 2 + position, 2, dtype=torch.uint8)


def test_data_of_another_shape(tmp_path: Path) -> None:
    data = from_datasets(_Lying(), name="own", fingerprint="1", num_workers=0)
    with pytest.raises(CorruptData, match=r"x of datum 2 must have shape \(1, 2, 2\), got \(1, 4, 2\)"):
        data.train.sample(torch.tensor([2]))
