"""CelebA from a dozen built images, against Pillow and the lists, in memory and streamed; all refusals."""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pvae.data import CorruptData, Data, DataError, MissingData, Split, StreamingSplit, _torchvision, load

from .conftest import real_root
from .files import write_celeba

# Forking beside torch's threads is what a DataLoader does by default on Linux.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

PARTS = "001021102000"
ATTRIBUTES, PARTITION = "celeba/list_attr_celeba.txt", "celeba/list_eval_partition.txt"
Faces = tuple[Path, list[str], NDArray[np.int64]]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faces]:
    """A data root with CelebA in it, names and attributes; tests only read it."""
    root = tmp_path_factory.mktemp("faces")
    yield root, *write_celeba(root, PARTS)
    shutil.rmtree(root)


@pytest.fixture
def own(faces: Faces, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    shutil.copytree(faces[0] / "celeba", tmp_path / "own" / "celeba")
    return tmp_path / "own"


def parts(data: Data) -> list[Split]:
    return [data.train, data.valid, data.test]


def rows(part: int) -> list[int]:
    """Rows of a part in the order of the partition's list, which is written backwards."""
    return [i for i in reversed(range(len(PARTS))) if PARTS[i] == str(part)]


def square(path: Path, size: int) -> NDArray[np.float32]:
    """Resize the shorter side and crop the middle, by Pillow alone."""
    with Image.open(path) as image:
        scale = size / min(image.size)
        width, height = (int(scale * side) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        cropped = resized.crop((left, top, left + size, top + size))
    return np.asarray(cropped).transpose(2, 0, 1).astype(np.float32)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("size", [86, 21])
def test_images_and_labels_are_those_of_the_files(faces: Faces, size: int, in_memory: bool) -> None:
    root, files, values = faces
    data = load("celeba", root=root, size=size, in_memory=in_memory, num_workers=0)
    assert (data.x_shape, data.parts, data.num_classes) == ((3, size, size), ("train", "valid", "test"), None)
    assert (data.protocol.values, data.protocol.levels, data.protocol.binarize) == ("unit", 256, None)
    assert data.attribute_names is not None
    assert len(data.attribute_names) == 30
    columns = [int(name.removeprefix("Attribute_")) for name in data.attribute_names]
    for part, split in enumerate(parts(data)):
        assert isinstance(split, StreamingSplit) != in_memory
        assert len(split) == len(rows(part))
        images = [square(root / "celeba" / "img_align_celeba" / files[row], size) for row in rows(part)]
        assert np.array_equal((split.x * 255).round().numpy(), np.stack(images))
        assert float(split.x.max()) <= 1.0
        assert split.attribute_names == data.attribute_names
        labels = (values[rows(part)][:, columns] + 1) / 2
        index = torch.tensor([1, 0])
        batch = split.sample(index)
        assert split.y is not None
        assert batch.y is not None
        assert split.y.dtype == batch.y.dtype == torch.float32
        assert np.array_equal(split.y.numpy(), labels)
        assert np.array_equal(batch.y.numpy(), labels[[1, 0]])
        assert torch.equal(batch.x, split.x[index])


def test_attributes_are_the_most_frequent_of_the_training_part(faces: Faces) -> None:
    root, _, values = faces
    counts = (values[rows(0)] == 1).sum(0)
    # The three equal columns stand in the order of the file.
    assert counts[7] == counts[8] == counts[9]
    expected = tuple(f"Attribute_{i}" for i in sorted(range(40), key=lambda i: (-counts[i], i)))
    every = load("celeba", root=root, attributes=40)
    assert every.attribute_names == expected
    for number in (1, 30):
        assert load("celeba", root=root, attributes=number).attribute_names == expected[:number]
    assert load("celeba", root=root, attributes=9, limit=1).attribute_names == expected[:9]
    named = load("celeba", root=root, attributes=["Attribute_12", "Attribute_3"])
    assert named.attribute_names == ("Attribute_12", "Attribute_3")
    assert named.train.y is not None
    assert np.array_equal(named.train.y.numpy(), values[rows(0)][:, [12, 3]] > 0)


@pytest.mark.parametrize(
    "options", [{}, {"dequantize": True}, {"scale": "count"}, {"flip": True}, {"binarize": "dynamic"}]
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_streaming_equals_memory(faces: Faces, options: dict[str, Any], part: str) -> None:
    memory, stream = (
        load("celeba", root=faces[0], size=12, in_memory=in_memory, **options) for in_memory in (True, False)
    )
    assert memory.protocol == stream.protocol
    one, other = getattr(memory, part), getattr(stream, part)
    assert (one.fits_device, other.fits_device) == (True, False)
    assert torch.equal(one.x, other.x)
    assert torch.equal(one[1:3].x, other[1:3].x)
    assert one[1:3].protocol == other[1:3].protocol
    batches = []
    for split in (one, other):
        torch.manual_seed(0)
        batches.append(list(split.batches(2, seed=0, epoch=1, drop_last=False)))
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


def test_memory_is_for_few(faces: Faces, monkeypatch: pytest.MonkeyPatch) -> None:
    root = faces[0]
    assert load("celeba", root=root).train.fits_device
    monkeypatch.setattr("pvae.data.celeba._SMALL", 12 * 3 * 20 * 20)
    assert load("celeba", root=root, size=20).train.fits_device
    assert not load("celeba", root=root, size=21).train.fits_device
    assert load("celeba", root=root, size=21, limit=1).train.fits_device


def test_labels_are_had_without_images(faces: Faces, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("celeba", root=faces[0], in_memory=False)
    monkeypatch.setattr(_torchvision, "read_square", lambda *_: pytest.fail("read an image for its label"))
    assert [None if split.y is None else split.y.shape for split in parts(data)] == [
        (7, 30),
        (3, 30),
        (2, 30),
    ]


def test_limit_takes_the_first(faces: Faces) -> None:
    whole, some = load("celeba", root=faces[0]), load("celeba", root=faces[0], limit=2)
    assert [len(split) for split in parts(some)] == [2, 2, 2]
    for split, full in zip(parts(some), parts(whole), strict=True):
        assert torch.equal(split.x, full.x[:2])
        assert split.y is not None
        assert full.y is not None
        assert torch.equal(split.y, full.y[:2])
    assert "first 2 images of each part" in str(some.protocol)


def test_flip_adds_mirror_images_to_train(faces: Faces) -> None:
    plain, both = load("celeba", root=faces[0], size=20), load("celeba", root=faces[0], size=20, flip=True)
    assert torch.equal(both.train.x, torch.cat([plain.train.x, plain.train.x.flip(-1)]))
    assert both.train.y is not None
    assert plain.train.y is not None
    assert torch.equal(both.train.y, torch.cat([plain.train.y, plain.train.y]))
    assert torch.equal(both.valid.x, plain.valid.x)
    assert torch.equal(both.test.x, plain.test.x)


def test_the_hash_covers_lists_and_options(faces: Faces, own: Path) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"size": 20},
        {"attributes": 29},
        {"limit": 2},
        {"flip": True},
        {"dequantize": True},
    ]
    hashes = [load("celeba", root=faces[0], **option).protocol.hash for option in options]
    same: list[dict[str, Any]] = [{"num_workers": 0}, {"in_memory": False}, {"seed": 5}]
    hashes += [load("celeba", root=own, **option).protocol.hash for option in same]
    assert len(set(hashes)) == len(options)
    assert set(hashes[len(options) :]) == {hashes[0]}
    text = (own / PARTITION).read_text()
    (own / PARTITION).write_text(text.replace("000001.jpg 0", "000001.jpg 1"))
    assert load("celeba", root=own).protocol.hash not in hashes


def test_parts_without_images_are_left_out(own: Path) -> None:
    text = (own / PARTITION).read_text()
    (own / PARTITION).write_text(text.replace("jpg 1", "jpg 0").replace("jpg 2", "jpg 0"))
    data = load("celeba", root=own)
    assert (data.parts, len(data.train)) == (("train",), 12)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        (ATTRIBUTES, ATTRIBUTES),
        (PARTITION, PARTITION),
        ("celeba/img_align_celeba", r"celeba/img_align_celeba/\*\.jpg"),
        ("celeba/img_align_celeba/000003.jpg", r"celeba/img_align_celeba/000003\.jpg, which"),
        (
            "celeba/img_align_celeba/000001.jpg celeba/img_align_celeba/000012.jpg",
            r"000012\.jpg \(and 1 more of 12 images\)",
        ),
    ],
)
def test_missing_files_are_named(own: Path, gone: str, named: str) -> None:
    for file in gone.split():
        path = own / file
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    with pytest.raises(
        MissingData, match=rf"celeba needs the file {'.*' if 'more' in named else ''}{named}"
    ) as caught:
        load("celeba", root=own)
    assert "set PVAE_DATA or root to the folder that holds it, with celeba/list_attr" in str(caught.value)
    assert "or pass download=True" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_images_asked_for_are_needed(own: Path) -> None:
    for row in (*rows(0)[1:], *rows(1)[1:], *rows(2)[1:]):
        (own / "celeba" / "img_align_celeba" / f"{row + 1:06d}.jpg").unlink()
    assert [len(split) for split in parts(load("celeba", root=own, limit=1))] == [1, 1, 1]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (ATTRIBUTES, "12\n", "13\n", "must have as many rows as it says, 12, got '13'"),
        (ATTRIBUTES, "Attribute_39 ", "", "must give 39 values of -1 or 1 in line 3, got '000001.jpg"),
        (ATTRIBUTES, "000004.jpg  ", "000004.jpg 0 ", "must give 40 values of -1 or 1 in line 6"),
        (ATTRIBUTES, "000004.jpg ", "000003.jpg ", "must name each image once, got '1 names again'"),
        (ATTRIBUTES, None, "", "must list images, got an empty file"),
        (ATTRIBUTES, None, "12\n", "must have as many rows as it says, 0, got '12'"),
        (ATTRIBUTES, None, b"\xff\xd8\xff", "list_attr_celeba.txt must be a text"),
        (
            PARTITION,
            "000004.jpg 0",
            "000004.jpg 3",
            "must give 0, 1 or 2 for an image in line 9, got '000004",
        ),
        (PARTITION, "000004.jpg 0", "000004.jpg", "must give 0, 1 or 2 for an image in line 9"),
        (PARTITION, "000004.jpg 0\n", "", "must name 000004.jpg, as celeba/list_attr_celeba.txt does"),
        (
            PARTITION,
            "000004.jpg 0",
            "000044.jpg 0",
            "must name the images of .*, each once, got '000044.jpg'",
        ),
        (
            PARTITION,
            "000004.jpg 0",
            "000005.jpg 2",
            "must name the images of .*, each once, got '000005.jpg'",
        ),
        (PARTITION, " 0\n", " 1\n", "must put an image into the training part"),
    ],
)
def test_damaged_lists(own: Path, file: str, old: str | None, new: str | bytes, message: str) -> None:
    path = own / file
    if isinstance(new, bytes):
        path.write_bytes(new)
    else:
        text = path.read_text()
        assert old is None or old in text
        path.write_text(new if old is None else text.replace(old, new))
    with pytest.raises(CorruptData, match=message) as caught:
        load("celeba", root=own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GIF87a", "half"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(own: Path, content: bytes | str, workers: int) -> None:
    path = own / "celeba" / "img_align_celeba" / f"{rows(0)[3] + 1:06d}.jpg"
    if isinstance(content, str):
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(content)
    message = rf"celeba: the image {path.name} must be a whole JPEG file: "
    data = load("celeba", root=own, in_memory=False, num_workers=workers)
    with pytest.raises(CorruptData, match=message) as caught:
        list(data.train.batches(2, seed=0, epoch=0, drop_last=False))
    assert "\n" not in str(caught.value)
    with pytest.raises(CorruptData, match=message):
        load("celeba", root=own, num_workers=workers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"size must lie in 1 \.\.\. 178, the width of the images, got 0"),
        ({"size": 179}, "got 179"),
        ({"limit": 0}, "limit must be positive, or None for all images, got 0"),
        ({"attributes": 0}, r"attributes must lie in 1 \.\.\. 40, or be names, got 0"),
        ({"attributes": 41}, "got 41"),
        (
            {"attributes": "Attribute_1"},
            "attributes must be a whole number of 64 bits or a list, each of it a text, got 'Att",
        ),
        ({"attributes": ()}, r"different names in a list, got \(\)"),
        ({"attributes": ["Attribute_1"] * 2}, "different names in a list, got"),
        ({"attributes": ["Atribute_1"]}, r"did you mean 'Attribute_1\d?'\?\), got 'Atribute_1'"),
        ({"attributes": ["xyzzy"]}, "there are Attribute_0, .*got 'xyzzy'"),
        ({"valid": 5}, "valid must be None for celeba, which has a validation part, got 5"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"siz": 5}, "did you mean 'size'"),
    ],
)
def test_refusals(faces: Faces, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("celeba", root=faces[0], **options)


class TestDownload:
    """Through torchvision, whose address is a folder and whose sums are those of built files."""

    @pytest.fixture
    def served(self, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "served"
        folder.mkdir()
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            for path in sorted((own / "celeba" / "img_align_celeba").iterdir()):
                archive.write(path, f"img_align_celeba/{path.name}")
        for file in (ATTRIBUTES, PARTITION):
            shutil.copy(own / file, folder)
        (folder / "identity_CelebA.txt").write_text("".join(f"{i + 1:06d}.jpg {i}\n" for i in range(12)))
        for name in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
            table = "".join(f"{i + 1:06d}.jpg 1 2 3 4\n" for i in range(12))
            (folder / name).write_text(f"12\na b c d\n{table}")

        def fetch(file_id: str, root: str, filename: str, md5: str) -> None:
            Path(root).mkdir(exist_ok=True)
            content = (folder / filename).read_bytes()
            if hashlib.md5(content).hexdigest() != md5:
                raise RuntimeError("File not found or corrupted.")
            (Path(root) / filename).write_bytes(content)

        published = _torchvision.datasets().CelebA
        sums = [("id", hashlib.md5(path.read_bytes()).hexdigest(), path.name) for path in folder.iterdir()]
        monkeypatch.setattr(published, "file_list", sums)
        monkeypatch.setattr(_torchvision.datasets().celeba, "download_file_from_google_drive", fetch)
        return folder

    @pytest.mark.usefixtures("served")
    def test_fetches_what_is_missing_once(
        self, faces: Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = tmp_path / "new" / "root"
        data = load("celeba", root=root, download=True)
        there = load("celeba", root=faces[0])
        assert data.protocol == there.protocol
        assert torch.equal(data.test.x, there.test.x)
        assert [path.name for path in root.iterdir()] == ["celeba"]
        assert len(list((root / "celeba" / "img_align_celeba").iterdir())) == 12
        assert not list(root.rglob("*.zip"))
        monkeypatch.setattr(_torchvision, "download_celeba", pytest.fail)
        load("celeba", root=root, download=True)

    @pytest.mark.usefixtures("served")
    def test_replaces_what_is_damaged(self, own: Path, faces: Faces) -> None:
        (own / PARTITION).write_text("half a fi")
        (own / "celeba" / "img_align_celeba" / "000002.jpg").unlink()
        (own / "celeba" / "img_align_celeba" / "mine.txt").write_text("kept")
        data = load("celeba", root=own, download=True)
        assert torch.equal(data.train.x, load("celeba", root=faces[0]).train.x)
        assert (own / "celeba" / "img_align_celeba" / "mine.txt").read_text() == "kept"

    def test_a_failed_download_leaves_nothing(self, served: Path, tmp_path: Path) -> None:
        (served / "list_eval_partition.txt").write_text("half a fi")
        root = tmp_path / "root"
        with pytest.raises(
            MissingData, match=r"celeba could not be downloaded to .*: File not found or corr"
        ):
            load("celeba", root=root, download=True)
        assert list(root.iterdir()) == []


def test_the_published_set() -> None:
    root = real_root()
    if root is None or not (root / "celeba" / "img_align_celeba" / "202599.jpg").is_file():
        pytest.skip("needs CelebA under PVAE_DATA")
    data = load("celeba", root=root, num_workers=0)
    assert [len(split) for split in parts(data)] == [162_770, 19_867, 19_962]
    assert isinstance(data.train, StreamingSplit)
    assert data.attribute_names is not None
    assert data.attribute_names[:2] == ("No_Beard", "Young")
    assert data.train[:2].x.shape == (2, 3, 86, 86)
