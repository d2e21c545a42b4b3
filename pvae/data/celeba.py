"""CelebA, aligned faces with binary attributes, read as needed (Liu et al. 2015, arXiv:1411.7766)."""

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from . import _torchvision
from ._files import missing
from ._request import Request
from .dataset import PARTS, Source, Streams
from .errors import CorruptData, DataError, MissingData

__all__ = ["celeba"]

_FOLDER = "celeba"
_IMAGES = f"{_FOLDER}/img_align_celeba"
_ATTRIBUTES = f"{_FOLDER}/list_attr_celeba.txt"
_PARTITION = f"{_FOLDER}/list_eval_partition.txt"
_WIDTH = 178
_SMALL = 2**28  # bytes: 12,000 images of 86 x 86, half a minute of decoding
_LONGEST = 2**26  # bytes of a list; that of attributes has 27 million
_BITS = {"-1": 0, "1": 1}


def celeba(
    request: Request,
    *,
    size: int = 86,
    attributes: int | Sequence[str] = 30,
    limit: int | None = None,
    flip: bool = False,
    in_memory: bool | None = None,
    num_workers: int = 2,
) -> Source:
    """Read CelebA, ``x_shape (3, size, size)``, ``y`` binary attributes, float32 ``(N, L)`` of 0 and 1.

    The parts are those of the official partition: 162,770 / 19,867 / 19,962. The shorter side of the aligned
    image (178 x 218) is resized to ``size``, bilinearly, and its middle square kept, as the code of CVAE-NF
    does; that code also flips and rotates at random, and divides train and test at random, which this does
    not.

    Under the root lie, as torchvision lays them out, ``celeba/img_align_celeba/*.jpg``,
    ``celeba/list_attr_celeba.txt`` and ``celeba/list_eval_partition.txt``; other files of the set are not
    needed, and the lists may name fewer images than were published. ``download=True`` fetches what is missing
    or damaged through torchvision, which checks its sums and needs the package ``gdown``.

    Images are decoded by worker processes, batch by batch, unless they are held in memory as bytes (22 kB
    each, 3.6 GB for the training part): the same data in the same order, the same noise, the same protocol.
    The protocol's hash covers the two lists, the attributes, ``size`` and ``flip``, not the images.

    Args:
        request: What is asked for.
        size: Height and width in pixels.
        attributes: Number of attributes, the most frequent ones of the official training partition from the
            most frequent on (40: all of them), or their names, in the order of the columns of ``y``.
        limit: At most so many images of each part, the first ones; ``None`` for all. The choice of
            attributes does not depend on it.
        flip: Whether the training part holds, after all its images, the mirror image of each.
        in_memory: Whether all parts are decoded once and held in memory; ``None``: where that takes no more
            than 256 MiB.
        num_workers: Number of worker processes that decode; 0 decodes in this one.

    References:
        Liu, Luo, Wang, Tang 2015, Deep learning face attributes in the wild, arXiv:1411.7766.
    """
    request.own_valid()
    if not 1 <= size <= _WIDTH:
        raise DataError(f"size must lie in 1 ... {_WIDTH}, the width of the images, got {size}")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be positive, or None for all images, got {limit}")
    lists = _fetched(request, limit)
    columns = _columns(lists, attributes)
    names = tuple(lists.names[column] for column in columns)
    datasets: dict[str, TorchDataset[Tensor]] = {}
    y = {}
    for part, rows in lists.rows.items():
        mirrored = flip and part == "train"
        files = tuple(lists.files[row] for row in rows[:limit])
        datasets[part] = _Faces(request.root / _IMAGES, files, size, mirrored)
        labels = lists.values[rows[:limit]][:, columns].to(torch.float32)
        y[part] = labels.repeat(2, 1) if mirrored else labels
    if in_memory is None:
        in_memory = sum(len(labels) for labels in y.values()) * 3 * size**2 <= _SMALL
    split = ["official partition"]
    if limit is not None:
        split.append(f"first {limit} images of each part")
    if flip:
        split.append("training images and their mirror images")
    return Source(
        kind="levels",
        levels=256,
        binarize=None,
        split=", ".join(split),
        note="the hash covers the lists and how images are read, not the images themselves",
        attribute_names=names,
        streams=Streams(
            datasets,
            fingerprint=json.dumps([lists.sha256, "bilinear, middle square", size, names, flip]),
            num_workers=num_workers,
            y=y,
            in_memory=in_memory,
        ),
    )


