"""What is looked at once before training: every datum and label against the model, precision of programs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pvae.data import Split

__all__ = ["check_split", "in_precision_of", "one_precision"]

_PIECE = 1000


def check_split(model: Any, split: Split) -> None:
    """Refuse data that lie in memory and the model cannot score: a step would not notice all of them.

    Labels are looked at all at once. Of data that are binarised or dequantised, every draw has the values of
    the first batch, and data that are read as they are needed are checked when they are.

    Args:
        model: The model program.
        split: The data, on any device. Draws from torch's generator may be taken.

    Raises:
        ValueError: If a datum lies outside the likelihood's support, or a label is unknown.
    """
    if not split.fits_device:
        return
    check_labels = getattr(model, "check_labels", None)
    if check_labels is not None and getattr(model, "conditional", False) and split.y is not None:
        check_labels(split.y)
    check = getattr(getattr(model, "likelihood", None), "check", None)
    drawn = split.protocol.binarize == "dynamic" or split.protocol.dequantize
    if check is None or (drawn and split.name == "train"):
        return
    for batch in split.batches(_PIECE, seed=0, epoch=0, drop_last=False, shuffle=False):
        try:
            check(batch.x)
        except ValueError as error:
            where = f"datum {_first(check, batch.x, batch.index)} of the {split.name} split"
            raise ValueError(f"{error} ({where})") from None


def _first(check: Any, x: Tensor, index: Tensor) -> int:
    for row, position in zip(x.split(1), index.tolist(), strict=True):
        try:
            check(row)
        except ValueError:
            return int(position)
    raise AssertionError("a piece was refused, and no datum of it")


@contextmanager
def one_precision(x: Tensor, *programs: nn.Module) -> Iterator[None]:
    """Say of an error in the block that programs and data are of different precision, where they are.

    Raises:
        ValueError: In its place.
    """
    try:
        yield
    except RuntimeError as error:
        found = {p.dtype for m in programs for p in m.parameters() if p.is_floating_point()}
        if found and found != {x.dtype}:
            named = " and ".join(sorted(map(str, found)))
            raise ValueError(f"model and guide must be in {x.dtype}, as the data are, got {named}") from error
        raise


def in_precision_of(model: Any, x: Tensor) -> Tensor:
    """Return floating-point data in the precision of the model's parameters, where they have one."""
    if not (isinstance(model, nn.Module) and x.is_floating_point()):
        return x
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return x.to(found.pop()) if len(found) == 1 else x
