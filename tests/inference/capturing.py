"""A double of CUDA graphs for a CPU: the tensor operations of a step, written down once and done again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["RecordingCapture"]

_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class RecordingCapture:
    """Captures as a CUDA graph does: what Python decided is frozen, and tensors are those of the capture.

    The step is taken while it is written down, which a CUDA graph's is not: the first replay does nothing.

    Attributes:
        strict: Of each step outside the recording, whether it was forbidden to wait.
        replays: Number of steps out of the recording, the first included.
        recordings: Number of recordings.
    """

    strict: list[bool]
    replays = 0
    recordings = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.strict = []
        type(self).last = self

    def warm_up(self, step: Callable[[], None], strict: bool) -> None:
        self.strict.append(strict)
        with _Recorder(strict):
            step()

    def capture(self, step: Callable[[], None]) -> Callable[[], object]:
        with _Recorder(True) as recorder:
            step()
        self.recordings += 1
        done = False

        def replay() -> None:
            nonlocal done
            self.replays += 1
            if done:
                recorder.replay()
            done = True

        return replay

    last: "RecordingCapture"


class _Recorder(TorchDispatchMode):
    """Writes operations down; refuses those that wait for a device."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict = strict
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.strict and func.name() in _WAITS:
            raise RuntimeError(f"called a synchronizing operation: {func.name()}\nand more")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, _tensors(out)))
        return out

    def replay(self) -> None:
        """Do the operations again, each on the tensors that the ones before it made this time."""
        new: dict[int, Tensor] = {}

        def of_now(tensor: Tensor) -> Tensor:
            return new.get(id(tensor), tensor)

        with torch.no_grad():
            for func, args, kwargs, outs in self.calls:
                args, kwargs = tree_map_only(Tensor, of_now, (args, kwargs))
                for old, out in zip(outs, _tensors(func(*args, **kwargs)), strict=True):
                    new[id(old)] = out


def _tensors(out: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, out)
    return found
