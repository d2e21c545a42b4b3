"""Every set, from real files where they are and from built ones always; the door's refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvae.data import DataError, MissingData, load, names

SIZES: dict[str, tuple[int, ...]] = {
    "digits": (1297, 200, 300),
    "mnist": (50_000, 10_000, 10_000),
    "fashion_mnist": (50_000, 10_000, 10_000),
    "kmnist": (50_000, 10_000, 10_000),
    "emnist": (104_000, 20_800, 20_800),
    "omniglot": (22_722, 1_623, 8_115),
    "binarized_mnist": (50_000, 10_000, 10_000),
    "freyfaces": (1_565, 200, 200),
    "cifar10": (3_000, 500, 500),
    "sprites": (8_000, 1_000, 2_000),
    "gaussian_mixture": (10_000, 2_000, 5_000),
    "embedded_mixture": (20_000, 2_000, 5_000),
    "two_moons": (10_000, 2_000, 5_000),
    "manifold": (10_000, 2_000, 5_000),
    "saddle": (10_000, 2_000, 5_000),
    "ppca": (10_000, 2_000, 5_000),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "digits": (1, 8, 8),
    "freyfaces": (1, 28, 20),
    "cifar10": (3, 32, 32),
    "sprites": (1, 32, 32),
    "gaussian_mixture": (2,),
    "embedded_mixture": (50,),
    "two_moons": (2,),
    "manifold": (2,),
    "saddle": (3,),
    "ppca": (10,),
}
VALUES = {
    **dict.fromkeys(("digits", "mnist", "kmnist", "emnist", "omniglot", "binarized_mnist"), "binary"),
    **dict.fromkeys(("fashion_mnist", "freyfaces", "cifar10", "sprites"), "unit"),
    **dict.fromkeys(
        ("gaussian_mixture", "embedded_mixture", "two_moons", "manifold", "saddle", "ppca"), "real"
    ),
}
CLASSES = {
    **dict.fromkeys(("digits", "mnist", "fashion_mnist", "kmnist", "cifar10"), 10),
    "emnist": 26,
    "omniglot": 50,
    "gaussian_mixture": 8,
    "embedded_mixture": 4,
    "two_moons": 2,
}
DRAWN = {
    "digits",
    "sprites",
    "gaussian_mixture",
    "embedded_mixture",
    "two_moons",
    "manifold",
    "saddle",
    "ppca",
}


def test_names_are_these() -> None:
    # Of celeba there are no files of full size; it has tests of its own.
    assert set(names()) - {"celeba"} == set(SIZES) == set(VALUES)


@pytest.mark.parametrize("name", sorted(set(SIZES) - DRAWN))
def test_every_set_from_files(name: str, root: Path) -> None:
    check(name, root)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_every_set_without_files(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


def check(name: str, root: Path) -> None:
    data = load(name, root=root)
    shape = SHAPES.get(name, (1, 28, 28))
    assert data.name == name
    assert data.parts == ("train", "valid", "test")
    assert tuple(len(split) for split in (data.train, data.valid, data.test)) == SIZES[name]
    assert data.x_shape == shape
    assert data.protocol.values == VALUES[name]
    assert data.num_classes == CLASSES.get(name)
    assert data.class_names is None or len(data.class_names) == data.num_classes
    assert (data.log_density is None) == (VALUES[name] != "real")
    for split in (data.train, data.valid, data.test):
        part = split[:64]
        batch = part.sample(torch.arange(64))
        assert batch.x.shape == part.x.shape == (64, *shape)
        assert batch.x.dtype == torch.float32
        low, high = float(batch.x.min()), float(batch.x.max())
        if data.protocol.values == "binary":
            assert set(batch.x.unique().tolist()) <= {0.0, 1.0}
        elif data.protocol.values == "unit":
            assert 0.0 <= low <= high <= 1.0
        else:
            assert -50 < low < high < 50
        if data.num_classes is not None:
            assert split.y is not None
            assert split.y.dtype == torch.int64
            assert int(split.y.min()) >= 0
            assert int(split.y.max()) < data.num_classes
    assert load(name, root=root).protocol == data.protocol


def test_images_and_labels_are_those_of_the_files(root: Path) -> None:
    """Against the raw files, read with NumPy alone."""
    for name, folder in (("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")):
        raw = np.fromfile(root / folder / "raw" / "train-images-idx3-ubyte", np.uint8, offset=16)
        labels = np.fromfile(root / folder / "raw" / "train-labels-idx1-ubyte", np.uint8, offset=8)
        data = load(name, root=root, binarize=None, scale="count")
        images = raw.reshape(-1, 1, 28, 28)
        for split, rows in ((data.train, slice(0, 50_000)), (data.valid, slice(50_000, 60_000))):
            assert split.y is not None
            assert np.array_equal(split.y.numpy(), labels[rows])
            assert np.array_equal(split[:500].x.numpy(), images[rows][:500].astype(np.float32))
            assert float(split.x.double().sum()) == float(images[rows].sum())


def test_digits() -> None:
    from sklearn.datasets import load_digits

    data = load("digits", scale="count")
    x = torch.cat([split.x for split in (data.train, data.valid, data.test)]).flatten(1)
    given = torch.from_numpy(load_digits().data).float()
    # Every digit once: both sets of rows in one order.
    assert torch.equal(torch.unique(x, dim=0), torch.unique(given, dim=0))
    assert len(x) == len(given)
    assert (data.protocol.values, data.protocol.levels) == ("count", 17)
    for split in (data.train, data.valid, data.test):
        assert split.y is not None
        share = torch.bincount(split.y) / len(split)
        assert float((share - torch.from_numpy(np.bincount(load_digits().target) / 1797)).abs().max()) < 0.011
    other = load("digits", scale="count", seed=5, valid=100)
    assert torch.equal(other.test.x, data.test.x)
    assert len(other.train) == 1397
    assert load("digits", scale="count", seed=5).protocol == data.protocol
    assert torch.equal(load("digits", binarize=None).test.x, data.test.x / 16)


def test_valid_is_the_end_of_the_training_images(built: Path) -> None:
    whole = load("mnist", root=built, valid=0, binarize=None)
    assert whole.parts == ("train", "test")
    part = load("mnist", root=built, valid=59_950, binarize=None)
    assert torch.equal(part.train.x, whole.train[:50].x)
    assert torch.equal(part.valid[:50].x, whole.train[50:100].x)
    assert part.protocol.hash != whole.protocol.hash
    with pytest.raises(DataError, match=r"valid must lie in 0 \.\.\. 59999 for mnist, .* got 60000"):
        load("mnist", root=built, valid=60_000)


def test_emnist_is_upright(built: Path) -> None:
    data = load("emnist", root=built, binarize=None)
    for first in (data.train[:1].x, data.test[:1].x):
        # Stored as a bar along the first row, shown as a bar down the first column.
        assert torch.equal(first[0, 0, :, 0], torch.ones(28))
        assert float(first.sum()) == 28
    assert data.class_names is not None
    assert data.class_names[:3] == ("A", "B", "C")


def test_emnist_test_part_alone(root: Path, tmp_path: Path) -> None:
    data = load("emnist", root=root, parts="test")
    assert data.parts == ("test",)
    assert len(data.test) == 20_800
    with pytest.raises(MissingData, match="emnist has no train part, only test"):
        _ = data.train
    (tmp_path / "EMNIST").mkdir()
    (tmp_path / "EMNIST" / "raw").mkdir()
    for file in (root / "EMNIST" / "raw").glob("*-test-*"):
        (tmp_path / "EMNIST" / "raw" / file.name).symlink_to(file)
    with pytest.raises(
        MissingData, match=r"letters-train-images.*the test part is there, parts='test' loads it"
    ):
        load("emnist", root=tmp_path)
    with pytest.raises(DataError, match="valid must be None without a training part, got 5"):
        load("emnist", root=root, parts="test", valid=5)
    with pytest.raises(DataError, match="parts must be 'all' or 'test', got 'both'"):
        load("emnist", root=root, parts="both")


def test_omniglot_splits_by_drawer(root: Path) -> None:
    data = load("omniglot", root=root, labels="character", binarize=None)
    for split, drawers in ((data.train, 14), (data.valid, 1), (data.test, 5)):
        assert split.y is not None
        assert torch.equal(split.y, torch.arange(1623).repeat(drawers))
    assert "not chardata.mat" in data.protocol.note
    assert data.num_classes == 1623
    archive = np.load(root / "omniglot" / "omniglot_28x28.npz")
    rows = archive["images"][archive["drawer"] == 15]
    assert np.array_equal((data.valid.x * 255).round().numpy()[:, 0], rows.astype(np.float32))
    with pytest.raises(DataError, match="labels must be 'alphabet' or 'character', got 'drawer'"):
        load("omniglot", root=root, labels="drawer")


def test_binarized_mnist_is_as_stored(root: Path) -> None:
    data = load("binarized_mnist", root=root, labels="matched")
    archive = np.load(root / "binarized_mnist" / "binarized_mnist.npz")
    for part, split in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        assert np.array_equal(split.x.reshape(-1, 784).numpy(), archive[part])
        assert torch.equal(split.sample(torch.arange(50)).x, split.x[:50])
        assert split.y is not None
        assert np.array_equal(split.y.numpy(), archive[f"{part}_labels_matched"])
    assert (data.protocol.binarize, data.protocol.levels) == ("static", 2)
    assert load("binarized_mnist", root=root).num_classes is None
    with pytest.raises(DataError, match=r"binarize must be 'static' for binarized_mnist.*got 'dynamic'"):
        load("binarized_mnist", root=root, binarize="dynamic")
    with pytest.raises(DataError, match="valid must be None for binarized_mnist"):
        load("binarized_mnist", root=root, valid=10)
    with pytest.raises(DataError, match="labels must be 'none' or 'matched'"):
        load("binarized_mnist", root=root, labels="all")


def test_freyfaces_blocks_and_shuffles(root: Path) -> None:
    images = torch.from_numpy(np.load(root / "freyfaces" / "freyfaces.npz")["images"]).float().unsqueeze(1)
    blocks = load("freyfaces", root=root, scale="count")
    stored = torch.cat([blocks.train.x, blocks.valid.x, blocks.test.x])
    assert torch.equal(stored, images)
    assert load("freyfaces", root=root, seed=1).protocol == load("freyfaces", root=root).protocol
    shuffled = load("freyfaces", root=root, scale="count", split="shuffled")
    assert [len(split) for split in (shuffled.train, shuffled.valid, shuffled.test)] == [1565, 200, 200]
    order = torch.cat([shuffled.train.x, shuffled.valid.x, shuffled.test.x])
    assert not torch.equal(order, images)
    assert torch.equal(order.sum((1, 2, 3)).sort().values, images.sum((1, 2, 3)).sort().values)
    assert "not a held-out" in shuffled.protocol.note
    other = load("freyfaces", root=root, scale="count", split="shuffled", seed=1)
    assert other.protocol.hash != shuffled.protocol.hash
    with pytest.raises(DataError, match="split must be 'blocks' or 'shuffled', got 'random'"):
        load("freyfaces", root=root, split="random")


def test_cifar10_subset_says_so(root: Path) -> None:
    data = load("cifar10", root=root, scale="count", source="subset")
    archive = np.load(root / "cifar10" / "cifar10_train_first4000_lossless.npz")
    x = torch.cat([data.train.x, data.valid.x, data.test.x]).permute(0, 2, 3, 1)
    assert np.array_equal(x.numpy(), archive["images"].astype(np.float32))
    assert "lossless subset" in data.protocol.note
    with pytest.raises(DataError, match="source must be 'auto', 'full' or 'subset', got 'jpeg'"):
        load("cifar10", root=root, source="jpeg")


def test_defaults_give_way_to_what_is_asked(built: Path) -> None:
    assert load("digits", dequantize=True).protocol.binarize is None
    assert load("digits", binarize="none").protocol.values == "unit"
    assert load("digits", binarize="threshold").protocol.seed is None
    assert load("digits", binarize="static").protocol.seed == 0
    hashes = {
        load("digits", **options).protocol.hash
        for options in (
            {},
            {"binarize": "static"},
            {"binarize": "threshold"},
            {"binarize": None},
            {"scale": "count"},
            {"dequantize": True},
            {"seed": 1},
            {"valid": 100},
        )
    }
    assert len(hashes) == 8


def test_root_comes_from_the_environment(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PVAE_DATA", str(built))
    assert len(load("freyfaces").test) == 200
    with pytest.raises(MissingData, match=str(tmp_path)):
        load("freyfaces", root=tmp_path)
    monkeypatch.delenv("PVAE_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        MissingData, match=r"missing under .*\.cache/pvae, which is no folder: set PVAE_DATA or root"
    ):
        load("freyfaces")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("minst", {}, r"name must be a data set \(did you mean 'mnist'\?\), got 'minst'"),
        ("Fashion-MNIST", {}, "did you mean 'fashion_mnist'"),
        ("xyzzy", {}, "there are digits, mnist, .*got 'xyzzy'"),
        (
            "digits",
            {"binarise": "static"},
            r"options that it has \(did you mean 'binarize'\?\), got 'binarise'",
        ),
        ("two_moons", {"nose": 1.0}, "did you mean 'noise'"),
        ("digits", {"noise": 1.0}, "digits must be given options that it has .*got 'noise'"),
        ("digits", {"binarize": "dynamical"}, "binarize must be 'default', 'dynamic'.*got 'dynamical'"),
        ("digits", {"scale": "real"}, "scale must be 'unit' or 'count' for the values of digits, got 'real'"),
        ("two_moons", {"binarize": "dynamic"}, "binarize must be None for two_moons"),
        ("two_moons", {"noise": 0.0}, r"noise must be positive, got 0\.0"),
        ("two_moons", {"num_train": 0}, "num_train must be positive, got 0"),
        ("ppca", {"z_dim": -1}, "z_dim must be positive, got -1"),
        ("gaussian_mixture", {"layout": "grid"}, "layout must be 'ring' or 'random', got 'grid'"),
        ("sprites", {"num_test": 0}, "num_train, valid and num_test must be positive, got 8000, 1000, 0"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(name, **options)
