"""Files that want to do harm: pickles that act, archives that swell, headers that claim what is not there."""

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pvae.files import sealed

__all__ = [
    "MARK",
    "array_bytes",
    "npy",
    "npy_of",
    "packed_zeros",
    "pickle_bomb",
    "safetensors_of",
    "write_archive",
    "write_checkpoint",
    "zip_of",
]

MARK = "the bomb went off"
_BLOCK = 2**24


class _Bomb:
    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._place),)


def pickle_bomb(folder: Path, protocol: int = 2) -> bytes:
    """A pickle that makes a folder named :data:`MARK` as soon as it is read."""
    return pickle.dumps({"data": _Bomb(folder / MARK), "labels": [0]}, protocol)


def npy(shape: object, descr: object = "|u1", *, order: bool = False, version: int = 1) -> bytes:
    """The header of an array that claims a shape and a type, which may be any literal."""
    return npy_of(f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape!r}, }}", version)


def npy_of(header: str, version: int = 1, length: int | None = None) -> bytes:
    """A header of any text, of a length that may be a lie."""
    text = header.encode("latin1") + b"\n"
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", size) + text


def packed_zeros(start: bytes, size: int) -> bytes:
    """Deflate ``start`` and then at least ``size`` zeros: a thousandth of their length."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(start + bytes(_BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush equal blocks are packed into equal bytes.
    more = packer.compress(bytes(_BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + more * (size // _BLOCK) + packer.flush(zlib.Z_FINISH)


def zip_of(name: str, packed: bytes, size: int, *, method: int = 8, flags: int = 0) -> bytes:
    """An archive of one member, with the size it claims and a sum that nothing has."""
    fields = struct.pack("<HHHHHIII", 20, flags, method, 0, 0, 0xDEADBEEF, len(packed), size)
    key = name.encode()
    local = b"PK\3\4" + fields + struct.pack("<HH", len(key), 0) + key
    central = b"PK\1\2" + struct.pack("<H", 20) + fields
    central += struct.pack("<HHHHHII", len(key), 0, 0, 0, 0, 0, 0) + key
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local) + len(packed), 0)
    return local + packed + central + end


def write_archive(path: Path, **members: bytes) -> None:
    """Write an archive of members as they are, whole by its own account."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def safetensors_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, of a length that may be a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_checkpoint(out: Path, content: bytes, which: str = "last", **meta: Any) -> Path:
    """Write a checkpoint whose pointer and sums are right, whatever the content is."""
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"step-00000001-{digest[:8]}.safetensors"
    path.write_bytes(content)
    pointer = sealed({"file": path.name, "sha256": digest, "step": 1} | meta)
    (folder / f"{which}.json").write_text(json.dumps(pointer))
    return path


def array_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """An array as NumPy writes it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
