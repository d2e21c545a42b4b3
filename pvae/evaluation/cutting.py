"""Running a program for a part of its particles at a time, as if it ran for all of them at once."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from .memory import Tracked, is_random, storages

__all__ = ["Cut", "NotCuttable"]

_ATEN = torch.ops.aten
# Numbers that depend on no tensor, written to one, of a given shape, and of the shape of one.
_FILLS = {_ATEN.normal_.default, _ATEN.uniform_.default, _ATEN.exponential_.default}
_SHAPED = {_ATEN.randn.default, _ATEN.rand.default}
_LIKE = {_ATEN.randn_like.default, _ATEN.rand_like.default}
_NORMAL = _ATEN.normal.Tensor_Tensor


class NotCuttable(Exception):
    """Some random numbers of a program cannot be told apart by particles: it must run for all at once."""


@dataclass
class _Entry:
    """What the first cut did at one operation, and the others are to do there.

    Attributes:
        func: The operation.
        kind: Whether it is run, or returns what it returned, or a part of the noise.
        result: What it returned, or the noise of all particles.
        shared: Whether they share that noise.
    """

    func: Any
    kind: Literal["run", "same", "noise"]
    result: Any = None
    shared: bool = False


class Cut(Tracked):
    """Runs a program for ``size`` of its particles, then for others, with the draws of one run for all.

    A program does the same operations for some particles as for others. So the first cut draws the random
    numbers of all particles, in the order in which a run for all would draw them from the same stream, takes
    its part of them, and leaves the rest to the others. What does not hang on particles, as an encoder's
    features, is computed in the first cut and known in the others. Hence draws do not depend on how many
    particles a cut has, up to the rounding of networks that see other batches.

    Gradients must be off. Every cut has the same size: the last may have to go over some particles again.

    Args:
        num_particles: Particles K in all.
        size: Particles of a cut.
        num_data: Data B; what is drawn for particles has shape ``(size, B, ...)``.
    """

    def __init__(self, num_particles: int, size: int, num_data: int) -> None:
        super().__init__()
        self.num_particles, self.size, self.num_data = num_particles, size, num_data
        self._tape: list[_Entry] = []
        self._at = self._first = 0
        self._recorded = False
        # For memory that does not hang on particles: the entries that made it and wrote to it, and whether
        # an operation that is run in every cut has read it.
        self._written_at: Any = WeakIdKeyDictionary(ref_type=weakref.ref)
        self._read: Any = WeakIdKeyDictionary(ref_type=weakref.ref)

    def parts(self) -> Iterator[slice]:
        """The particles of each cut."""
        for start in range(0, self.num_particles, self.size):
            first = min(start, self.num_particles - self.size)
            yield slice(first, first + self.size)

    @contextmanager
    def running(self, part: slice, given: Any) -> Iterator[None]:
        """Run a program inside, for these particles, of whom some values may be given.

        Raises:
            NotCuttable: If that is not possible.
        """
        self._at, self._first = 0, part.start
        self.mark(given)
        with self:
            yield
        self._recorded = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            raise NotCuttable  # of what is not known
        if func.is_view:  # shares the memory of what it is a view of, and with it all that is known of it
            return func(*args, **kwargs)
        if not self._recorded:
            return self._record(func, args, kwargs)
        if self._at == len(self._tape) or self._tape[self._at].func is not func:
            raise NotCuttable
        entry = self._tape[self._at]
        self._at += 1
        if entry.kind == "run":
            return func(*args, **kwargs)
        if entry.kind == "noise":
            return self._part_of(entry, args)
        # In place, it has been done; else a tensor of its own, as autograd may put its mark there.
        if func._schema.is_mutable:
            return args[0]
        return tree_map_only(Tensor, Tensor.detach, entry.result)

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        entry = _Entry(func, "run")
        self._tape.append(entry)
        given = list(storages((args, kwargs)))
        if is_random(func):
            return self._draw(entry, args, kwargs)
        varies = any(memory in self.varying for memory in given)
        in_place = func._schema.is_mutable
        if in_place:
            self._write(entry, func, args, varies)
        out = func(*args, **kwargs)
        if varies:
            for memory in storages(out):
                self.varying[memory] = True
        if varies:
            for memory in given:
                self._read[memory] = True
        elif entry.kind != "run" or not in_place:
            entry.kind, entry.result = "same", out
            for memory in storages(out):
                self._written_at.setdefault(memory, []).append(entry)
        return out

    def _write(self, entry: _Entry, func: Any, args: Any, varies: bool) -> None:
        """Decide about an operation in place, before it is done."""
        if not (func._schema.name.endswith("_") and isinstance(args[0], Tensor)):
            raise NotCuttable  # to an ``out`` of some kind
        (target,) = storages(args[0])
        if target in self.varying:
            return
        if varies or target in self._read:
            # Later cuts must find it as it was: they make it anew.
            if target not in self._written_at and target in self._read:
                raise NotCuttable
            for writer in self._written_at.pop(target, ()):
                writer.kind, writer.result = "run", None
            if varies:
                self.varying[target] = True
        else:
            entry.kind = "same"

    def _draw(self, entry: _Entry, args: Any, kwargs: Any) -> Any:
        """Draw for all particles, or once for all of them what has no particles."""
        func = entry.func
        if func is _NORMAL:
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
            for memory in storages(args):
                self._read[memory] = True
        elif func in _FILLS or func in _LIKE:
            shape = args[0].shape
        elif func in _SHAPED:
            shape = torch.Size(args[0])
        else:
            shape = None
        entry.kind = "noise"
        if shape is not None and tuple(shape[:2]) == (self.size, self.num_data):
            entry.result = self._noise(func, shape, args, kwargs)
            return self._part_of(entry, args)
        # Numbers that hang on particles, or may be theirs in another order.
        if self.varies(() if func in _FILLS else (args, kwargs)) or (
            shape is None and func._schema.is_mutable
        ):
            raise NotCuttable
        out = func(*args, **kwargs)
        if any(value.numel() % self.size == 0 for value in tree_leaves(out) if isinstance(value, Tensor)):
            raise NotCuttable
        if func in _FILLS:
            entry.result, entry.shared = out.clone(), True
            return self._part_of(entry, args)
        entry.kind, entry.result = "same", out
        return out

    def _noise(self, func: Any, shape: torch.Size, args: Any, kwargs: Any) -> Tensor:
        whole = (self.num_particles, *shape[1:])
        if func in _SHAPED:
            noise: Tensor = func(whole, *args[1:], **kwargs)
            return noise
        like: Tensor = torch.empty_like(args[0]) if func in _LIKE else args[0]
        if func is not _NORMAL and not like.is_contiguous():
            raise NotCuttable  # it would be filled in another order
        noise = torch.empty(whole, dtype=like.dtype, device=like.device)
        if func is _NORMAL:
            return noise.normal_(generator=kwargs.get("generator"))
        if func in _FILLS:
            return func(noise, *args[1:], **kwargs)
        return func(noise, **kwargs)

    def _part_of(self, entry: _Entry, args: Any) -> Tensor:
        """Take the noise of this cut's particles."""
        noise: Tensor = entry.result
        if not entry.shared:
            noise = noise[self._first : self._first + self.size]
        if entry.func in _FILLS:
            if not self._recorded:
                self._write(entry, entry.func, args, varies=True)
            out = args[0].copy_(noise)
        elif entry.func is _NORMAL:
            out = (noise * args[1]).add_(args[0])
        else:
            out = noise.clone()
        self.mark((out,))
        return out