class _Faces(TorchDataset[Tensor]):
    """The images of one part, and after them perhaps their mirror images.

    Args:
        folder: Where the images lie.
        files: Their names.
        size: Height and width to bring them to.
        mirrored: Whether the mirror images follow.
    """

    def __init__(self, folder: Path, files: tuple[str, ...], size: int, mirrored: bool) -> None:
        self._folder, self._files = folder, files
        self._size, self._mirrored = size, mirrored

    def __len__(self) -> int:
        return len(self._files) * (2 if self._mirrored else 1)

    def __getitem__(self, position: int) -> Tensor:
        flips, row = divmod(position, len(self._files))
        file = self._files[row]
        try:
            image = _torchvision.read_square(self._folder / file, self._size)
        # What Pillow raises for files that are truncated, of no known format, or broken inside.
        except (OSError, ValueError, SyntaxError) as error:
            reason = " ".join(str(error).split())
            raise CorruptData(f"celeba: the image {file} must be a whole JPEG file: {reason}") from error
        return image.flip(-1) if flips else image


@dataclass(frozen=True)
class _Lists:
    """What the two lists say.

    Args:
        names: Name of each attribute, in the order of the file.
        files: Name of each image.
        values: Attributes of each image, uint8 0 or 1, ``(N, L)``.
        rows: Positions of the images of each part in ``files``, int64.
        sha256: Digests of both lists.
    """

    names: tuple[str, ...]
    files: tuple[str, ...]
    values: Tensor
    rows: dict[str, Tensor]
    sha256: tuple[str, str]


def _fetched(request: Request, limit: int | None) -> _Lists:
    """Read the lists and see that their images are there; download what is not, where that is allowed."""
    try:
        return _checked(request, limit)
    except (MissingData, CorruptData):
        if not request.download:
            raise
    _download(request)
    return _checked(request, limit)


def _checked(request: Request, limit: int | None) -> _Lists:
    remedy = f", with {_ATTRIBUTES}, {_PARTITION} and {_IMAGES} in it, or pass download=True"
    for file in (_ATTRIBUTES, _PARTITION):
        if not (request.root / file).is_file():
            raise missing(request.name, file, request.root, remedy)
    if not (request.root / _IMAGES).is_dir():
        raise missing(request.name, f"{_IMAGES}/*.jpg", request.root, remedy)
    lists = _read(request.root)
    # Else an image that is not there would be found after hours of training. One listing of the folder, as
    # 200,000 questions to a file system behind a network take minutes.
    there = {entry.name for entry in os.scandir(request.root / _IMAGES)}
    needed = [lists.files[row] for rows in lists.rows.values() for row in rows[:limit].tolist()]
    lacking = [file for file in needed if file not in there]
    if lacking:
        others = f" (and {len(lacking) - 1} more of {len(needed)} images)" if len(lacking) > 1 else ""
        file = f"{_IMAGES}/{lacking[0]}{others}"
        raise missing(request.name, file, request.root, remedy)
    return lists


