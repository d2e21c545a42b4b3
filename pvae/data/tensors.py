"""Data sets from tensors of one's own."""

from collections.abc import Mapping, Sequence, Sized

import torch
from torch import Tensor

from .dataset import PARTS, Choice, Data, Source, assemble
from .errors import CorruptData, DataError

__all__ = ["check_dense", "checked_labels", "from_tensors"]

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = torch.finfo(torch.float32).max


def from_tensors(
    train: Tensor,
    valid: Tensor | None = None,
    test: Tensor | None = None,
    *,
    y: Tensor | Mapping[str, Tensor] | None = None,
    name: str = "custom",
    binarize: str | None = None,
    scale: str = "default",
    dequantize: bool = False,
    levels: int | None = None,
    class_names: Sequence[str] | None = None,
    attribute_names: Sequence[str] | None = None,
    seed: int = 0,
) -> Data:
    """Make a data set from tensors of your own.

    What the values are is read off the type, and off the values where that leaves it open: bool, and floats
    that are all 0 or 1, are binary; uint8 has 256 levels; other whole numbers are counts, or levels where
    ``levels`` says how many; floats in [0, 1] are grey values, or levels k / (levels - 1) where ``levels``
    says so; other floats are real.

    Args:
        train: Training data, shape ``(N, *x_shape)``; images are ``(N, C, H, W)``.
        valid: Validation data, or ``None``.
        test: Test data, or ``None``.
        y: Labels of the training data, or a mapping from part to labels: class numbers ``(N,)`` of a whole
            type, or attributes ``(N, L)``. Every part has them or none has.
        name: Name of the data set.
        binarize: As in :func:`~pvae.data.load`; ``None`` keeps the values.
        scale: ``"default"``, ``"unit"``, ``"count"``, or ``"real"`` (floats as they are, whatever their
            range).
        dequantize: As in :func:`~pvae.data.load`.
        levels: Number of levels, where the type does not say.
        class_names: Name of each class.
        attribute_names: Name of each column of ``y``.
        seed: Seed of what is drawn once.

    Returns:
        A data set whose parts share memory with the tensors where their type allows it.

    Raises:
        DataError: If shapes, types or ranges do not fit each other or what is asked for.
        TypeError: If an argument is no tensor.

    Example:
        >>> x = torch.rand(100, 1, 8, 8)
        >>> data = from_tensors(x[:80], valid=x[80:90], test=x[90:], binarize="dynamic")
    """
    given = {part: x for part, x in zip(PARTS, (train, valid, test), strict=True) if x is not None}
    for part, x in given.items():
        _check_x(part, x, train)
    given = {part: x.detach() for part, x in given.items()}
    labels = checked_labels(y, given, class_names, attribute_names)
    source = _source(given, levels=levels, scale=scale)
    source.parts = {part: (source.parts[part][0], labels.get(part)) for part in given}
    source.class_names = None if class_names is None else tuple(class_names)
    source.attribute_names = None if attribute_names is None else tuple(attribute_names)
    return assemble(name, source, Choice(binarize, scale, dequantize, seed))


