"""What a loader is asked for, and the rules that all loaders share."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .errors import DataError

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`~pvae.data.load` that decide what is read.

    Args:
        name: Name of the data set.
        root: The data root.
        download: Whether missing or damaged files may be downloaded.
        valid: Number of validation data asked for, ``None`` for the default of the set.
        seed: Seed of splits and synthetic data.
    """

    name: str
    root: Path
    download: bool
    valid: int | None
    seed: int

    def valid_size(self, default: int, available: int) -> int:
        """Number of validation data to take from ``available`` training data.

        Raises:
            DataError: If that leaves nothing to train on.
        """
        valid = default if self.valid is None else self.valid
        if not 0 <= valid < available:
            raise DataError(
                f"valid must lie in 0 ... {available - 1} for {self.name}, of its training data, got {valid}"
            )
        return valid

    def own_valid(self) -> None:
        """Refuse ``valid`` for a set that comes with a validation part of its own."""
        if self.valid is not None:
            raise DataError(
                f"valid must be None for {self.name}, which has a validation part, got {self.valid}"
            )

    def hold_out(self, x: Tensor, y: Tensor | None, default: int) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Split training data into a training part and a validation part, which is the last of them."""
        last = self.valid_size(default, len(x))
        parts = {"train": slice(0, len(x) - last), "valid": slice(len(x) - last, len(x))}
        return {
            part: (x[rows], None if y is None else y[rows])
            for part, rows in parts.items()
            if rows.start < rows.stop
        }
