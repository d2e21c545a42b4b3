"""How many threads torch computes with on the CPU: measured on the programs, asked for, or as before."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyro
import torch
from torch import Tensor, nn

from .isolation import device_of, isolated_rng
from .objective import ELBO
from .program import parameters_of

__all__ = ["Threads", "available_threads", "choose_threads", "measure_threads", "threads_set"]

# A step that one thread takes in less than this is repeated until it takes as long: setting another number of
# threads costs some microseconds, and clocks tick.
_LEAST = 0.01
_MOST_ROUNDS = 15


@dataclass(frozen=True)
class Threads:
    """A number of threads and where it comes from.

    Attributes:
        number: The number.
        reason: Why this one, as the end of a sentence.
        seconds: What a step took with each number that was tried.
    """

    number: int
    reason: str
    seconds: Mapping[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.number} ({self.reason})"


def choose_threads(
    measure: Callable[[], Threads],
    *,
    asked: int | None = None,
    before: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Threads:
    """Choose between the number of a run that is gone on with, a user's own, and a measurement.

    Sums are taken in another order on another number of threads, so a run that is resumed to the same bits
    goes on with its number.

    Args:
        measure: Called where nobody has said a number.
        asked: A number that is asked for.
        before: The number of the run that is resumed.
        environment: Where ``OMP_NUM_THREADS`` may stand, which torch has then followed.

    Raises:
        ValueError: If another number is asked for than that of the run, or one that is not positive.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"threads must be positive, got {asked}")
    if before is not None:
        if asked not in (None, before):
            raise ValueError(f"threads must be {before}, as in the run that is resumed, got {asked}")
        return Threads(before, "as in the run that is resumed")
    if asked is not None:
        return Threads(asked, "as asked for")
    if environment.get("OMP_NUM_THREADS"):
        return Threads(torch.get_num_threads(), "as OMP_NUM_THREADS says")
    return measure()


def measure_threads(
    model: nn.Module,
    guide: nn.Module,
    args: tuple[Tensor, ...],
    objective: ELBO | None = None,
    *,
    limit: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    budget: float = 1.0,
    margin: float = 0.1,
) -> Threads:
    """Time steps of two programs on one batch with 1, 2, 4, ... threads, and say which number is best.

    On several threads a step of a small network is no faster, and beside a busy process many times slower, as
    each operation then waits for the thread that has no core. The fewest threads win that are within
    ``margin`` of the fastest. A step that takes the whole budget is not tried: it gets all there are.

    Loss and gradients are computed as in training. Parameters, their gradients, buffers, random generators
    and the number of threads are left as they are.

    Args:
        model: The model program.
        guide: The guide program.
        args: What they are called with, ``x`` of shape ``(B, *x_shape)`` first.
        objective: What is minimised, the ELBO if absent.
        limit: Largest number, by default :func:`available_threads`.
        clock: Returns seconds.
        budget: Seconds that the measurement may take, roughly.
        margin: Relative gain for which more threads are worth taking.
    """
    numbers = _powers(available_threads() if limit is None else limit)
    if device_of(model, guide).type != "cpu":
        return Threads(torch.get_num_threads(), "as torch has it beside a GPU")
    if len(numbers) == 1:
        return Threads(1, "there is one core")
    objective = objective if objective is not None else ELBO()
    parameters = [parameter for _, parameter in parameters_of(model, guide)]
    buffers = [(buffer, buffer.clone()) for program in (model, guide) for buffer in program.buffers()]

    def step() -> None:
        loss = objective.terms(model, guide, *args).loss
        torch.autograd.grad(loss, parameters, allow_unused=True)

    with isolated_rng(torch.device("cpu"), 0), pyro.validation_enabled(False), threads_set(1):
        try:
            return _fastest(step, numbers, clock, budget, margin)
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def available_threads() -> int:
    """Number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows do not say more


@contextmanager
def threads_set(number: int | None) -> Iterator[None]:
    """Compute with a number of threads for a block; ``None`` leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _powers(limit: int) -> list[int]:
    """1, 2, 4, ... and the limit itself."""
    return sorted({2**i for i in range(limit.bit_length())} | {limit})


def _fastest(
    step: Callable[[], object], numbers: list[int], clock: Callable[[], float], budget: float, margin: float
) -> Threads:
    step()  # the first one asks for memory and fills caches
    start = clock()
    step()
    once = clock() - start
    if once > budget:
        return Threads(numbers[-1], f"a step takes {_shown(once)} on one thread")
    repeats = max(1, math.ceil(_LEAST / max(once, 1e-6)))
    seconds = dict.fromkeys(numbers, math.inf)
    for _ in range(_MOST_ROUNDS):
        for number in numbers:
            torch.set_num_threads(number)
            began = clock()
            for _ in range(repeats):
                step()
            # The least of several: whatever else runs on the machine makes a step slower, never faster.
            seconds[number] = min(seconds[number], (clock() - began) / repeats)
        if clock() - start > budget:
            break
    enough = min(seconds.values()) * (1 + margin)
    best = next(number for number in numbers if seconds[number] <= enough)
    shown = ", ".join(f"{_shown(each)} on {number}" for number, each in seconds.items())
    return Threads(best, f"measured: a step takes {shown}", seconds)


def _shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
