"""Streaming gives what memory gives: the same batches, in the same order, with the same noise."""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from pvae.data import Batch, CorruptData, Data, DataError, StreamingSplit, from_datasets, from_tensors

# Forking beside torch's threads is what a DataLoader does by default on Linux.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

N = 50
X = torch.randint(0, 256, (N, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 5


class Made(Dataset[Any]):
    """A dataset from a function of the position."""

    def __init__(self, make: Callable[[int], Any], n: int = N) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> Any:
        return self.make(position)


def pair(**options: Any) -> tuple[Data, Data]:
    """The same data in memory and streaming."""
    workers = options.pop("num_workers", 0)
    labels = {"train": Y, "test": Y}
    memory = from_tensors(X, test=X, y=labels, **options)
    part = TensorDataset(X, Y)
    stream = from_datasets(part, test=part, name="custom", fingerprint="1", num_workers=workers, **options)
    return memory, stream


def batches(data: Data, part: str = "train", **options: Any) -> list[Batch]:
    arguments: dict[str, Any] = {"seed": 3, "epoch": 1, "drop_last": False, **options}
    torch.manual_seed(7)
    return list(getattr(data, part).batches(8, **arguments))


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.x, other.x)
        assert one.x.dtype == other.x.dtype == torch.float32
        assert torch.equal(one.index, other.index)
        assert one.y is not None
        assert other.y is not None
        assert torch.equal(one.y, other.y)


@pytest.mark.parametrize(
    "options",
    [{}, {"binarize": "dynamic"}, {"binarize": "static"}, {"scale": "count"}, {"dequantize": True}],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_equals_memory(options: dict[str, Any], part: str) -> None:
    memory, stream = pair(**options)
    assert_same(batches(memory, part), batches(stream, part))
    assert_same(batches(memory, part, start=3), batches(stream, part, start=3))
    assert_same(
        batches(memory, part, shuffle=False, drop_last=True),
        batches(stream, part, shuffle=False, drop_last=True),
    )
    assert torch.equal(getattr(memory, part).x, getattr(stream, part).x)


def test_equals_memory_with_workers() -> None:
    memory, stream = pair(binarize="dynamic", num_workers=2)
    assert_same(batches(memory), batches(stream))
    assert_same(batches(memory, start=5), batches(stream, start=5))
    assert batches(stream, start=7) == []


def test_surface() -> None:
    memory, stream = pair(binarize="dynamic")
    split = stream.train
    assert isinstance(split, StreamingSplit)
    assert (split.fits_device, memory.train.fits_device) == (False, True)
    assert (len(split), split.x_shape, split.name) == (N, (1, 4, 4), "train")
    assert split.protocol.values == "binary"
    assert split.y is not None
    assert torch.equal(split.y, Y)
    assert split.to("meta").device.type == "meta"
    assert split.num_batches(8, drop_last=False) == 7
    index = torch.tensor([3, 1])
    torch.manual_seed(0)
    expected = memory.train.sample(index)
    torch.manual_seed(0)
    assert_same([split.sample(index)], [expected])


@pytest.mark.parametrize("binarize", ["dynamic", "static"])
def test_selection_is_in_memory_and_encoded_as_the_whole(binarize: str) -> None:
    memory, stream = pair(binarize=binarize)
    part = stream.test[torch.tensor([30, 2])]
    assert part.fits_device
    assert torch.equal(part.x, memory.test.x[[30, 2]])
    assert part.protocol.subset == memory.test[torch.tensor([30, 2])].protocol.subset


@pytest.mark.parametrize("workers", [0, 2])
def test_many_are_read_in_pieces_and_by_the_workers(workers: int) -> None:
    n = 2_500
    x = torch.randint(0, 256, (n, 3), dtype=torch.uint8)
    part = TensorDataset(x, torch.arange(n))
    data = from_datasets(part, name="mine", fingerprint="1", scale="count", num_workers=workers)
    state = torch.get_rng_state()
    where = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    selected = data.train[where]
    assert torch.equal(selected.x, x[where].float())
    assert selected.y is not None
    assert torch.equal(selected.y, where)
    assert data.train.y is not None
    assert torch.equal(data.train.y, torch.arange(n))
    assert torch.equal(torch.get_rng_state(), state)


def unlabelled(position: int) -> Tensor:
    if position:
        pytest.fail("read a datum for its label")
    return X[0]


def test_labels_known_beforehand() -> None:
    bare = from_datasets(TensorDataset(X), name="mine", fingerprint="1")
    assert (bare.train.y, bare.num_classes) == (None, None)
    attributes = torch.stack([Y == 0, Y > 2], 1)
    for y, classes in ((Y, 5), (attributes, None)):
        names = None if classes else ["a", "b"]
        data = from_datasets(Made(unlabelled), name="mine", fingerprint="1", y=y, attribute_names=names)
        assert data.num_classes == classes
        assert data.attribute_names == (None if classes else ("a", "b"))
        assert data.train.y is not None
        assert torch.equal(data.train.y, y if classes else y.float())
        whole = from_datasets(TensorDataset(X), name="mine", fingerprint="1", y=y)
        index = torch.tensor([7, 3, 3])
        for found in (whole.train.sample(index).y, whole.train[index].y):
            assert found is not None
            assert torch.equal(found, data.train.y[index])
        batch = next(whole.train.batches(8, seed=0, epoch=0, drop_last=False))
        assert batch.y is not None
        assert torch.equal(batch.y, data.train.y[batch.index])


def test_labels_known_beforehand_take_the_place_of_those_read() -> None:
    data = from_datasets(TensorDataset(X, Y), name="mine", fingerprint="1", y=4 - Y)
    batch = data.train.sample(torch.tensor([0, 1, 2]))
    assert batch.y is not None
    assert batch.y.tolist() == [4, 3, 2]
    with pytest.raises(DataError, match=r"y of train must have shape \(50,\) or \(50, L\), got \(49,\)"):
        from_datasets(TensorDataset(X), name="mine", fingerprint="1", y=Y[1:])
    with pytest.raises(DataError, match="attribute_names must name the 2 columns of y, got 1"):
        from_datasets(TensorDataset(X), name="m", fingerprint="1", y=torch.zeros(N, 2), attribute_names=["a"])


def test_protocol_holds_the_fingerprint() -> None:
    part = TensorDataset(X)
    a, b = (from_datasets(part, name="mine", fingerprint=text).protocol for text in ("1", "2"))
    assert a.hash != b.hash
    assert a == from_datasets(part, name="mine", fingerprint="1").protocol


def test_augmentation_is_a_function_of_seed_epoch_and_position() -> None:
    noisy = Made(lambda i: X[i] * 0 + torch.randint(0, 256, (1,)).to(torch.uint8))
    runs = {}
    for workers in (0, 2):
        data = from_datasets(noisy, name="noisy", fingerprint="1", num_workers=workers)
        torch.manual_seed(workers)
        state = torch.get_rng_state()
        runs[workers] = list(data.train.batches(8, seed=0, epoch=0, drop_last=False))
        assert torch.equal(torch.get_rng_state(), state)
        late = list(data.train.batches(8, seed=0, epoch=0, drop_last=False, start=4))
        assert torch.equal(torch.cat([b.x for b in late]), torch.cat([b.x for b in runs[workers][4:]]))
        other = next(data.train.batches(8, seed=0, epoch=1, drop_last=False, shuffle=False))
        first = next(data.train.batches(8, seed=0, epoch=0, drop_last=False, shuffle=False))
        assert not torch.equal(other.x, first.x)
    assert torch.equal(torch.cat([b.x for b in runs[0]]), torch.cat([b.x for b in runs[2]]))
    assert len(torch.cat([b.x for b in runs[0]]).unique()) > 30


def test_pillow_images_arrays_and_attributes() -> None:
    colour = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    attribute = torch.tensor([1.0, 0.0])
    images: list[tuple[Any, Tensor]] = [
        (Image.fromarray(colour), torch.from_numpy(colour.transpose(2, 0, 1).copy())),
        (Image.fromarray(colour[..., 0]), torch.from_numpy(colour[None, ..., 0].copy())),
        (colour, torch.from_numpy(colour)),
    ]
    for image, expected in images:
        dataset = Made(lambda i, image=image: (image, attribute))  # type: ignore[misc]
        data = from_datasets(dataset, name="mine", fingerprint="1", scale="count", attribute_names=["a", "b"])
        batch = data.train.sample(torch.tensor([0, 1]))
        assert torch.equal(batch.x, expected.to(torch.float32).expand(2, *expected.shape))
        assert batch.y is not None
        assert torch.equal(batch.y, attribute.expand(2, 2))


def test_floats() -> None:
    x = torch.randn(10, 3)
    real = from_datasets(TensorDataset(x), name="mine", fingerprint="1", levels=None, scale="real")
    assert real.protocol.values == "real"
    assert torch.equal(real.train.x, x)
    unit = from_datasets(TensorDataset(x.sigmoid()), name="mine", fingerprint="1", levels=None)
    assert unit.protocol.values == "unit"


def boom(position: int) -> Tensor:
    if position == 13:
        raise OSError("image file is truncated")
    return X[position]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (boom, r"mine/train: datum 13 cannot be read: OSError\('image file is truncated'\)"),
        (
            lambda i: X[i] if i != 13 else X[i, :, :2],
            r"datum 13 must have shape \(1, 4, 4\), got \(1, 2, 4\)",
        ),
        (
            lambda i: X[i] if i != 13 else X[i] / 255,
            "datum 13 must hold whole numbers below 256, got torch.float32",
        ),
        (lambda i: (X[i], [1.0] * (2 if i == 13 else 3)), "y must have one shape for all data, got .*2,"),
        (lambda i: X[i].int() if i != 13 else X[i].int() + 256, r"datum 13 must lie in 0 \.\.\. 255"),
    ],
)
def test_a_bad_datum_is_named(make: Callable[[int], Tensor], message: str, workers: int) -> None:
    data = from_datasets(Made(make), name="mine", fingerprint="1", num_workers=workers)
    with pytest.raises(CorruptData, match=message) as caught:
        batches(data)
    assert "\n" not in str(caught.value)
    with pytest.raises(CorruptData, match=message):
        data.train[10:20]