def _check_x(part: str, x: Tensor, train: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{part} must be a tensor, got {type(x).__name__}")
    check_dense(part, x)
    if x.dtype not in (*_WHOLE, *_FLOATS, torch.bool):
        raise DataError(f"{part} must hold whole numbers, bools or floats, got {x.dtype}")
    if x.ndim < 2 or x.numel() == 0:
        raise DataError(f"{part} must have shape (N, *x_shape) without a zero, got {tuple(x.shape)}")
    if x.shape[1:] != train.shape[1:] or x.dtype != train.dtype:
        raise DataError(
            f"{part} must be like train, {train.dtype} of shape (N, {', '.join(map(str, train.shape[1:]))}), "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    if x.is_floating_point():
        finite = x.flatten(1).isfinite().all(1)
        if not finite.all():
            raise CorruptData(f"{part} must be finite, got nan or inf in datum {int(finite.int().argmin())}")
    if x.dtype == torch.float64:
        largest, datum = x.detach().flatten(1).abs().amax(1).max(0)
        if float(largest) > _LARGEST:
            raise DataError(
                f"{part} must lie within ±{_LARGEST:.3g}, the range of float32, in which data are kept, "
                f"got ±{float(largest):.3g} in datum {int(datum)}"
            )


def check_dense(name: str, x: Tensor) -> None:
    """Refuse a tensor whose entries are not all there, one behind the other.

    Raises:
        DataError: If it is sparse, nested, or of the device "meta".
    """
    if x.is_nested or x.layout != torch.strided or x.is_meta:
        kind = "a nested" if x.is_nested else "a meta" if x.is_meta else f"a {x.layout}"
        raise DataError(f"{name} must be a dense tensor that holds numbers, got {kind} tensor")


def _source(given: dict[str, Tensor], *, levels: int | None, scale: str) -> Source:
    """Decide what the values are, and store them compactly."""
    low = min(float(x.min()) for x in given.values())
    high = max(float(x.max()) for x in given.values())
    dtype = next(iter(given.values())).dtype
    parts: dict[str, Tensor]
    source = Source(kind="levels", levels=levels, binarize=None, split="as given")
    if levels is not None and levels < 2:
        raise DataError(f"levels must be at least 2, got {levels}")
    if dtype in _FLOATS:
        unit = low >= 0.0 and high <= 1.0
        if not unit and (scale == "unit" or levels is not None):
            raise DataError(
                f"float values must lie in [0, 1] for scale 'unit' or levels, got {low:g} ... {high:g}"
            )
        binary = unit and levels is None and all(bool(((x == 0) | (x == 1)).all()) for x in given.values())
        if scale == "real" and levels is None:
            source.kind, parts = "real", {part: x.to(torch.float32) for part, x in given.items()}
        elif scale == "count":
            source.kind, parts = "count", {part: _whole(part, x, low) for part, x in given.items()}
        elif binary or levels is not None:
            source.levels = 2 if binary else levels
            parts = {part: _on_grid(part, x, source.levels or 2) for part, x in given.items()}
        else:
            source.kind = "unit" if unit else "real"
            parts = {part: x.to(torch.float32) for part, x in given.items()}
    else:
        if dtype == torch.bool:
            source.levels = 2
        elif dtype == torch.uint8 and levels is None:
            source.levels = 256
        elif levels is None:
            source.kind = "count"
        if low < 0 or (source.levels is not None and high >= source.levels):
            top = "any" if source.levels is None else str(source.levels - 1)
            raise DataError(f"whole numbers must lie in 0 ... {top}, got {low:g} ... {high:g}")
        parts = dict(given)
    if source.kind in ("levels", "count") and high > 2**24:
        raise DataError(f"whole numbers must be at most {2**24}, to be exact in float32, got {high:g}")
    small = source.kind == "levels" and (source.levels or 0) <= 256
    if source.kind in ("levels", "count"):
        parts = {part: x.to(torch.uint8 if small else torch.int32) for part, x in parts.items()}
    source.parts = {part: (x.detach().cpu().contiguous(), None) for part, x in parts.items()}
    return source


def _whole(part: str, x: Tensor, low: float) -> Tensor:
    if low < 0 or not bool((x == x.round()).all()):
        raise DataError(f"{part} must hold whole numbers of at least 0 for scale='count'")
    return x


def _on_grid(part: str, x: Tensor, levels: int) -> Tensor:
    scaled = x.to(torch.float64) * (levels - 1)
    whole = scaled.round()
    if float((scaled - whole).abs().max()) > 1e-3:
        raise DataError(f"{part} must hold values k / {levels - 1} for levels={levels}, got others")
    return whole


def checked_labels(
    y: Tensor | Mapping[str, Tensor] | None,
    given: Mapping[str, Sized],
    class_names: Sequence[str] | None,
    attribute_names: Sequence[str] | None,
) -> dict[str, Tensor]:
    """Return labels of each part, int64 ``(N,)`` or float32 ``(N, L)``, that fit the data and the names.

    Raises:
        DataError: If they do not.
        TypeError: If labels are no tensor.
    """
    labels = _labels(y, given)
    if class_names is not None:
        _check_class_names(class_names, labels)
    if attribute_names is not None:
        _check_attribute_names(attribute_names, labels)
    return labels


def _labels(y: Tensor | Mapping[str, Tensor] | None, given: Mapping[str, Sized]) -> dict[str, Tensor]:
    """Labels of each part, int64 ``(N,)`` or float32 ``(N, L)``."""
    if y is None:
        return {}
    labels = {"train": y} if isinstance(y, Tensor) else dict(y)
    if set(labels) != set(given):
        raise DataError(
            f"y must have labels of each part ({', '.join(given)}), "
            f"got labels of {', '.join(labels) or 'none'}"
        )
    converted = {}
    for part, x in given.items():
        label = labels[part]
        if not isinstance(label, Tensor):
            raise TypeError(f"y of {part} must be a tensor, got {type(label).__name__}")
        check_dense(f"y of {part}", label)
        if label.ndim not in (1, 2) or len(label) != len(x):
            raise DataError(
                f"y of {part} must have shape ({len(x)},) or ({len(x)}, L), got {tuple(label.shape)}"
            )
        if label.ndim == 1:
            if label.dtype not in _WHOLE or bool((label < 0).any()):
                raise DataError(
                    f"y of {part} must hold class numbers 0, 1, ... of a whole type, got {label.dtype}"
                )
            converted[part] = label.detach().cpu().to(torch.int64).contiguous()
        else:
            converted[part] = label.detach().cpu().to(torch.float32).contiguous()
            if not bool(converted[part].isfinite().all()):
                raise CorruptData(f"y of {part} must be finite, got nan or inf")
    if len({label.shape[1:] for label in converted.values()}) > 1:
        raise DataError(
            f"y must have one shape in all parts, got {[tuple(v.shape) for v in converted.values()]}"
        )
    return converted


def _check_class_names(class_names: Sequence[str], labels: dict[str, Tensor]) -> None:
    classes = max((int(y.max()) + 1 for y in labels.values() if y.ndim == 1), default=0)
    if classes == 0 or classes > len(class_names):
        raise DataError(f"class_names must name the {classes} classes of y, got {len(class_names)} names")


def _check_attribute_names(attribute_names: Sequence[str], labels: dict[str, Tensor]) -> None:
    columns = max((y.shape[1] for y in labels.values() if y.ndim == 2), default=0)
    if columns != len(attribute_names):
        raise DataError(
            f"attribute_names must name the {columns} columns of y, got {len(attribute_names)} names"
        )
