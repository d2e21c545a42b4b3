"""A data set: its parts, its protocol, its names, and for synthetic data the exact log-density."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ._encoding import Encoding
from .errors import DataError, MissingPart
from .protocol import Binarize, Protocol, Scale, Values
from .split import Split

__all__ = ["PARTS", "Choice", "Data", "Source", "Streams", "assemble", "count_classes", "encode"]

PARTS = ("train", "valid", "test")


class Data:
    """The parts of a data set, with what describes them.

    Made by :func:`load`, :func:`from_tensors` and :func:`from_datasets`.

    Attributes:
        name: Name of the data set.
        x_shape: Shape of one datum.
        parts: Which of ``"train"``, ``"valid"``, ``"test"`` there are.
        protocol: Protocol of the whole; each split carries its own.
        num_classes: Number of classes, ``None`` where ``y`` is absent or holds attributes.
        class_names: Name of each class, or ``None``.
        attribute_names: Name of each column of ``y``, or ``None``.
        log_density: For synthetic data the exact log p(x) in nats, ``(*batch, *x_shape) -> (*batch,)``,
            else ``None``.
        log_density_intrinsic: For synthetic data on a plane with thin noise across it the exact log-density
            of the datum's own coordinates in the plane, in nats per volume of the plane, of the same shapes,
            else ``None``. A density of codes or of a projection can know this one, not the density of the
            noise. ``truth.project`` gives the coordinates.
        truth: For synthetic data the object it was drawn from, with its parameters, else ``None``.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        *,
        protocol: Protocol,
        num_classes: int | None = None,
        log_density: Callable[[Tensor], Tensor] | None = None,
        log_density_intrinsic: Callable[[Tensor], Tensor] | None = None,
        truth: Any = None,
    ) -> None:
        if not splits or not set(splits) <= set(PARTS):
            raise DataError(
                f"splits must be named among {', '.join(PARTS)}, got {', '.join(splits) or 'none'}"
            )
        self._splits = {part: splits[part] for part in PARTS if part in splits}
        self.name = protocol.name
        self.protocol = protocol
        self.x_shape = protocol.x_shape
        self.parts = tuple(self._splits)
        self.num_classes = num_classes
        first = next(iter(self._splits.values()))
        self.class_names = first.class_names
        self.attribute_names = first.attribute_names
        self.log_density = log_density
        self.log_density_intrinsic = log_density_intrinsic
        self.truth = truth

    @property
    def train(self) -> Split:
        """The part to fit."""
        return self._part("train")

    @property
    def valid(self) -> Split:
        """The part to choose by: early stopping, settings."""
        return self._part("valid")

    @property
    def test(self) -> Split:
        """The part to report on, once."""
        return self._part("test")

    def to(self, device: torch.device | str) -> "Data":
        """Return the data set with every part on ``device``."""
        return Data(
            {part: split.to(device) for part, split in self._splits.items()},
            protocol=self.protocol,
            num_classes=self.num_classes,
            log_density=self.log_density,
            log_density_intrinsic=self.log_density_intrinsic,
            truth=self.truth,
        )

    def __repr__(self) -> str:
        return f"Data({self.protocol})"

    def _part(self, part: str) -> Split:
        if part not in self._splits:
            raise MissingPart(f"{self.name} has no {part} part, only {', '.join(self.parts)}")
        return self._splits[part]


@dataclass
class Streams:
    """Parts that are read as they are needed.

    Args:
        datasets: Of each part a map-style dataset, as :func:`~pvae.data.from_datasets` takes them.
        fingerprint: Text that stands in the hash of the protocol for the data, which are not read through.
        num_workers: Number of worker processes of each part; 0 reads in this one.
        y: Labels of each part where they are known beforehand; the datasets then need not give them.
        in_memory: Whether all parts are read at once and kept.
    """

    datasets: dict[str, TorchDataset[Any]]
    fingerprint: str
    num_workers: int
    y: dict[str, Tensor] = field(default_factory=dict)
    in_memory: bool = False


@dataclass
class Source:
    """What a loader found, before it is encoded.

    Args:
        kind: ``"levels"``: whole numbers below ``levels``; ``"unit"``: floats in [0, 1]; ``"count"``: whole
            numbers without a bound; ``"real"``: floats.
        levels: Number of levels where ``kind`` is ``"levels"``.
        binarize: Binarisation when none is asked for.
        split: How the parts were made, in words.
        parts: Of each part ``x`` ``(N, *x_shape)`` and ``y`` or ``None``, on the CPU.
        seeded: Whether the data or their split were drawn by the seed.
        note: What a reader must know before comparing.
        class_names: Name of each class.
        attribute_names: Name of each column of ``y``.
        log_density: Exact log-density in nats, where known.
        log_density_intrinsic: Exact log-density of the coordinates in the plane of the data, where they have
            one; then ``truth`` has ``project``.
        truth: What synthetic data were drawn from.
        streams: What is read later, in place of ``parts``.
    """

    kind: Literal["levels", "unit", "count", "real"]
    levels: int | None
    binarize: Binarize | None
    split: str
    parts: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    seeded: bool = False
    note: str = ""
    class_names: tuple[str, ...] | None = None
    attribute_names: tuple[str, ...] | None = None
    log_density: Callable[[Tensor], Tensor] | None = None
    log_density_intrinsic: Callable[[Tensor], Tensor] | None = None
    truth: Any = None
    streams: Streams | None = None