@pytest.mark.parametrize("odd", [None, [1.0, 0.0]])
def test_labels_of_another_shape_are_refused_wherever_they_stand(odd: list[float] | None) -> None:
    made = Made(lambda i: (X[i % N], [1.0] if i < 200 else odd), 300)
    data = from_datasets(made, name="mine", fingerprint="1")
    assert data.train[:200].y is not None
    for read in (lambda: data.train.y, lambda: data.train[250:], lambda: data.train[:]):
        with pytest.raises(CorruptData, match="mine/train: y must have one shape for all data, got"):
            read()


def test_refusals() -> None:
    part = TensorDataset(X)
    with pytest.raises(DataError, match="mine/train must hold at least one datum, got none"):
        from_datasets(Made(boom, 0), name="mine", fingerprint="1")
    with pytest.raises(DataError, match="fingerprint must name"):
        from_datasets(part, name="mine", fingerprint="")
    with pytest.raises(DataError, match="num_workers must be at least 0, got -1"):
        from_datasets(part, name="mine", fingerprint="1", num_workers=-1)
    with pytest.raises(DataError, match="must have one x_shape"):
        from_datasets(part, test=TensorDataset(X[:, :, :2]), name="mine", fingerprint="1")
    with pytest.raises(CorruptData, match=r"datum 0 must lie in 0 \.\.\. 1, got"):
        from_datasets(TensorDataset(torch.full((3, 2), 2.0)), name="mine", fingerprint="1", levels=None)
    with pytest.raises(CorruptData, match=r"datum 0 must lie in .* got nan"):
        from_datasets(
            TensorDataset(torch.full((3, 2), torch.nan)), name="m", fingerprint="1", levels=None, scale="real"
        )


@pytest.mark.skipif(sys.platform == "win32", reason="has no groups of processes")
def test_signals_to_the_group_of_a_process_do_not_reach_those_that_read_for_it() -> None:
    # Such as Ctrl-C in a terminal: the step in hand still needs its data.
    def group(position: int) -> Tensor:
        return torch.tensor([os.getpgrp() == os.getpid(), os.getpgrp() == ours], dtype=torch.uint8)

    ours = os.getpgrp()
    data = from_datasets(Made(group), name="groups", fingerprint="1", num_workers=1, scale="count")
    read = torch.cat([batch.x for batch in data.train.batches(10, seed=0, epoch=0, drop_last=True)])
    assert read.tolist() == [[1.0, 0.0]] * 50
