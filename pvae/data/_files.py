"""Finding files under the data root and checking them before anything is read out of them."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from .errors import CorruptData, MissingData

__all__ = ["check_idx", "data_root", "missing", "read_idx"]


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
    expected = 4 + 4 * len(shape) + math.prod(shape)
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


def read_idx(name: str, path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read an uncompressed idx file of bytes, once it is checked, and no more than its shape says.

    Args:
        name: Name of the data set.
        path: An existing file.
        shape: What it must hold, ``(N,)`` or ``(N, H, W)``.

    Returns:
        uint8, ``shape``.

    Raises:
        CorruptData: If it is not such a file, whole.
    """
    check_idx(name, path, shape)
    content = torch.empty(shape, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(4 + 4 * len(shape))
        read = file.readinto(content.numpy().data)
    if read != content.numel():
        raise CorruptData(f"{name}: the file {path.name} became shorter while it was read")
    return content
