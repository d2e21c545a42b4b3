"""Nothing is unpickled but the batches of CIFAR-10, and those only by their sums, and only to arrays."""

import ast
import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from pvae.data import CorruptData, _torchvision, load
from pvae.data._pickled import read_batch
from pvae.density import DensityTarget
from pvae.evaluation import LabelClassifier, inception_features
from tests.data.files import write_mnist

from .bombs import MARK, pickle_bomb

ROOT = Path(__file__).parents[2]
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")


def _sum(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data root whose CIFAR-10 is nothing but bombs."""
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name in BATCHES:
        (batches / name).write_bytes(pickle_bomb(tmp_path))
    return tmp_path


def test_bombs_in_place_of_the_batches(folder: Path) -> None:
    with pytest.raises(CorruptData, match=r"data_batch_1 does not have the published sum") as caught:
        load("cifar10", root=folder)
    assert "\n" not in str(caught.value)
    assert not (folder / MARK).exists()


def test_bombs_with_the_sums_of_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the sums ever wrong, a second check stands behind them."""
    published, digest = _torchvision.datasets().CIFAR10, _sum(pickle_bomb(folder))
    monkeypatch.setattr(published, "train_list", [[name, digest] for name in BATCHES[:5]])
    monkeypatch.setattr(published, "test_list", [["test_batch", digest]])
    with pytest.raises(CorruptData, match=r"it calls (posix|nt)\.mkdir, which no array needs"):
        load("cifar10", root=folder)
    assert not (folder / MARK).exists()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_of_numpy_1_and_2(tmp_path: Path, module: str) -> None:
    """Python 2 wrote the published batches, with names of NumPy 1."""
    if module == "numpy._core.multiarray" and int(np.__version__.split(".")[0]) < 2:
        pytest.skip("needs NumPy 2")
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = pickle.dumps({"data": array, "labels": [3, 4]}, protocol=2)
    for known in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        content = content.replace(b"c" + known + b"\n", b"c" + module.encode() + b"\n")
    (tmp_path / "batch").write_bytes(content)
    read = read_batch(tmp_path / "batch", _sum(content))
    assert np.array_equal(read["data"], array)
    assert read["labels"] == [3, 4]


@pytest.mark.parametrize(
    "called",
    [
        b"cbuiltins\neval\n",
        b"c__builtin__\neval\n",
        b"cnumpy\nload\n",
        b"cnumpy\nfromfile\n",
        b"ctorch\nload\n",
        b"c_codecs\nlookup\n",
        b"cos\nsystem\n",
        b"\x8c\x05numpy\x8c\x0ddtype.__new__\x93",
    ],
)
def test_what_no_array_needs(tmp_path: Path, called: bytes) -> None:
    content = b"\x80\x04" + called + b"(U\x01xtR."
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError, match="which no array needs"):
        read_batch(tmp_path / "batch", _sum(content))


def test_a_batch_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "batch").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="does not have the published sum"):
        read_batch(tmp_path / "batch", "0" * 32)


def test_files_that_torchvision_would_have_unpickled(tmp_path: Path) -> None:
    """Beside the files of an idx set torchvision looks for some of its own, from earlier versions."""
    write_mnist(tmp_path)
    before = load("mnist", root=tmp_path).protocol.hash
    (tmp_path / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        (tmp_path / "MNIST" / "processed" / name).write_bytes(pickle_bomb(tmp_path))
    assert load("mnist", root=tmp_path).protocol.hash == before
    assert not (tmp_path / MARK).exists()
    shutil.rmtree(tmp_path / "MNIST")


@pytest.mark.parametrize("reader", [DensityTarget, LabelClassifier])
def test_a_pickle_by_the_name_of_a_saved_part(tmp_path: Path, reader: type) -> None:
    path = tmp_path / "part.safetensors"
    path.write_bytes(pickle_bomb(tmp_path))
    with pytest.raises(ValueError, match="path must be a safetensors file") as caught:
        reader.load(path)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / MARK).exists()


def test_a_pickle_by_the_name_of_weights(tmp_path: Path) -> None:
    """torch reads these itself, by an unpickler of its own that calls nothing."""
    (tmp_path / "inception.pth").write_bytes(pickle_bomb(tmp_path))
    with pytest.raises(ValueError, match="path must be a file of torchvision's Inception v3"):
        inception_features(tmp_path / "inception.pth")
    assert not (tmp_path / MARK).exists()


def _names(tree: ast.AST) -> set[str]:
    """Names of what is imported or called as an attribute."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            found.add(ast.unparse(node.func) + (" of weights" if safe else ""))
    return found


def test_no_other_source_unpickles() -> None:
    """Of everything that ships one module imports pickle, one has torch read weights, none runs text."""
    pickling, weights, refused = [], [], []
    for room in ("pvae", "models", "guides", "experiments"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if any(parent.is_symlink() for parent in path.parents):
                continue
            names = _names(ast.parse(path.read_text()))
            where = str(path.relative_to(ROOT))
            if names & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}:
                pickling.append(where)
            if "torch.load of weights" in names:
                weights.append(where)
            if names & {"torch.load", "np.load", "numpy.load", "eval", "exec", "yaml.load", "os.system"}:
                refused.append(where)
    assert pickling == ["pvae/data/_pickled.py"]
    assert weights == ["pvae/evaluation/inception.py"]
    assert refused == []
