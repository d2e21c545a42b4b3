"""One part of a data set, whole in memory and on one device; batches are gathers by index there."""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ._encoding import Encoding
from ._seeds import epoch_order
from .protocol import Protocol

__all__ = ["Batch", "Split"]


class Batch(NamedTuple):
    """Some data.

    Attributes:
        x: Data, float32, shape ``(B, *x_shape)``.
        y: Class numbers ``(B,)`` int64, or attributes ``(B, L)`` float32, or ``None``.
        index: Position of each datum in its split, shape ``(B,)``, int64.
    """

    x: Tensor
    y: Tensor | None
    index: Tensor  # type: ignore[assignment]  # the field's name is fixed; a batch is never searched as a tuple


class Split:
    """One part of a data set, stored as compactly as its values allow.

    Made by :func:`~pvae.data.load` and :func:`~pvae.data.from_tensors`. ``split[:1000]``, ``split[index]``
    and ``split[mask]`` are splits again, whose data are encoded exactly as in the whole and whose protocol
    says which they are.

    Args:
        stored: Levels or values, shape ``(N, *x_shape)``, uint8 where possible.
        protocol: Protocol of this part.
        encoding: How stored levels become ``x``.
        y: Class numbers ``(N,)`` int64, or attributes ``(N, L)`` float32, or ``None``.
        positions: Position of each datum in its whole part, shape ``(N,)``, on the CPU; ``None`` for the
            whole.
        class_names: Name of each class.
        attribute_names: Name of each column of ``y``.
    """

    fits_device: ClassVar[bool] = True

    def __init__(
        self,
        stored: Tensor,
        *,
        protocol: Protocol,
        encoding: Encoding,
        y: Tensor | None = None,
        positions: Tensor | None = None,
        class_names: tuple[str, ...] | None = None,
        attribute_names: tuple[str, ...] | None = None,
    ) -> None:
        self.protocol = protocol
        self.x_shape = tuple(stored.shape[1:])
        self.class_names = class_names
        self.attribute_names = attribute_names
        self._encoding = encoding
        self._stored = stored
        self._y = y
        self._positions = positions
        self._fixed: Tensor | None = None
        self._x: Tensor | None = None
        self._share = (0, 1)

    @property
    def name(self) -> str:
        """``"train"``, ``"valid"`` or ``"test"``."""
        return self._encoding.part

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self._stored.device

    @property
    def x(self) -> Tensor:
        """The data as evaluated, float32, shape ``(N, *x_shape)``.

        Binarised or dequantised once, by the seed of the protocol: the same on every device and in every
        process. Made on first use and kept; take ``split[:n].x`` where a few will do.
        """
        if self._x is None:
            self._x = self._encoding.finish(self._evaluated())
        return self._x

    @property
    def clean(self) -> Tensor:
        """The data without the noise of their protocol, float32, shape ``(N, *x_shape)``.

        Grey values in [0, 1] of data that are binarised, the middle of the cell of those that are
        dequantised, and :attr:`x` of all others. Not kept.
        """
        return self._encoding.clean(self._stored)

    @property
    def y(self) -> Tensor | None:
        """Class numbers ``(N,)`` int64, or attributes ``(N, L)`` float32, or ``None``."""
        return self._y

    @property
    def positions(self) -> Tensor:
        """Position of each datum in its whole part, shape ``(N,)``, int64, on the CPU."""
        return torch.arange(len(self)) if self._positions is None else self._positions

    def __len__(self) -> int:
        return len(self._stored)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.protocol})"

    def to(self, device: torch.device | str) -> "Split":
        """Return this split on ``device``."""
        moved = copy.copy(self)
        for name in ("_stored", "_y", "_fixed", "_x"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(device))
        return moved

    def share(self, number: int, of: int) -> "Split":
        """Return this split with one share of each of its batches, for one of several processes.

        The shares of a batch are together the batch that :meth:`batches` gives otherwise, in its order, and
        equal in size where the batch can be divided so; one without data is left out.

        Args:
            number: Which share, from 0.
            of: Number of shares.

        Raises:
            ValueError: If there is no such share.
        """
        if not 0 <= number < of:
            raise ValueError(f"number must lie in 0 ... {of - 1}, one of {of} shares, got {number}")
        part = copy.copy(self)
        part._share = (number, of)
        return part

    def _shares(self, bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Cut this split's share out of each batch."""
        number, of = self._share
        if of == 1:
            return bounds
        cut = [
            (first + (last - first) * number // of, first + (last - first) * (number + 1) // of)
            for first, last in bounds
        ]
        return [(first, last) for first, last in cut if first < last]

    def sample(self, index: Tensor) -> Batch:
        """Return the batch at ``index`` as training sees it.

        Dynamic binarisation and dequantisation of the training part are drawn anew from torch's global
        generator of the device; everything else is as in :attr:`x`. Nothing here waits for the device.

        Args:
            index: Positions in this split, shape ``(B,)``, int64.
        """
        index = index.to(self.device, non_blocking=True)
        if self._encoding.redraws:
            x = self._encoding.draw(self._stored.index_select(0, index))
        else:
            x = self._encoding.finish(self._evaluated().index_select(0, index))
        return Batch(x, None if self._y is None else self._y.index_select(0, index), index)

    def num_batches(self, batch_size: int, *, drop_last: bool) -> int:
        """Return the number of batches in an epoch.

        Raises:
            ValueError: If ``batch_size`` is not positive, or leaves no batch at all.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        number = len(self) // batch_size if drop_last else -(-len(self) // batch_size)
        if number == 0:
            raise ValueError(
                f"batch_size must be at most {len(self)}, the size of the {self.name} split, with drop_last, "
                f"got {batch_size}"
            )
        return number

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        drop_last: bool,
        start: int = 0,
        shuffle: bool = True,
    ) -> Iterator[Batch]:
        """Iterate over one epoch.

        Args:
            batch_size: Number of data in a batch.
            seed: Seed of the run.
            epoch: Number of the epoch; the order is a pure function of ``(seed, epoch)``.
            drop_last: Whether an incomplete last batch is left out.
            start: Number of batches to leave out at the front, to resume within an epoch.
            shuffle: Whether to permute.

        Raises:
            ValueError: If there is no such batch.
        """
        order, bounds = self._plan(batch_size, seed, epoch, drop_last, start, shuffle)
        return self._iterate(order, bounds, seed=seed, epoch=epoch)

    def indices(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        drop_last: bool,
        start: int = 0,
        shuffle: bool = True,
    ) -> Iterator[Tensor]:
        """Iterate over the positions of the data of :meth:`batches`, on the split's device, without the data.

        Args and errors are those of :meth:`batches`; :meth:`sample` gives the data.
        """
        order, bounds = self._plan(batch_size, seed, epoch, drop_last, start, shuffle)
        order = order.to(self.device)
        return (order[first:last] for first, last in bounds)

    def _plan(
        self, batch_size: int, seed: int, epoch: int, drop_last: bool, start: int, shuffle: bool
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Return the order of an epoch, and where in it its batches begin and end."""
        number = self.num_batches(batch_size, drop_last=drop_last)
        if not 0 <= start <= number:
            raise ValueError(f"start must lie in 0 ... {number}, the number of batches, got {start}")
        order = epoch_order(len(self), seed=seed, epoch=epoch, shuffle=shuffle)
        bounds = [(i * batch_size, min((i + 1) * batch_size, len(self))) for i in range(start, number)]
        return order, self._shares(bounds)

    def _iterate(
        self, order: Tensor, bounds: list[tuple[int, int]], *, seed: int, epoch: int
    ) -> Iterator[Batch]:
        # One transfer for the whole epoch; the index of a batch is a view of it. What is drawn once is drawn
        # before the first batch, so that no step of the loop waits for it.
        order = order.to(self.device)
        if not self._encoding.redraws:
            self._evaluated()
        for first, last in bounds:
            yield self.sample(order[first:last])

    def __getitem__(self, key: slice | Tensor) -> "Split":
        """Return a split of some of the data, encoded as they are here.

        Args:
            key: A slice, positions ``(M,)`` int64, or a mask ``(N,)`` bool.

        Raises:
            TypeError: If ``key`` is neither.
            ValueError: If it selects nothing, or what is not there.
        """
        where = self._where(key)
        positions = self.positions[where]
        rows = where.to(self.device)
        part = Split(
            self._stored.index_select(0, rows),
            protocol=self._sub_protocol(positions),
            encoding=self._encoding,
            y=None if self._y is None else self._y.index_select(0, rows),
            positions=positions,
            class_names=self.class_names,
            attribute_names=self.attribute_names,
        )
        for name in ("_fixed", "_x"):
            cached = getattr(self, name)
            setattr(part, name, None if cached is None else cached.index_select(0, rows))
        return part

    def _where(self, key: slice | Tensor) -> Tensor:
        """Positions in this split selected by ``key``, on the CPU."""
        if isinstance(key, slice):
            where = torch.arange(*key.indices(len(self)))
        elif isinstance(key, Tensor) and key.ndim == 1 and key.dtype == torch.bool:
            if len(key) != len(self):
                raise ValueError(f"a mask of this split must have shape ({len(self)},), got ({len(key)},)")
            where = key.cpu().nonzero().squeeze(1)
        elif isinstance(key, Tensor) and key.ndim == 1 and key.dtype == torch.int64:
            where = key.cpu()
            if len(where) and not -len(self) <= int(where.min()) <= int(where.max()) < len(self):
                low, high = int(where.min()), int(where.max())
                raise ValueError(f"positions must lie in 0 ... {len(self) - 1}, got {low} ... {high}")
            where = torch.where(where < 0, where + len(self), where)
        else:
            got = (
                f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else type(key).__name__
            )
            raise TypeError(
                f"a split is indexed by a slice, positions (M,) int64 or a mask (N,) bool, got {got}"
            )
        if len(where) == 0:
            raise ValueError(f"the selection must hold at least one datum of {len(self)}, got none")
        return where

    def _sub_protocol(self, positions: Tensor) -> Protocol:
        """Name a subset by its positions in the whole part, however it was reached."""
        first, last = int(positions[0]), int(positions[-1])
        if torch.equal(positions, torch.arange(first, first + len(positions))):
            whole = dict(self.protocol.sizes)[self.name]
            subset = None if len(positions) == whole else f"{first}:{last + 1}"
        else:
            digest = hashlib.sha256(positions.numpy().astype("<i8").tobytes()).hexdigest()[:12]
            subset = f"{len(positions)} positions {digest}"
        return replace(self.protocol, subset=subset)

    def _evaluated(self) -> Tensor:
        """What :attr:`x` is made of, in its compact form, on the split's device."""
        if self._encoding.keeps:
            return self._stored
        if self._fixed is None:
            self._fixed = self._encoding.fix(self._stored.cpu(), self.positions).to(self.device)
        return self._fixed
