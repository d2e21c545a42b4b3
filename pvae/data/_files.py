"""Finding files under the data root and checking them before anything is read out of them."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptData, MissingData

__all__ = ["Expected", "check_idx", "data_root", "missing", "read_npz"]


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """Return ``root``, else the folder that ``PVAE_DATA`` names, else ``~/.cache/pvae``."""
    if root is not None:
        return Path(root).expanduser()
    named = os.environ.get("PVAE_DATA")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "pvae"


def missing(name: str, file: str, root: Path, remedy: str) -> MissingData:
    """The error for a file that is not there."""
    where = f"{root}" if root.is_dir() else f"{root}, which is no folder"
    return MissingData(
        f"{name} needs the file {file}, which is missing under {where}: set PVAE_DATA or root to the folder "
        f"that holds it{remedy}"
    )


def check_idx(name: str, path: Path, shape: tuple[int, ...]) -> None:
    """Check size and header of an uncompressed idx file of bytes.

    Args:
        name: Name of the data set.
        path: An existing file.
        shape: What the header must say, ``(N,)`` or ``(N, H, W)``.

    Raises:
        CorruptData: If it is not such a file, whole.
    """
    expected = 4 + 4 * len(shape) + int(np.prod(shape))
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(4 + 4 * len(shape))
    except OSError as error:
        raise CorruptData(f"{name}: the file {path.name} cannot be read: {error}") from error
    # Magic number: two zeros, 8 for unsigned bytes, the number of dimensions; then the dimensions, big-
    # endian.
    words = [int.from_bytes(header[at : at + 4], "big") for at in range(0, len(header), 4)]
    advice = "replace it, or pass download=True to fetch it again"
    if words and words[0] != 0x0800 + len(shape):
        raise CorruptData(
            f"{name}: the file {path.name} must be idx data with magic number {0x0800 + len(shape)}, "
            f"got {words[0]}: {advice}"
        )
    if len(words) == 1 + len(shape) and tuple(words[1:]) != shape:
        raise CorruptData(
            f"{name}: the file {path.name} must hold shape {shape}, got {tuple(words[1:])}: {advice}"
        )
    if size != expected:
        raise CorruptData(f"{name}: the file {path.name} must have {expected} bytes, got {size}: {advice}")


@dataclass(frozen=True)
class Expected:
    """What an array must be.

    Args:
        kind: ``"u"`` for bytes, ``"i"`` for any whole numbers, ``"U"`` for text.
        shape: Its shape.
        low: Its lowest value, where it holds numbers.
        high: Its highest value.
    """

    kind: str
    shape: tuple[int, ...]
    low: int = 0
    high: int = 255


def read_npz(
    name: str, root: Path, file: str, expected: Mapping[str, Expected], remedy: str = ""
) -> dict[str, NDArray[Any]]:
    """Read named arrays of a NumPy archive, without pickle, and check each.

    Args:
        name: Name of the data set.
        root: The data root.
        file: Path of the archive under it.
        expected: What each array must be; others are not read.
        remedy: End of the sentence that tells how to get a missing file.

    Raises:
        MissingData: If there is no such file.
        CorruptData: If it cannot be read, or an array is missing or not as expected.
    """
    path = root / file
    if not path.is_file():
        raise missing(name, file, root, remedy)
    arrays = {}
    try:
        # Opened here, as NumPy leaves a file open that turns out not to be an archive.
        with path.open("rb") as stored:
            archive = np.load(stored, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds a bare array")
            for key in expected:
                if key not in archive:
                    raise KeyError(f"it has no array {key!r}, only {', '.join(archive)}")
                arrays[key] = archive[key]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise CorruptData(f"{name}: the file {path.name} must be a whole NumPy archive: {reason}") from error
    for key, want in expected.items():
        array = arrays[key]
        kinds = {"u": "u", "i": "iu", "U": "U"}[want.kind]
        if array.dtype.kind not in kinds or (want.kind == "u" and array.dtype.itemsize != 1):
            asked = {"u": "uint8", "i": "whole numbers", "U": "text"}[want.kind]
            raise CorruptData(f"{name}: {key} of {path.name} must hold {asked}, got {array.dtype}")
        if array.shape != want.shape:
            raise CorruptData(f"{name}: {key} of {path.name} must have shape {want.shape}, got {array.shape}")
        if want.kind != "U" and not want.low <= int(array.min()) <= int(array.max()) <= want.high:
            raise CorruptData(
                f"{name}: {key} of {path.name} must lie in {want.low} ... {want.high}, "
                f"got {int(array.min())} ... {int(array.max())}"
            )
    return arrays
