"""How large the networks of a spec may be, known before the memory is asked for."""

import math
import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .program import SpecError

__all__ = ["Allowance", "most_numbers"]

VARIABLE = "PVAE_MOST_PARAMETERS"
_DEFAULT = 10**9
# Tensors of all parts: beyond it, their number and not their size fills the memory.
_TENSORS = 20_000
# Makers of tensors by their sizes, in any of the forms torch takes them.
_SIZED = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full}
_COUNTED = {torch.arange, torch.linspace, torch.eye}


def most_numbers() -> int:
    """How many numbers the tensors of a program may hold: ``PVAE_MOST_PARAMETERS``, else 10^9 (4 GB).

    Raises:
        SpecError: If the variable is no positive number.
    """
    text = os.environ.get(VARIABLE, str(_DEFAULT))
    try:
        most = int(float(text))
    except (ValueError, OverflowError):
        most = 0
    if most < 1:
        raise SpecError(f"{VARIABLE} must be a positive number, got {text[:80]!r}")
    return most


class Allowance(TorchFunctionMode):
    """Within it, tensors are made only as long as all of them together hold no more numbers than allowed.

    Raises:
        SpecError: For the tensor that would be too many, before it is made.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._numbers = self._tensors = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what a call would make, then let it."""
        kwargs = kwargs or {}
        if func in _SIZED or func in _COUNTED:
            self._take(_sizes(func, args, kwargs))
        return func(*args, **kwargs)

    def _take(self, sizes: tuple[int, ...]) -> None:
        self._tensors += 1
        self._numbers += math.prod(sizes)
        if self._numbers > self._most:
            raise SpecError(
                f"the networks must hold at most {self._most} numbers, got {self._numbers} up to a tensor of "
                f"{' x '.join(map(str, sizes))}: make them smaller, or set {VARIABLE} to allow more"
            )
        if self._tensors > _TENSORS:
            raise SpecError(f"the networks must have at most {_TENSORS} tensors, got more: use fewer layers")


def _sizes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Sizes that a maker of tensors is asked for."""
    if func in _SIZED:
        given = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list) else args)
        return tuple(size for size in given if isinstance(size, int))
    numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int | float)]
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0)
    return (int(largest),) * (2 if func is torch.eye else 1)
