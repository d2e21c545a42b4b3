"""How many particles fit into one pass of a program: measured on one, held against a budget in bytes."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Budget", "Measured", "Tracked", "check_memory", "default_memory", "is_random", "storages"]

# Networks take work space besides their tensors: about as much again, for convolutions on a CPU.
_WORK_SPACE = 2
# What a pass on a CPU is best kept to: bytes that its caches hold, but not so few rows that calls count,
# unless these take far more bytes: a sixth faster than 2,600 rows on 784 pixels under two layers of 400,
# a quarter faster than 256 MiB on a ladder of four latents.
_CACHED, _FEWEST, _LARGEST = 2**23, 512, 2**26
# Of an evaluation on the CPU, where nobody says otherwise; on a GPU, the share of its memory.
_CPU_MEMORY = 2**30
_GPU_SHARE = 4


def default_memory(device: torch.device) -> int:
    """Bytes that an evaluation keeps within by itself: 1 GiB on a CPU, a quarter of a GPU's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // _GPU_SHARE
    return _CPU_MEMORY


def check_memory(memory: int | None, device: torch.device) -> int:
    """Return the budget in bytes.

    Raises:
        ValueError: If it is not positive.
    """
    if memory is not None and memory < 1:
        raise ValueError(f"memory must be a positive number of bytes, got {memory}")
    return default_memory(device) if memory is None else memory


@dataclass(frozen=True)
class Budget:
    """Bytes, and what they are to hold.

    Attributes:
        memory: Bytes in all.
        device: Where they lie.
    """

    memory: int
    device: torch.device

    def rows(self, bytes_of_row: int, held: int = 0, quick: bool = True) -> int:
        """How many rows of so many bytes fit beside ``held`` others; at least one.

        On a CPU they are fewer where passes are faster for it, if ``quick``.
        """
        left = (self.memory - held) // _WORK_SPACE
        each = max(1, bytes_of_row)
        fitting = left // each
        if quick and self.device.type == "cpu":
            fitting = min(fitting, max(_CACHED // each, min(_FEWEST, _LARGEST // each)))
        return max(1, fitting)


class Tracked(TorchDispatchMode):
    """Knows which tensors hang on particles: what is drawn or marked, and what is computed from that."""

    def __init__(self) -> None:
        super().__init__()
        # By their memory, which views share.
        self.varying: Any = WeakIdKeyDictionary(ref_type=weakref.ref)

    def mark(self, values: Any) -> None:
        """Let these hang on particles."""
        for memory in storages(values):
            self.varying[memory] = True

    def varies(self, values: Any) -> bool:
        """Whether one of these does."""
        return any(memory in self.varying for memory in storages(values))


class Measured(Tracked):
    """Adds up what a run takes, apart from what it was given.

    Attributes:
        peak: Most bytes at one time of what hangs on particles, so that they multiply with their number.
        kept: Bytes of all that was computed and does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.kept = self._live = 0
        self._known: Any = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(storages((args, kwargs)))
        for memory in given:
            self._known.setdefault(memory, True)
        out = func(*args, **kwargs)
        varies = is_random(func) or any(memory in self.varying for memory in given)
        for memory in storages(out):
            if varies:
                self.varying[memory] = True
            if memory in self._known:
                continue
            self._known[memory] = True
            size = memory.nbytes()
            if varies:
                self._live += size
                self.peak = max(self.peak, self._live)
                weakref.finalize(memory, self._freed, size)
            else:
                self.kept += size
        return out

    def _freed(self, size: int) -> None:
        self._live -= size


def storages(values: Any) -> Iterable[torch.UntypedStorage]:
    """The memory of every tensor in some nest of containers."""
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.layout is torch.strided:
            yield value.untyped_storage()


def is_random(func: Any) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
