"""NumPy archives: nothing is unpickled, nothing swells, whatever their directories and headers claim."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pvae.data import CorruptData, load
from pvae.data._npz import Expected, read_npz

from .bombs import MARK, array_bytes, npy, npy_of, packed_zeros, pickle_bomb, write_archive, zip_of
from .confined import MEBIBYTES, confined

FILE = "freyfaces/freyfaces.npz"
SHAPE = (1_965, 28, 20)
WHOLE = int(np.prod(SHAPE))
EXPECTED = {"a": Expected("u", (3, 2))}
GIBIBYTE = 2**30


def refusal(root: Path, content: bytes) -> str:
    """The one line that loading an archive of Frey faces gives."""
    (root / FILE).parent.mkdir(exist_ok=True)
    (root / FILE).write_bytes(content)
    with pytest.raises(CorruptData) as caught:
        load("freyfaces", root=root)
    text = str(caught.value)
    assert text.startswith("freyfaces: ")
    assert len(text.splitlines()) == 1
    assert len(text) < 400
    assert not (root / MARK).exists()
    return text


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_by_the_name_of_an_archive(tmp_path: Path, protocol: int) -> None:
    assert "must be a whole NumPy archive" in refusal(tmp_path, pickle_bomb(tmp_path, protocol))


def test_a_pickle_by_the_name_of_an_array(tmp_path: Path) -> None:
    bomb = pickle_bomb(tmp_path)
    write_archive(tmp_path / FILE, images=bomb)
    assert "images has no header of an array" in refusal(tmp_path, (tmp_path / FILE).read_bytes())
    # As NumPy writes an array of objects: a header, then a pickle.
    write_archive(tmp_path / FILE, images=npy((1,), "|O") + bomb)
    assert "holds Python objects, which are not read" in refusal(tmp_path, (tmp_path / FILE).read_bytes())
    write_archive(tmp_path / FILE, images=npy(SHAPE, [("a", "|u1"), ("b", "|O")]) + bomb)
    assert "holds Python objects" in refusal(tmp_path, (tmp_path / FILE).read_bytes())


def _of(**changes: object) -> Callable[[Path], bytes]:
    """An archive of one member that claims something else than it is."""

    def made(folder: Path) -> bytes:
        given = {"name": "images.npy", "packed": b"", "size": 100} | changes
        return zip_of(**given)  # type: ignore[arg-type]

    return made


def _many(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(5_000):
            archive.writestr(f"{i}.npy", b"")
    return buffer.getvalue()


def _encrypted(folder: Path) -> bytes:
    return zip_of("images.npy", b"x" * 40, 28, flags=1)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (_many, "its directory must have at most 65536 bytes, got"),
        (_encrypted, "encrypted"),
        (_of(method=14), "packed in a way that NumPy does not use"),
        (_of(method=12), "packed in a way that NumPy does not use"),
        (_of(method=99), "packed in a way that NumPy does not use"),
        (_of(name="../images.npy"), r"has no array 'images', only ../images"),
        (_of(packed=b"\xff" * 50), "invalid"),
        (lambda _: b"PK\5\6" + b"\0" * 18, "has no array 'images', only"),
        (lambda _: b"PK\5\6" + b"\xff" * 18, "must have at most 65536 bytes"),
        (lambda _: b"PK\6\7" + b"\0" * 16 + b"PK\5\6" + b"\0" * 18, "more than 4 GB"),
        (lambda _: b"\x93NUMPY", "bare array"),
        (lambda _: b"", "no directory"),
    ],
)
def test_archives_that_lie(tmp_path: Path, made: Callable[[Path], bytes], message: str) -> None:
    assert message in refusal(tmp_path, made(tmp_path))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (npy((10**9, 10**9)), "must have shape"),
        (npy((-1, 28, 20)), "must have shape"),
        (npy((1_965, 28, 20.0)), "no header of an array"),
        (npy((10**4000,)), "must have shape"),
        (npy(SHAPE, "<f8"), "must hold uint8, got float64"),
        (npy(SHAPE, "|V1000000000"), "must hold uint8"),
        (npy(SHAPE, "|U100000000"), "must hold uint8"),
        (npy(SHAPE, "no type"), "no header of an array"),
        (npy(SHAPE, "int8, float8"), "no header of an array"),
        (npy_of("{'descr': '|u1'}"), "no header of an array"),
        (npy_of("__import__('os').mkdir('x')"), "no header of an array"),
        (npy_of("[" * 5000 + "]" * 5000), "no header of an array"),
        (npy_of("-" * 9000), "no header of an array"),
        (npy_of("{" * 60), "no header of an array"),
        (npy_of("{}", version=2, length=2**32 - 1), "no header of an array"),
        (npy_of("{}", version=3), "no header of an array"),
        (npy_of("{}", version=9), "no header of an array"),
        (b"", "no header of an array"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: bytes, message: str) -> None:
    write_archive(tmp_path / FILE, images=header + bytes(100))
    assert message in refusal(tmp_path, (tmp_path / FILE).read_bytes())


def test_text_that_is_none(tmp_path: Path) -> None:
    expected = {"a": Expected("U", (2,))}
    for content, message in (
        (npy((2,), "<U1") + b"\xff" * 8, "must hold printable text"),
        (array_bytes(np.array(["a", "b\x1b[2J"])), "must hold printable text"),
        (npy((2,), "<U100000"), "items of at most 1024 bytes"),
    ):
        write_archive(tmp_path / "a.npz", a=content)
        with pytest.raises(CorruptData, match=message):
            read_npz("set", tmp_path, "a.npz", expected)


@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_what_is_right_is_read(tmp_path: Path, by_columns: bool, packed: bool) -> None:
    array = np.arange(6, dtype=np.uint8).reshape(3, 2)
    save = np.savez_compressed if packed else np.savez
    save(tmp_path / "a.npz", a=np.asfortranarray(array) if by_columns else array, b=np.zeros(3))
    read = read_npz("set", tmp_path, "a.npz", EXPECTED)
    assert list(read) == ["a"]
    assert np.array_equal(read["a"], array)
    assert read["a"].flags.writeable


def test_a_comment_that_ends_like_a_directory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", array_bytes(np.zeros((3, 2), np.uint8)))
        archive.comment = b"PK\5\6" + b"\xff" * 30
    with pytest.raises(CorruptData, match=r"must have at most 65536 bytes, got"):
        read_npz("set", tmp_path, "a.npz", EXPECTED)


def test_archives_that_swell(tmp_path: Path) -> None:
    """Each of these unpacks to a gibibyte or more; none takes more than what was expected of it."""
    right, head = npy(SHAPE), npy((2**30,))
    header = npy_of("{" + " " * 100, version=2, length=2**31)
    made = {
        "of another shape": (packed_zeros(head, GIBIBYTE), GIBIBYTE + len(head)),
        "of the right shape": (packed_zeros(right, GIBIBYTE), GIBIBYTE + len(right)),
        "that claims the right size": (packed_zeros(right, GIBIBYTE), WHOLE + len(right)),
        "all header": (packed_zeros(header, 2 * GIBIBYTE), 2 * GIBIBYTE),
    }
    statements = {}
    for i, (name, (packed, size)) in enumerate(made.items()):
        root = tmp_path / str(i)
        (root / FILE).parent.mkdir(parents=True)
        (root / FILE).write_bytes(zip_of("images.npy", packed, size))
        assert (root / FILE).stat().st_size < 2**22
        statements[name] = f"load('freyfaces', root={str(root)!r})"
    (tmp_path / "sparse" / FILE).parent.mkdir(parents=True)
    with (tmp_path / "sparse" / FILE).open("wb") as file:
        file.truncate(2**40)
    statements["a tebibyte of nothing"] = f"load('freyfaces', root={str(tmp_path / 'sparse')!r})"
    outcomes = confined("from pvae.data import load", statements)
    for name, outcome in outcomes.items():
        assert outcome.kind == "CorruptData", (name, outcome)
        assert outcome.grown < MEBIBYTES / 4, (name, outcome)
    assert "must have shape" in outcomes["of another shape"].text
    assert "goes on after its" in outcomes["of the right shape"].text
