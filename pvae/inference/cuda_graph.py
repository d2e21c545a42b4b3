"""A whole optimisation step captured as one CUDA graph: what stays where it is, and what may enter."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["CAPTURES", "Capture", "CudaCapture", "NotCapturable", "WholeStep", "capturable", "obstacle"]

# Steps that are taken outside the graph first: libraries set themselves up and the optimiser makes its state
# in the first, and the others must not wait for the host.
_WARM_UP = 3

Body = Callable[[Tensor, Tensor, Tensor], None]
"""A step: called with the positions of its data ``(B,)``, its row of numbers, and its slot ``(1,)``."""


class NotCapturable(Exception):
    """A step cannot be captured; the message says why, without the name of the engine."""


class Capture(Protocol):
    """How steps are warmed up and captured on one kind of device."""

    def __init__(self, device: torch.device) -> None: ...

    def warm_up(self, step: Callable[[], None], strict: bool) -> None:
        """Take a step outside the graph; ``strict``: with an error if it waits for the device."""
        ...

    def capture(self, step: Callable[[], None]) -> Callable[[], object]:
        """Record a step without taking it; return what takes it."""
        ...


class CudaCapture:
    """Capture by :class:`torch.cuda.CUDAGraph`, on a stream of its own, as warming up must be.

    Random numbers come from torch's default generator of the device: a replay takes its seed and its offset
    as they are then and moves it on, so that its state can be set and saved between steps as in any run.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], None], strict: bool) -> None:
        """Take a step on the stream of the capture; ``strict``: with an error if it waits for the device."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _no_waiting(strict):
            step()
        current.wait_stream(self._stream)

    def capture(self, step: Callable[[], None]) -> Callable[[], object]:
        """Record a step without taking it; return what takes it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self._stream):
            step()
        return graph.replay


CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaCapture}
"""What captures steps, by type of device."""


class WholeStep:
    """A step as a function of tensors that stay where they are: taken a few times, captured, then replayed.

    Before a step nothing enters but the positions of its data: one copy within the device. What a schedule
    says of steps to come is sent beforehand, some rows at once, and a counter on the device chooses among
    them. The first steps, taken one operation after the other, are steps of the run as all others are.

    Args:
        body: The step. It must change tensors in place alone, and read nothing from the host.
        capture: What captures it.
        size: Most rows that are sent at once.
        device: Where all of it lies.
    """

    def __init__(self, body: Body, capture: Capture, size: int, device: torch.device) -> None:
        self._body, self._capture, self._size, self._device = body, capture, size, device
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._table = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self._index = torch.zeros(0, dtype=torch.int64, device=device)
        self.reset()

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from now on."""
        return self._replay is not None

    def reset(self) -> None:
        """Forget the capture, as after a change of tensors that the step holds."""
        self._replay: Callable[[], object] | None = None
        self._taken, self._next, self._rows_left = 0, (-1, -1), 0

    def expects(self, step: int, slot: int) -> bool:
        """Whether the numbers of this step were sent, and the counter stands at its slot."""
        return self._rows_left > 0 and self._next == (step, slot)

    def send(self, step: int, slot: int, rows: Sequence[Sequence[float]]) -> None:
        """Send the numbers of the next steps, without waiting for the device.

        Args:
            step: Number of the first of these steps.
            slot: Its slot; those of the others follow it.
            rows: Numbers of each step, at most as many steps as there are slots left.
        """
        fast = self._device.type == "cuda"
        # Pinned memory is not used again before the copy is done: its allocator sees to that.
        sent = torch.tensor(rows, dtype=torch.float64, pin_memory=fast)
        if self._table.shape != (self._size, sent.shape[1]):
            self._table = sent.new_zeros(self._size, sent.shape[1], device=self._device)
            self._replay = None
        self._table[slot : slot + len(rows)].copy_(sent, non_blocking=True)
        self._slot.fill_(slot)
        self._next, self._rows_left = (step, slot), len(rows)

    def __call__(self, index: Tensor) -> None:
        """Take the next step, on the data at ``index``, shape ``(B,)``, the same for all steps.

        Raises:
            NotCapturable: If it waits for the host, or cannot be captured for another reason; the step is
                then not taken to its end.
        """
        if self._index.shape != index.shape:
            self._index, self._replay, self._taken = index.clone(), None, 0
        else:
            self._index.copy_(index, non_blocking=True)
        if self._replay is None:
            self._prepare()
        if self._replay is not None:
            self._replay()
        step, slot = self._next
        self._next, self._rows_left = (step + 1, slot + 1), self._rows_left - 1

    def _prepare(self) -> None:
        """Take the step outside a graph, or capture it if enough of them were taken that way."""
        try:
            if self._taken < _WARM_UP:
                self._capture.warm_up(self._whole, strict=self._taken > 0)
                self._taken += 1
            else:
                self._replay = self._capture.capture(self._whole)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotCapturable(f"cannot capture this step ({_first_line(error)})") from error

    def _whole(self) -> None:
        self._body(self._index, self._table.index_select(0, self._slot)[0], self._slot)
        self._slot.add_(1)


def obstacle(
    device: torch.device, optimizer: torch.optim.Optimizer, model: nn.Module, alone: bool = True
) -> str | None:
    """Say what keeps a step from being captured, as far as it can be known before the first; or nothing.

    Args:
        device: Where the programs lie.
        optimizer: Their optimiser.
        model: The model program.
        alone: Whether no other process has a share in the steps.
    """
    if not alone:
        return "needs a process that trains alone, got one of several"
    if device.type not in CAPTURES:
        return f"needs a {' or '.join(CAPTURES).upper()} device, got {device.type}"
    # SGD has no such option, as it counts no steps.
    if not isinstance(optimizer, torch.optim.SGD) and any(
        "capturable" not in group for group in optimizer.param_groups
    ):
        return f"needs an optimiser with the option 'capturable', got {type(optimizer).__name__}"
    if hasattr(model, "on_step"):
        return f"needs a model that asks for nothing between steps, got {type(model).__name__}, which does"
    return None


def capturable(optimizer: torch.optim.Optimizer, lr: float, device: torch.device) -> Tensor:
    """Set an optimiser, before its first step, to be captured; return its learning rate as a tensor.

    Args:
        optimizer: One that has no :func:`obstacle`.
        lr: Learning rate of the first step.
        device: Where its parameters lie.

    Returns:
        The tensor, shape ``()``, that all groups of parameters now read.
    """
    on_gpu = device.type == "cuda"
    # Fused kernels read it in single precision.
    rate = torch.tensor(lr, dtype=torch.float32 if on_gpu else torch.float64, device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = on_gpu  # elsewhere there is no such formula, and none is needed
    # Torch warns of steps that are taken outside a graph; ours are meant.
    optimizer._warned_capturable_if_run_uncaptured = True
    return rate


@contextmanager
def _no_waiting(strict: bool) -> Iterator[None]:
    """Raise an error where the host would wait for a CUDA device."""
    before = torch.cuda.get_sync_debug_mode()
    if strict:
        with warnings.catch_warnings():
            # Torch says once that it does not detect all of them; the capture itself does.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
