"""NumPy archives that somebody else made: read without pickle, and no more of them than is expected."""

import io
import math
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ._files import missing
from .errors import CorruptData

__all__ = ["Expected", "read_npz"]

# Bytes of the directory of an archive: a thousand arrays. The reader of it makes objects ten times as large.
_DIRECTORY = 2**16
# Bytes of the header of an array, of which the shape and type take a hundred.
_HEADER = 2**13
_PIECE = 2**20
# Characters of a reason.
_REASON = 300
# The record at the end of an archive: its length and its mark.
_END, _MARK = 22, b"PK\5\6"
_KINDS = {"u": "u", "i": "iu", "U": "U"}
_ASKED = {"u": "uint8", "i": "whole numbers", "U": "text"}
# Bytes of one item at most: text of 256 characters.
_ITEM = {"u": 1, "i": 8, "U": 1024}


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

    Type and shape stand in the header of an array, which is read first: memory is bounded by what is
    expected, whatever the archive claims and whatever it unpacks to.

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
    where = f"{name}: the file {path.name} must be a whole NumPy archive"
    try:
        with path.open("rb") as stored:
            _check_directory(stored)
            with zipfile.ZipFile(stored) as archive:
                return {
                    key: _read(archive, key, want, f"{name}: {key} of {path.name}")
                    for key, want in expected.items()
                }
    except CorruptData:
        raise
    # RuntimeError: a member that is encrypted; NotImplementedError, one of them: packed in an unknown way.
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # Names of members, which zipfile repeats, can be of any length.
        raise CorruptData(f"{where}: {' '.join(str(error).split())[:_REASON]}") from error


def _check_directory(stored: IO[bytes]) -> None:
    """Refuse an archive whose directory is larger than that of any of ours, before it is read."""
    head = stored.read(len(npy.MAGIC_PREFIX))
    if head == npy.MAGIC_PREFIX:
        raise ValueError("it holds a bare array")
    size = stored.seek(0, io.SEEK_END)
    start = stored.seek(max(0, size - _END - 2**16))
    tail = stored.read()
    # As zipfile looks for it: at the very end, else wherever a comment leaves it.
    at = len(tail) - _END
    if tail[at : at + 4] != _MARK or tail[-2:] != b"\0\0":
        at = tail.rfind(_MARK)
    if at < 0 or len(tail) < at + _END:
        raise ValueError("it has no directory at its end")
    if tail[max(0, at - 20) : at].startswith(b"PK\6\7") or start + at < 0:
        raise ValueError("its directory is that of an archive of more than 4 GB")
    length = int.from_bytes(tail[at + 12 : at + 16], "little")
    if length > _DIRECTORY:
        raise ValueError(f"its directory must have at most {_DIRECTORY} bytes, got {length}")


def _read(archive: zipfile.ZipFile, key: str, want: Expected, what: str) -> NDArray[Any]:
    """Read one array, checking its header before anything else of it."""
    member = archive.NameToInfo.get(f"{key}.npy")
    if member is None:
        known = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:20])
        raise ValueError(f"it has no array {key!r}, only {ascii(known)[1:-1]}")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{key} is packed in a way that NumPy does not use")
    with archive.open(member) as packed:
        start = packed.read(_HEADER)
        shape, fortran, dtype, used = _header(start, key)
        if dtype.kind not in _KINDS[want.kind] or (want.kind == "u" and dtype.itemsize != 1):
            raise CorruptData(f"{what} must hold {_ASKED[want.kind]}, got {str(dtype)[:80]}")
        if shape != want.shape:
            shown = str(shape) if len(str(shape)) <= 80 else f"one of {len(shape)} sizes"
            raise CorruptData(f"{what} must have shape {want.shape}, got {shown}")
        if not 0 < dtype.itemsize <= _ITEM[want.kind]:
            raise CorruptData(f"{what} must have items of at most {_ITEM[want.kind]} bytes, got {dtype}")
        content = bytearray(math.prod(shape) * dtype.itemsize)
        _fill(content, start[used:], packed, key)
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    if want.kind == "U" and not _is_text(array):
        raise CorruptData(f"{what} must hold printable text")
    if want.kind != "U" and not want.low <= int(array.min()) <= int(array.max()) <= want.high:
        raise CorruptData(
            f"{what} must lie in {want.low} ... {want.high}, got {int(array.min())} ... {int(array.max())}"
        )
    return array


def _is_text(array: NDArray[Any]) -> bool:
    """Whether what is stored as characters are some that can be shown."""
    numbers = np.ascontiguousarray(array).view(np.dtype("u4").newbyteorder(array.dtype.byteorder))
    # Beyond the last character, where Python would not know what to make of it.
    return int(numbers.max()) <= sys.maxunicode and all(t.isprintable() for t in array.ravel().tolist())


def _header(start: bytes, key: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order and type of an array, and the length of its header, from the first bytes of its file."""
    buffer = io.BytesIO(start)
    try:
        version = npy.read_magic(buffer)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(buffer)
    # The header is a Python literal, in which there are many ways of being wrong.
    except Exception as error:
        raise ValueError(f"{key} has no header of an array: {type(error).__name__}") from error
    if dtype.hasobject:
        raise ValueError(f"{key} holds Python objects, which are not read (allow_pickle=False)")
    return shape, fortran, dtype, buffer.tell()


def _fill(content: bytearray, start: bytes, packed: IO[bytes], key: str) -> None:
    """Read exactly as many bytes as there is room for; the end of a member is where its sum is checked."""
    at = min(len(start), len(content))
    content[:at] = start[:at]
    more = len(start) > at
    while at < len(content):
        piece = packed.read(min(_PIECE, len(content) - at))
        if not piece:
            raise ValueError(f"{key} ends after {at} of {len(content)} bytes")
        content[at : at + len(piece)] = piece
        at += len(piece)
    if more or packed.read(1):
        raise ValueError(f"{key} goes on after its {len(content)} bytes")
