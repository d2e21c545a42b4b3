"""Data that do not fit: a map-style dataset read by worker processes, in the order of the in-memory split."""

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ._encoding import Encoding
from ._seeds import derive_seed
from .dataset import PARTS, Choice, Data, Source, encode
from .errors import CorruptData, DataError
from .protocol import Protocol
from .split import Batch, Split

__all__ = ["StreamingSplit", "from_datasets"]

_Kind = Literal["levels", "unit", "real"]


class StreamingSplit(Split):
    """One part of a data set that is read as it is needed.

    It has the surface of :class:`Split`, gives the same batches in the same order, and draws the same
    noise. A selection, ``split[:1000]``, is read at once and is a :class:`Split` in memory; so are, for the
    whole part, ``x`` and ``y``, which are not kept.

    Args:
        fetch: Reads data by position; :func:`from_datasets` makes it.
        protocol: Protocol of this part.
        encoding: How what it gives becomes ``x``.
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
        num_workers: int = 2,
        prefetch: int = 4,
        class_names: tuple[str, ...] | None = None,
        attribute_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(
            torch.empty(0, *fetch.x_shape),
            protocol=protocol,
            encoding=encoding,
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
    def y(self) -> Tensor | None:
        """All labels: reads the whole part, each time."""
        return self[:].y

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
        loader: DataLoader[Any] = DataLoader(
            self._fetch,
            batch_sampler=chunks,
            collate_fn=_as_is,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if self._num_workers else None,
            pin_memory=self._device.type == "cuda",
            # Without a generator of its own it would draw a number from the global one.
            generator=torch.Generator().manual_seed(derive_seed("loader", seed, epoch)),
        )
        for read, (first, last) in zip(loader, bounds, strict=True):
            yield self._encode(read, order[first:last])

    def __getitem__(self, key: slice | Tensor) -> Split:
        """Read some of the data into memory."""
        where = self._where(key)
        read = self._fetch.gather([(i, None) for i in where.tolist()])
        if isinstance(read, DataError):
            raise read
        return Split(
            read.x.to(self._device),
            protocol=self._sub_protocol(where),
            encoding=self._encoding,
            y=None if read.y is None else read.y.to(self._device),
            positions=where,
            class_names=self.class_names,
            attribute_names=self.attribute_names,
        )

    def _encode(self, read: "Read | DataError", index: Tensor) -> Batch:
        if isinstance(read, DataError):
            raise read
        if self._encoding.redraws:
            x = self._encoding.draw(read.x.to(self._device, non_blocking=True))
        else:
            fixed = read.x if self._encoding.keeps else self._encoding.fix(read.x, index.cpu())
            x = self._encoding.finish(fixed.to(self._device, non_blocking=True))
        y = None if read.y is None else read.y.to(self._device, non_blocking=True)
        return Batch(x, y, index.to(self._device, non_blocking=True))


def from_datasets(
    train: TorchDataset[Any],
    valid: TorchDataset[Any] | None = None,
    test: TorchDataset[Any] | None = None,
    *,
    name: str,
    fingerprint: str,
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
        DataError: If a dataset is empty, or its first datum is not as described.
    """
    given = {part: data for part, data in zip(PARTS, (train, valid, test), strict=True) if data is not None}
    if not fingerprint:
        raise DataError("fingerprint must name the version of the data, got an empty text")
    if num_workers < 0:
        raise DataError(f"num_workers must be at least 0, got {num_workers}")
    kind: _Kind = "levels" if levels is not None else "real" if scale == "real" else "unit"
    fetches = {part: _Fetch(data, f"{name}/{part}", kind, levels) for part, data in given.items()}
    shapes = {part: fetch.x_shape for part, fetch in fetches.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"all parts of {name} must have one x_shape, got {shapes}")
    source = Source(
        kind=kind,
        levels=levels,
        binarize=None,
        split="as given",
        class_names=None if class_names is None else tuple(class_names),
        attribute_names=None if attribute_names is None else tuple(attribute_names),
    )
    protocol, encodings = encode(
        name,
        source,
        Choice(binarize, scale, dequantize, seed),
        sizes=tuple((part, len(fetch)) for part, fetch in fetches.items()),
        x_shape=shapes["train"],
        sha256=hashlib.sha256(fingerprint.encode()).hexdigest(),
    )
    splits = {
        part: StreamingSplit(
            fetch,
            protocol=replace(protocol, part=part),
            encoding=encodings[part],
            num_workers=num_workers,
            class_names=source.class_names,
            attribute_names=source.attribute_names,
        )
        for part, fetch in fetches.items()
    }
    return Data(splits, protocol=protocol, num_classes=None if class_names is None else len(class_names))


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

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # a map-style dataset has a length

    def __getitems__(self, items: list[tuple[int, int | None]]) -> Read | DataError:
        return self.gather(items)

    def gather(self, items: list[tuple[int, int | None]]) -> Read | DataError:
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
        if len(shapes) > 1:
            return CorruptData(f"{self._where}: y must have one shape for all data, got {shapes}")
        return Read(torch.stack([read.x for read in reads]), torch.stack(labels) if labels else None)

    def _read(self, position: int) -> Read:
        datum = self._dataset[position]
        x, y = (*datum, None)[:2] if isinstance(datum, tuple | list) else (datum, None)
        x = _tensor(x)
        what = f"{self._where}: x of datum {position}"
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
