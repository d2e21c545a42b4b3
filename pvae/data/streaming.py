"""Data that do not fit: a map-style dataset read by worker processes, in the order of the in-memory split."""

import copy
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ._encoding import Encoding
from ._seeds import derive_seed
from .dataset import PARTS, Choice, Data, Source, Streams, count_classes, encode
from .errors import CorruptData, DataError
from .protocol import Protocol
from .split import Batch, Split
from .tensors import checked_labels

__all__ = ["StreamingSplit", "from_datasets", "stream"]

_Kind = Literal["levels", "unit", "real"]
_Item = tuple[int, int | None]

# Data to read into memory come in pieces of this many, and from worker processes where they are more than so
# many, as starting those takes a second.
_PIECE = 128
_MANY = 2_048


class StreamingSplit(Split):
    """One part of a data set that is read as it is needed.

    It has the surface of :class:`Split`, gives the same batches in the same order, and draws the same
    noise. A selection, ``split[:1000]``, is read at once and is a :class:`Split` in memory; so is, for the
    whole part, ``x``, which is not kept.

    Args:
        fetch: Reads data by position; :func:`from_datasets` makes it.
        protocol: Protocol of this part.
        encoding: How what it gives becomes ``x``.
        y: Labels of all data where they are known beforehand, on the CPU, in place of those that are read.
        num_workers: Number of worker processes; 0 reads in this one.
        prefetch: Number of batches each worker reads ahead.
        class_names: Name of each class.
        attribute_names: Name of each column of ``y``.
    """

    fits_device: ClassVar[bool] = False

    def __init__(
        self,
        fetch: "_Fetch",
        *,
        protocol: Protocol,
        encoding: Encoding,
        y: Tensor | None = None,
        num_workers: int = 2,
        prefetch: int = 4,
        class_names: tuple[str, ...] | None = None,
        attribute_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(
            torch.empty(0, *fetch.x_shape),
            protocol=protocol,
            encoding=encoding,
            y=y,
            class_names=class_names,
            attribute_names=attribute_names,
        )
        self._fetch = fetch
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._device = torch.device("cpu")

    @property
    def device(self) -> torch.device:
        """Where batches arrive."""
        return self._device

    @property
    def x(self) -> Tensor:
        """All data as evaluated: reads the whole part into memory, each time."""
        return self[:].x

    @property
    def clean(self) -> Tensor:
        """All data without the noise of their protocol: reads the whole part into memory, each time."""
        return self[:].clean

    @property
    def y(self) -> Tensor | None:
        """All labels: known beforehand, or else read with the whole part, each time."""
        y = self._y
        if y is None and self._fetch.labelled:
            y = torch.cat([read.y for _, read in self._pieces(torch.arange(len(self))) if read.y is not None])
        return None if y is None else y.to(self._device)

    def __len__(self) -> int:
        return len(self._fetch)

    def to(self, device: torch.device | str) -> "StreamingSplit":
        """Return this split with ``device`` for its batches."""
        moved = copy.copy(self)
        moved._device = torch.device(device)
        return moved

    def sample(self, index: Tensor) -> Batch:
        """Read the batch at ``index`` in this process; as :meth:`Split.sample`."""
        return self._encode(self._fetch.gather([(i, None) for i in index.tolist()]), index)

    def _iterate(
        self, order: Tensor, bounds: list[tuple[int, int]], *, seed: int, epoch: int
    ) -> Iterator[Batch]:
        # A seed for each datum, made from what it is for: random cropping and the like in the dataset does
        # not depend on which worker does it, nor on where the epoch was entered.
        chunks = [
            [(i, derive_seed("item", seed, epoch, i)) for i in order[first:last].tolist()]
            for first, last in bounds
        ]
        if not chunks:
            return
        seed, pinned = derive_seed("loader", seed, epoch), self._device.type == "cuda"
        loader = self._loader(chunks, self._num_workers, seed=seed, pinned=pinned)
        for read, (first, last) in zip(loader, bounds, strict=True):
            yield self._encode(read, order[first:last])

    def __getitem__(self, key: slice | Tensor) -> Split:
        """Read some of the data into memory."""
        where = self._where(key)
        x: Tensor | None = None
        labels = []
        # Written where they stay: gathered and then stacked they would take twice the memory.
        for rows, read in self._pieces(where):
            x = torch.empty(len(where), *self.x_shape, dtype=read.x.dtype) if x is None else x
            x[rows] = read.x
            labels += [] if read.y is None else [read.y]
        assert x is not None
        y = self._y[where] if self._y is not None else torch.cat(labels) if labels else None
        return Split(
            x.to(self._device),
            protocol=self._sub_protocol(where),
            encoding=self._encoding,
            y=None if y is None else y.to(self._device),
            positions=where,
            class_names=self.class_names,
            attribute_names=self.attribute_names,
        )

    def _pieces(self, where: Tensor) -> Iterator[tuple[slice, "Read"]]:
        """Read data as evaluated piece by piece; yield also which rows of ``where`` they are."""
        chunks: list[list[_Item]] = [[(i, None) for i in piece.tolist()] for piece in where.split(_PIECE)]
        workers = self._num_workers if len(where) > _MANY else 0
        start = 0
        for read in self._loader(chunks, workers, seed=0, pinned=False):
            if isinstance(read, DataError):
                raise read
            yield slice(start, start + len(read.x)), read
            start += len(read.x)

    def _loader(
        self, chunks: Sequence[Sequence[_Item]], workers: int, *, seed: int, pinned: bool
    ) -> "DataLoader[Any]":
        return DataLoader(
            self._fetch,
            batch_sampler=chunks,  # type: ignore[arg-type]  # its stub allows for no seeds beside positions
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=self._prefetch if workers else None,
            pin_memory=pinned,
            worker_init_fn=_apart,
            # Without a generator of its own it would draw a number from the global one.
            generator=torch.Generator().manual_seed(seed),
        )

    def _encode(self, read: "Read | DataError", index: Tensor) -> Batch:
        if isinstance(read, DataError):
            raise read
        if self._encoding.redraws:
            x = self._encoding.draw(read.x.to(self._device, non_blocking=True))
        else:
            fixed = read.x if self._encoding.keeps else self._encoding.fix(read.x, index.cpu())
            x = self._encoding.finish(fixed.to(self._device, non_blocking=True))
        y = read.y if self._y is None else self._y[index.cpu()]
        return Batch(
            x,
            None if y is None else y.to(self._device, non_blocking=True),
            index.to(self._device, non_blocking=True),
        )


def from_datasets(
    train: TorchDataset[Any],
    valid: TorchDataset[Any] | None = None,
    test: TorchDataset[Any] | None = None,
    *,
    name: str,
    fingerprint: str,
    y: Tensor | Mapping[str, Tensor] | None = None,
    binarize: str | None = None,
    scale: str = "default",
    dequantize: bool = False,
    levels: int | None = 256,
    num_workers: int = 2,
    class_names: Sequence[str] | None = None,
    attribute_names: Sequence[str] | None = None,
    seed: int = 0,
) -> Data:
    """Make a data set from map-style datasets of torch that are read by worker processes.

    Each gives for a position ``x`` or ``(x, y)``: ``x`` a tensor or array of shape ``x_shape``, or an image
    of Pillow (H x W, or H x W x C, which becomes C x H x W); ``y`` a class number, or attributes ``(L,)``.
    Random augmentation by torch's generator is a pure function of the seed of the run, the epoch and the
    position.

    Args:
        train: Training data.
        valid: Validation data, or ``None``.
        test: Test data, or ``None``.
        name: Name of the data set.
        fingerprint: Text that changes when the data do (a version, the sum of an archive); it stands in the
            hash of the protocol for the data, which are not read through.
        y: Labels that are known beforehand, as in :func:`~pvae.data.from_tensors`; the datasets then need
            not give them, and ``split.y`` reads nothing.
        binarize: As in :func:`~pvae.data.load`; ``None`` keeps the values.
        scale: ``"default"``, ``"unit"``, ``"count"``; ``"real"`` for floats of any range.
        dequantize: As in :func:`~pvae.data.load`.
        levels: Number of levels of whole-number ``x``; ``None`` where ``x`` is made of floats.
        num_workers: Number of worker processes of each part; 0 reads in this one.
        class_names: Name of each class.
        attribute_names: Name of each column of ``y``.
        seed: Seed of what is drawn once.

    Returns:
        A data set of :class:`StreamingSplit` parts.

    Raises:
        DataError: If a dataset is empty, its first datum is not as described, or labels do not fit.
        TypeError: If labels are no tensor.
    """
    given = {part: data for part, data in zip(PARTS, (train, valid, test), strict=True) if data is not None}
    if not fingerprint:
        raise DataError("fingerprint must name the version of the data, got an empty text")
    sized: dict[str, Any] = dict(given)  # map-style datasets have a length, which their type does not say
    labels = {} if y is None else checked_labels(y, sized, class_names, attribute_names)
    source = Source(
        kind="levels" if levels is not None else "real" if scale == "real" else "unit",
        levels=levels,
        binarize=None,
        split="as given",
        class_names=None if class_names is None else tuple(class_names),
        attribute_names=None if attribute_names is None else tuple(attribute_names),
        streams=Streams(given, fingerprint=fingerprint, num_workers=num_workers, y=labels),
    )
    return stream(name, source, Choice(binarize, scale, dequantize, seed))


def stream(name: str, source: Source, choice: Choice) -> Data:
    """Encode what a loader will read; the counterpart of :func:`~pvae.data.dataset.assemble`.

    Raises:
        DataError: If a dataset is empty, its first datum is not as described, or the values do not allow what
            is chosen.
    """
    streams = source.streams
    assert streams is not None
    assert source.kind != "count"
    if streams.num_workers < 0:
        raise DataError(f"num_workers must be at least 0, got {streams.num_workers}")
    fetches = {
        part: _Fetch(data, f"{name}/{part}", source.kind, source.levels)
        for part, data in streams.datasets.items()
    }
    shapes = {part: fetch.x_shape for part, fetch in fetches.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"all parts of {name} must have one x_shape, got {shapes}")
    protocol, encodings = encode(
        name,
        source,
        choice,
        sizes=tuple((part, len(fetch)) for part, fetch in fetches.items()),
        x_shape=next(iter(shapes.values())),
        sha256=hashlib.sha256(streams.fingerprint.encode()).hexdigest(),
    )
    splits: dict[str, Split] = {}
    for part, fetch in fetches.items():
        split = StreamingSplit(
            fetch,
            protocol=replace(protocol, part=part),
            encoding=encodings[part],
            y=streams.y.get(part),
            num_workers=streams.num_workers,
            class_names=source.class_names,
            attribute_names=source.attribute_names,
        )
        splits[part] = split[:] if streams.in_memory else split
    classes = count_classes(source.class_names, streams.y.values())
    return Data(splits, protocol=protocol, num_classes=classes)


class Read(NamedTuple):
    """Data as read: levels or floats ``x``, and ``y``, of one datum or stacked."""

    x: Tensor
    y: Tensor | None


class _Fetch(TorchDataset[Any]):
    """Reads, converts and checks data; what runs in a worker process.

    Args:
        dataset: The user's dataset.
        where: Name for messages.
        kind: What ``x`` holds: whole ``"levels"``, floats in [0, 1] (``"unit"``), or ``"real"`` floats.
        levels: Number of levels.
    """

    def __init__(self, dataset: TorchDataset[Any], where: str, kind: _Kind, levels: int | None) -> None:
        self._dataset = dataset
        self._where = where
        self._kind = kind
        self._levels = levels
        if len(self) == 0:
            raise DataError(f"{where} must hold at least one datum, got none")
        self.x_shape: tuple[int, ...] = ()  # not known yet
        first = self.gather([(0, None)])
        if isinstance(first, DataError):
            raise first
        self.x_shape = tuple(first.x.shape[1:])
        self._y_shape = None if first.y is None else tuple(first.y.shape[1:])

    @property
    def labelled(self) -> bool:
        """Whether the dataset gives labels."""
        return self._y_shape is not None

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # a map-style dataset has a length

    def __getitems__(self, items: Sequence[_Item]) -> Read | DataError:
        return self.gather(items)

    def gather(self, items: Sequence[_Item]) -> Read | DataError:
        """Read and stack data.

        Args:
            items: Position and seed of each datum; without a seed, the one of the position.

        Returns:
            The data, or what was wrong with them: an exception raised in a worker would arrive wrapped in its
            traceback.
        """
        reads = []
        with torch.random.fork_rng(devices=[]):
            for position, seed in items:
                # Not torch.manual_seed, which would seed the accelerators as well.
                torch.default_generator.manual_seed(derive_seed("item", position) if seed is None else seed)
                try:
                    reads.append(self._read(position))
                except DataError as error:
                    return error
                # Whatever a user's dataset raises says that this datum cannot be had.
                except Exception as error:
                    return CorruptData(f"{self._where}: datum {position} cannot be read: {error!r}")
        labels = [read.y for read in reads if read.y is not None]
        shapes = {None if read.y is None else tuple(read.y.shape) for read in reads}
        if self.x_shape:
            shapes.add(self._y_shape)
        if len(shapes) > 1:
            return CorruptData(f"{self._where}: y must have one shape for all data, got {shapes}")
        return Read(torch.stack([read.x for read in reads]), torch.stack(labels) if labels else None)

    def _read(self, position: int) -> Read:
        datum = self._dataset[position]
        x, y = (*datum, None)[:2] if isinstance(datum, tuple | list) else (datum, None)
        what = f"{self._where}: x of datum {position}"
        if hasattr(x, "getbands") and self.x_shape not in ((), _image_shape(x)):
            # Said before it is decoded, as that may take any amount of memory.
            shape = _image_shape(x)
            x.close()
            raise CorruptData(f"{what} must have shape {self.x_shape}, got {shape}")
        x = _tensor(x)
        if x.ndim == 0 or x.shape != (self.x_shape or x.shape):
            raise CorruptData(f"{what} must have shape {self.x_shape or 'x_shape'}, got {tuple(x.shape)}")
        whole = not x.is_floating_point()
        if whole != (self._kind == "levels"):
            asked = (
                f"whole numbers below {self._levels}" if self._kind == "levels" else "floats (levels=None)"
            )
            raise CorruptData(f"{what} must hold {asked}, got {x.dtype}")
        low, high = float(x.min()), float(x.max())
        bound = {"levels": (self._levels or 1) - 1.0, "unit": 1.0, "real": math.inf}[self._kind]
        if not (-math.inf if self._kind == "real" else 0.0) <= low <= high <= bound or not math.isfinite(
            low + high
        ):
            raise CorruptData(f"{what} must lie in 0 ... {bound:g}, got {low:g} ... {high:g}")
        small = (self._levels or 0) <= 256
        x = x.to((torch.uint8 if small else torch.int32) if whole else torch.float32)
        if y is None:
            return Read(x, None)
        y = torch.as_tensor(y)
        return Read(x, y.to(torch.int64 if y.ndim == 0 else torch.float32))


def _image_shape(image: Any) -> tuple[int, ...]:
    """Shape that an image of Pillow will have, which may not be decoded yet."""
    return (len(image.getbands()), image.height, image.width)


def _tensor(x: Any) -> Tensor:
    """A tensor of what a dataset gave; images of Pillow get their channels in front."""
    if isinstance(x, Tensor):
        return x
    array = np.array(x)
    if hasattr(x, "getbands"):
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(array))


def _as_is(read: Any) -> Any:
    return read


def _apart(worker: int) -> None:
    """Leave the group of processes that Ctrl-C in a terminal, or ``torchrun``, sends its signals to: data are
    read until the process that reads them has come to the end of its step, and ends its workers itself.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