@dataclass(frozen=True)
class Choice:
    """How the stored values shall be encoded; the arguments of :func:`~pvae.data.load` of these names."""

    binarize: str | None = "default"
    scale: str | None = "default"
    dequantize: bool = False
    seed: int = 0


def assemble(name: str, source: Source, choice: Choice) -> Data:
    """Encode what a loader found.

    Raises:
        DataError: If the values do not allow what is chosen.
    """
    parts = {part: source.parts[part] for part in PARTS if part in source.parts}
    protocol, encodings = encode(
        name,
        source,
        choice,
        sizes=tuple((part, len(x)) for part, (x, _) in parts.items()),
        x_shape=tuple(next(iter(parts.values()))[0].shape[1:]),
        sha256=_digest(parts),
    )
    splits = {
        part: Split(
            x,
            y=y,
            protocol=replace(protocol, part=part),
            encoding=encodings[part],
            class_names=source.class_names,
            attribute_names=source.attribute_names,
        )
        for part, (x, y) in parts.items()
    }
    return Data(
        splits,
        protocol=protocol,
        num_classes=count_classes(source.class_names, [y for _, y in parts.values()]),
        log_density=source.log_density,
        log_density_intrinsic=source.log_density_intrinsic,
        truth=source.truth,
    )


def encode(
    name: str,
    source: Source,
    choice: Choice,
    *,
    sizes: tuple[tuple[str, int], ...],
    x_shape: tuple[int, ...],
    sha256: str,
) -> tuple[Protocol, dict[str, Encoding]]:
    """Return the protocol of the whole and the encoding of each part.

    Raises:
        DataError: If the values do not allow what is chosen.
    """
    bits = source.levels == 2
    scales: tuple[Scale, ...] = ("unit", "count") if source.kind == "levels" and not bits else ("unit",)
    if source.kind in ("count", "real"):
        scales = (source.kind,)
    scale = scales[0] if choice.scale in ("default", None) else choice.scale
    if scale not in scales:
        known = " or ".join(repr(known) for known in scales)
        raise DataError(f"scale must be {known} for the values of {name}, got {scale!r}")

    binarize = choice.binarize if choice.binarize != "none" else None
    if binarize == "default":
        plain = scale == "unit" and not choice.dequantize
        binarize = source.binarize if plain else None
    if binarize not in (*get_args(Binarize), None):
        raise DataError(
            f"binarize must be 'default', 'dynamic', 'static', 'threshold' or None, got {binarize!r}"
        )
    if bits and binarize != source.binarize:
        raise DataError(
            f"binarize must be {source.binarize!r} for {name}, whose values are binary already, "
            f"got {binarize!r}"
        )
    if binarize is not None and source.kind in ("count", "real"):
        raise DataError(
            f"binarize must be None for {name}, whose values are not grey levels, got {binarize!r}"
        )
    if binarize is not None and scale == "count":
        raise DataError(f"binarize must be None with scale='count', got {binarize!r}")
    if choice.dequantize and (bits or binarize is not None or source.kind in ("unit", "real")):
        what = "binary values" if bits or binarize is not None else "values that are not whole levels"
        raise DataError(f"dequantize must be False for {what} (of {name}), got True")

    values: Values
    levels: int | None
    if bits or binarize is not None:
        values, levels = "binary", 2
    elif choice.dequantize:
        values, levels = ("unit" if scale == "unit" else "real"), None
    else:
        values, levels = scale, source.levels
    drawn = source.seeded or choice.dequantize or (binarize in ("dynamic", "static") and not bits)
    protocol = Protocol(
        name=name,
        split=source.split,
        sizes=sizes,
        x_shape=x_shape,
        binarize=cast(Binarize | None, binarize),
        scale=scale,
        dequantize=choice.dequantize,
        values=values,
        levels=levels,
        seed=choice.seed if drawn else None,
        sha256=sha256,
        note=source.note,
    )
    encodings = {
        part: Encoding(
            part=part,
            # Bits stay as they are, whatever name their binarisation goes by.
            binarize=None if bits else protocol.binarize,
            scale=protocol.scale,
            dequantize=choice.dequantize,
            levels=source.levels,
            seed=choice.seed,
        )
        for part, _ in sizes
    }
    return protocol, encodings


def count_classes(class_names: tuple[str, ...] | None, labels: Iterable[Tensor | None]) -> int | None:
    """Return the number of classes, ``None`` where no label is a class number."""
    if class_names is not None:
        return len(class_names)
    classes = [y for y in labels if y is not None and y.ndim == 1]
    return max(int(y.max()) for y in classes) + 1 if classes else None


def _digest(parts: Mapping[str, tuple[Tensor, Tensor | None]]) -> str:
    """SHA-256 of names, types, shapes and bytes of all parts."""
    digest = hashlib.sha256()
    for part, (x, y) in parts.items():
        for tensor in (x,) if y is None else (x, y):
            array = tensor.contiguous().numpy()
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{part} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