def _read(root: Path) -> _Lists:
    """Parse both lists: of attributes (a number, the names, a row for each image) and of parts (rows)."""
    (count, *more), sha_attributes = _lines(root / _ATTRIBUTES)
    names = tuple(more[0].split()) if more else ()
    if not all(name.isprintable() for name in names):
        raise _corrupt(_ATTRIBUTES, "must name attributes in characters that can be shown", more[0])
    files: list[str] = []
    bits = bytearray()
    for number, line in enumerate(more[1:], start=3):
        file, *fields = line.split()
        if len(fields) != len(names) or not _BITS.keys() >= set(fields):
            raise _corrupt(_ATTRIBUTES, f"must give {len(names)} values of -1 or 1 in line {number}", line)
        files.append(file)
        bits.extend(map(_BITS.__getitem__, fields))
    if not files or count.strip() != str(len(files)):
        raise _corrupt(_ATTRIBUTES, f"must have as many rows as it says, {len(files)}", count)
    row_of = {file: row for row, file in enumerate(files)}
    if len(row_of) != len(files):
        raise _corrupt(_ATTRIBUTES, "must name each image once", f"{len(files) - len(row_of)} names again")

    parts = dict(zip("012", PARTS, strict=True))
    found: dict[str, list[int]] = {part: [] for part in PARTS}
    lines, sha_partition = _lines(root / _PARTITION)
    for number, line in enumerate(lines, start=1):
        file, *part = line.split()
        if len(part) != 1 or part[0] not in parts:
            raise _corrupt(_PARTITION, f"must give 0, 1 or 2 for an image in line {number}", line)
        row = row_of.pop(file, None)
        if row is None:
            raise _corrupt(_PARTITION, f"must name the images of {_ATTRIBUTES}, each once", file)
        found[parts[part[0]]].append(row)
    if row_of:
        raise _corrupt(_PARTITION, f"must name {next(iter(row_of))}, as {_ATTRIBUTES} does", "fewer images")
    if not found["train"]:
        raise _corrupt(_PARTITION, "must put an image into the training part (0)", "none")
    return _Lists(
        names=names,
        files=tuple(files),
        values=torch.frombuffer(bits, dtype=torch.uint8).reshape(len(files), len(names)),
        rows={part: torch.tensor(rows) for part, rows in found.items() if rows},
        sha256=(sha_attributes, sha_partition),
    )


def _lines(path: Path) -> tuple[list[str], str]:
    """The lines of a list that are not empty, at least one, and the digest of the file."""
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise CorruptData(f"celeba: the file {path.name} must have at most {_LONGEST} bytes, got more")
        lines = [line for line in content.decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptData(f"celeba: the file {path.name} must be a text: {error}") from error
    if not lines:
        raise CorruptData(f"celeba: the file {path.name} must list images, got an empty file")
    return lines, hashlib.sha256(content).hexdigest()


def _corrupt(file: str, must: str, got: str) -> CorruptData:
    shown = got if len(got) <= 40 else f"{got[:40]} ..."
    name = Path(file).name
    return CorruptData(
        f"celeba: the file {name} {must}, got {shown!r}: replace it, or pass download=True to fetch it again"
    )


def _columns(lists: _Lists, attributes: int | Sequence[str]) -> list[int]:
    """Columns of the chosen attributes, by frequency or by name."""
    known = len(lists.names)
    if isinstance(attributes, int):
        if not 1 <= attributes <= known:
            raise DataError(f"attributes must lie in 1 ... {known}, or be names, got {attributes}")
        frequency = lists.values[lists.rows["train"]].sum(0, dtype=torch.int64)
        # Stable, so that attributes of one frequency stand in the order of the file.
        order: list[int] = frequency.argsort(descending=True, stable=True)[:attributes].tolist()
        return order
    if not attributes or len(set(attributes)) < len(attributes):
        raise DataError(f"attributes must be a number, or different names in a list, got {attributes!r}")
    for name in attributes:
        if name not in lists.names:
            near = difflib.get_close_matches(name, lists.names, n=1)
            known_names = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(lists.names)}"
            raise DataError(f"attributes must be names of attributes ({known_names}), got {name!r}")
    return [lists.names.index(name) for name in attributes]


def _download(request: Request) -> None:
    """Download to a temporary folder, check there, and only then put the files in place, images first."""
    try:
        request.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=request.root) as folder:
            _torchvision.download_celeba(Path(folder))
            for path in sorted((Path(folder) / _FOLDER).rglob("*")):
                if path.is_file() and path.suffix != ".zip":
                    place = request.root / path.relative_to(folder)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, place)
    # The package that fetches from Google Drive has errors of its own (of quotas, for one).
    except Exception as error:
        reason = " ".join(str(error).split())
        raise MissingData(f"celeba could not be downloaded to {request.root}: {reason}") from error
