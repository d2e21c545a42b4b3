"""Downloading, from a server on this machine, in the published formats: whole files or none."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvae.data import CorruptData, MissingData, _torchvision, load

from .files import write_mnist, write_npz


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the address where its files are served."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def left(root: Path) -> list[str]:
    """All files under a folder."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def mirror(built: Path, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of gzipped MNIST files whose address torchvision takes for MNIST's."""
    folder, address = served
    resources = []
    for path in sorted((built / "MNIST" / "raw").iterdir()):
        packed = gzip.compress(path.read_bytes(), compresslevel=1)
        (folder / f"{path.name}.gz").write_bytes(packed)
        resources.append((f"{path.name}.gz", hashlib.md5(packed).hexdigest()))
    published = _torchvision.datasets().MNIST
    monkeypatch.setattr(published, "mirrors", [f"{address}/"])
    monkeypatch.setattr(published, "resources", resources)
    return folder


FILES = [
    "MNIST/raw/t10k-images-idx3-ubyte",
    "MNIST/raw/t10k-labels-idx1-ubyte",
    "MNIST/raw/train-images-idx3-ubyte",
    "MNIST/raw/train-labels-idx1-ubyte",
]


@pytest.mark.usefixtures("mirror")
def test_downloads_what_is_missing_once(tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "new" / "root"
    data = load("mnist", root=root, download=True)
    assert data.protocol == load("mnist", root=built).protocol
    assert left(root) == FILES
    monkeypatch.setattr(_torchvision, "download_idx", pytest.fail)
    load("mnist", root=root, download=True)


@pytest.mark.usefixtures("mirror")
def test_downloads_what_is_damaged(tmp_path: Path, built: Path) -> None:
    root = tmp_path / "root"
    write_mnist(root)
    os.truncate(root / FILES[2], 1000)
    with pytest.raises(CorruptData):
        load("mnist", root=root)
    assert load("mnist", root=root, download=True).protocol == load("mnist", root=built).protocol
    assert left(root) == FILES


def test_a_failed_download_leaves_nothing(mirror: Path, tmp_path: Path) -> None:
    (mirror / "t10k-labels-idx1-ubyte.gz").write_bytes(b"half a fi")
    root = tmp_path / "root"
    with pytest.raises(MissingData, match=r"mnist could not be downloaded to .*t10k-labels") as caught:
        load("mnist", root=root, download=True)
    assert "\n" not in str(caught.value)
    assert left(root) == []
    assert list(root.iterdir()) == []


def test_a_download_of_the_wrong_shape_leaves_nothing(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x02\x00\x00")
    (mirror / "train-labels-idx1-ubyte.gz").write_bytes(packed)
    published = _torchvision.datasets().MNIST
    changed = [
        (name, hashlib.md5(packed).hexdigest() if name.startswith("train-labels") else digest)
        for name, digest in published.resources
    ]
    monkeypatch.setattr(published, "resources", changed)
    root = tmp_path / "root"
    with pytest.raises(CorruptData, match=r"train-labels-idx1-ubyte must hold shape \(60000,\), got \(2,\)"):
        load("mnist", root=root, download=True)
    assert left(root) == []


def test_sets_without_a_download_say_so(tmp_path: Path) -> None:
    for name in ("omniglot", "freyfaces", "binarized_mnist"):
        with pytest.raises(MissingData, match="there is no download of this"):
            load(name, root=tmp_path, download=True)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A data root with the files of the whole CIFAR-10, and their sums."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    content: dict[str, Any] = {"batches.meta": {"label_names": [str(i) for i in range(10)]}}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = np.zeros((10_000, 3072), np.uint8)
        images[:5] = generator.integers(0, 256, (5, 3072))
        content[name] = {"data": images, "labels": generator.integers(0, 10, 10_000).tolist()}
    sums = {}
    for name, value in content.items():
        stored = pickle.dumps(value)
        (folder / name).write_bytes(stored)
        sums[name] = hashlib.md5(stored).hexdigest()
    yield root, sums
    shutil.rmtree(root)


class TestCifar10:
    """The whole set, in six pickles whose sums torchvision is told."""

    @pytest.fixture
    def whole(
        self, batches: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Path:
        """A data root whose files may be changed: links to the ones that were made."""
        root, sums = batches
        published = _torchvision.datasets().CIFAR10
        train = [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
        monkeypatch.setattr(published, "train_list", train)
        monkeypatch.setattr(published, "test_list", [["test_batch", sums["test_batch"]]])
        monkeypatch.setitem(published.meta, "md5", sums["batches.meta"])
        folder = tmp_path / "whole" / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        for name in sums:
            (folder / name).symlink_to(root / folder.name / name)
        return folder.parent

    def test_whole(self, whole: Path) -> None:
        write_npz(whole, "cifar10")
        data = load("cifar10", root=whole, scale="count")
        assert [len(split) for split in (data.train, data.valid, data.test)] == [45_000, 5_000, 10_000]
        assert data.x_shape == (3, 32, 32)
        assert data.protocol.note == ""
        stored = pickle.loads((whole / "cifar-10-batches-py" / "data_batch_1").read_bytes())
        first = torch.from_numpy(stored["data"][:5].reshape(5, 3, 32, 32)).float()
        assert torch.equal(data.train[:5].x, first)
        assert data.train.y is not None
        assert data.train.y[:10_000].tolist() == stored["labels"]
        assert "subset" in load("cifar10", root=whole, source="subset").protocol.note

    def test_damaged(self, whole: Path) -> None:
        damaged = whole / "cifar-10-batches-py" / "data_batch_3"
        damaged.unlink()
        damaged.write_bytes(b"half a fi")
        with pytest.raises(
            CorruptData, match="batches in cifar-10-batches-py must be the published files, whole"
        ):
            load("cifar10", root=whole)

    def test_absent(self, tmp_path: Path) -> None:
        for source in ("auto", "full"):
            with pytest.raises(
                MissingData, match=r"needs the file cifar-10-batches-py.*or pass download=True"
            ):
                load("cifar10", root=tmp_path, source=source)

    def test_download(
        self, whole: Path, served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, address = served
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1, dereference=True) as archive:
            archive.add(whole / "cifar-10-batches-py", arcname="cifar-10-batches-py")
        (folder / "cifar.tar.gz").write_bytes(packed.getvalue())
        published = _torchvision.datasets().CIFAR10
        monkeypatch.setattr(published, "url", f"{address}/gone.tar.gz")
        monkeypatch.setattr(published, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
        root = tmp_path / "root"
        with pytest.raises(MissingData, match="cifar10 could not be downloaded to"):
            load("cifar10", root=root, download=True)
        assert list(root.iterdir()) == []
        # What is damaged is replaced.
        (root / "cifar-10-batches-py").mkdir()
        (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"half a fi")
        monkeypatch.setattr(published, "url", f"{address}/cifar.tar.gz")
        assert len(load("cifar10", root=root, download=True).test) == 10_000
        assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]
        assert len(left(root)) == 7
