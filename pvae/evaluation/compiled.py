"""The model's density as one compiled function, without Pyro between networks and densities."""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.inference.program import Program, SiteRecorder, particle_plate
from pvae.inference.recording import NotTraceable, record

__all__ = ["CompiledScore", "compiled", "first_line", "warn_uncompiled"]


def compiled(graph: Callable[..., Any]) -> Callable[..., Any]:
    """Hand a graph of tensor operations to ``torch.compile``, for these shapes alone."""
    function: Callable[..., Any] = torch.compile(graph, dynamic=False, fullgraph=True)
    return function


def first_line(error: BaseException) -> str:
    """What an error says, for the end of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def warn_uncompiled(reason: str) -> None:
    """Say that an evaluation goes on without a compiler."""
    warnings.warn(f"this model is evaluated without being compiled, as {reason}", stacklevel=2)


class CompiledScore:
    """The log-density of a model, compiled for the shape of the first draws that it is given.

    Another shape, such as that of the last data, is left to the caller, and so is everything where a model
    cannot be compiled: that is said in a warning, once.

    Args:
        model: The model program, all of whose densities are exact.
        score: Adds up the densities of recorded sites, shape ``(k, B)``: the caller's own way to do so.
    """

    def __init__(self, model: Program, score: Callable[..., Tensor]) -> None:
        self._model, self._score = model, score
        self._shape: tuple[int, ...] | None = None
        self._step: Callable[..., Any] | None = None

    def add_to(
        self,
        log_w: Tensor,
        x: Tensor,
        y: Tensor | None,
        values: Mapping[str, Tensor],
        rows: int,
        given: Collection[str],
    ) -> bool:
        """Add log p to ``log_w`` ``(K, B)``, and return whether that was done."""
        num = len(log_w)
        # Chunks as even as can be: all have one shape, and the last goes over some particles again.
        size = -(-num // -(-num // max(1, min(num, rows // len(x)))))
        shape = (size, len(x), num)
        if self._shape is None:
            self._shape = shape
            part = {name: value[:size] for name, value in values.items()}
            self._step = self._compiled(x, y, part, given)
        if self._step is None or shape != self._shape:
            return False
        log_p = torch.empty_like(log_w)
        context = (x,) if y is None else (x, y)
        for start in range(0, num, size):
            chunk = slice(min(start, num - size), min(start, num - size) + size)
            (log_p[chunk],) = self._step(*(value[chunk].contiguous() for value in values.values()), *context)
        log_w += log_p
        return True

    def _compiled(
        self, x: Tensor, y: Tensor | None, values: Mapping[str, Tensor], given: Collection[str]
    ) -> Callable[..., Any] | None:
        names, context = list(values), (x,) if y is None else (x, y)
        shape = (len(next(iter(values.values()))), len(x))

        def step(*tensors: Tensor) -> list[Tensor | None]:
            part = dict(zip(names, tensors, strict=False))
            with SiteRecorder(part) as p, particle_plate(shape[0]):
                self._model(*tensors[len(names) :])
            return [self._score([s for n, s in p.sites.items() if n not in given], shape)]

        arguments = [*(value.contiguous() for value in values.values()), *context]
        try:
            graph = record(step, lambda: arguments, x.device, simplified=False)
            function = compiled(graph)
            function(*arguments)
        except NotTraceable as error:
            reason = error.reason
        except Exception as error:  # compilers fail in many ways, and nothing hangs on one
            reason = f"compiling failed ({first_line(error)})"
        else:
            return function
        warn_uncompiled(reason)
        return None
