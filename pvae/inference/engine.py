"""How one step's loss and gradients are computed: by running the programs, or from a graph of them."""

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from .objective import ELBO
from .program import Program
from .recompiling import recompiling
from .recording import NotTraceable, record

__all__ = ["ENGINES", "AutoEngine", "EagerEngine", "Engine", "GraphEngine", "Pair", "make_engine"]

ENGINES = ("eager", "traced", "graph", "auto")
"""What :func:`make_engine` knows."""

_STEPS_BEFORE_TRACING = 100


class Engine(Protocol):
    """Leaves gradients in the parameters and returns the loss and its parts as one vector on the device."""

    names: tuple[str, ...]

    def __call__(self, args: tuple[Tensor, ...], beta: Tensor) -> Tensor:
        """Evaluate the programs on ``args``; ``beta`` is the KL weight, a scalar tensor on the device."""
        ...


class EagerEngine:
    """Runs the programs at every step."""

    def __init__(self, objective: ELBO, model: nn.Module, guide: nn.Module) -> None:
        self.names: tuple[str, ...] = ()
        self._objective = objective
        self._programs = (model, guide)
        self._parameters = list({id(p): p for m in self._programs for p in m.parameters()}.values())

    def __call__(self, args: tuple[Tensor, ...], beta: Tensor) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        self.names, vector = _vector(self._objective, *self._programs, args, beta)
        vector[0].backward()
        return vector.detach()


class GraphEngine:
    """Records forward and backward pass once per shape as one graph without Pyro in it, and runs that.

    ``torch.compile`` of a Pyro program breaks into pieces at every site; the graph of the joint forward and
    backward pass, recorded by ``make_fx`` while Pyro runs, is tensor operations alone. Random draws stay in
    it. Python branches and numbers are frozen at the first batch: whatever changes from step to step enters
    as a tensor. Each graph is compared with the programs once, when it is made.

    Args:
        objective: The objective.
        model: The model program.
        guide: The guide program.
        compile: Whether to hand the graph to ``torch.compile`` (needs a C++ compiler on a CPU); otherwise it
            is simplified (:func:`~pvae.inference.simplify.simplify`) and run operation by operation: the
            values of the eager engine, to the bit.
    """

    def __init__(self, objective: ELBO, model: nn.Module, guide: nn.Module, compile: bool = True) -> None:
        self.names: tuple[str, ...] = ()
        self._pair = Pair(objective, model, guide)
        self._compile = compile
        self._steps: dict[Any, Any] = {}
        self._trained = {n: p for n, p in self._pair.named_parameters() if p.requires_grad}
        held = {n: p for n, p in self._pair.named_parameters() if not p.requires_grad}
        self._held = held | dict(self._pair.named_buffers())
        self._parameters = tuple(self._trained.values())
        self._tensors = (*self._parameters, *self._held.values())

    def __call__(self, args: tuple[Tensor, ...], beta: Tensor) -> Tensor:
        key = tuple((t.shape, t.dtype, t.device) for t in args)
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = self._run_of(args, beta)
        # The graph holds its own backward pass: autograd need not look at it.
        with torch.no_grad():
            vector, *gradients = step(*self._tensors, *args, beta)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = _laid_out(gradient, parameter) if self._compile else gradient
        return vector

    def graph(self, args: tuple[Tensor, ...], beta: Tensor) -> fx.GraphModule:
        """Record a step on such arguments, and simplify it unless it is to be compiled.

        Parameters, buffers and generators are left as they are.

        Raises:
            NotTraceable: If the graph would not do what the programs do.
        """

        def copies() -> list[Tensor]:
            return [*self._parameters, *(t.detach().clone() for t in self._held.values()), *args, beta]

        return record(self._step, copies, beta.device, simplified=not self._compile)

    def _run_of(self, args: tuple[Tensor, ...], beta: Tensor) -> Any:
        graph = self.graph(args, beta)
        self.names = self._pair.names
        if not self._compile:
            return graph.forward  # without what modules do around it
        # Inductor's search for a channels-last layout takes a graph that holds its own backward pass for
        # inference, and slows convolutions down by a fifth.
        options: Any = {"layout_optimization": False}
        return recompiling(torch.compile(graph, dynamic=False, fullgraph=True, options=options))

    def _step(self, *tensors: Tensor) -> list[Tensor | None]:
        """Loss and parts, then the gradient of each parameter, from parameters, buffers, arguments, beta."""
        count = len(self._trained)
        leaves = [p.detach().requires_grad_() for p in tensors[:count]]
        state = dict(zip((*self._trained, *self._held), (*leaves, *tensors[count:]), strict=False))
        *args, beta = tensors[len(state) :]
        vector = functional_call(self._pair, state, (tuple(args), beta))
        gradients = torch.autograd.grad(vector[0], leaves, allow_unused=True)
        return [vector.detach(), *map(_laid_out, gradients, leaves)]


class AutoEngine:
    """Runs graphs where the programs can be traced, and the programs themselves where they cannot.

    Both give the same values, so that a run may go from one to the other at any step. The programs are run at
    first: a recording takes as long as a hundred small steps, which a short run would not get back.

    Attributes:
        note: Called with a sentence when programs cannot be traced; by default a warning.
    """

    def __init__(self, objective: ELBO, model: nn.Module, guide: nn.Module) -> None:
        self.names: tuple[str, ...] = ()
        self._eager = EagerEngine(objective, model, guide)
        self._engine: Engine = self._eager
        self._graphs = GraphEngine(objective, model, guide, compile=False)
        self._left = _STEPS_BEFORE_TRACING
        self.note: Callable[[str], object] = warnings.warn

    def __call__(self, args: tuple[Tensor, ...], beta: Tensor) -> Tensor:
        if self._left == 0:
            self._engine = self._graphs
        self._left -= 1
        try:
            vector = self._engine(args, beta)
        except NotTraceable as error:
            self.note(
                f"a step of these programs cannot be traced, as {error.reason}: engine 'eager' in its place"
            )
            self._engine = self._eager
            vector = self._engine(args, beta)
        self.names = self._engine.names
        return vector


class Pair(nn.Module):
    """Model and guide as one module, so that one call can exchange the parameters of both."""

    def __init__(self, objective: ELBO, model: nn.Module, guide: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.model = model
        self.guide = guide
        self.names: tuple[str, ...] = ()

    def forward(self, args: tuple[Tensor, ...], beta: Tensor) -> Tensor:
        self.names, vector = _vector(self.objective, self.model, self.guide, args, beta)
        return vector


def _laid_out(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Lay a gradient out in memory as its parameter is, as autograd does when it fills ``.grad``: fused
    optimisers walk over both as they lie, and would read another layout transposed, without an error."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def make_engine(name: str, objective: ELBO, model: nn.Module, guide: nn.Module, compile: bool) -> Engine:
    """Build an engine by name.

    Raises:
        ValueError: For an unknown name.
    """
    if name == "eager":
        return EagerEngine(objective, model, guide)
    if name == "traced":
        return GraphEngine(objective, model, guide, compile=False)
    if name == "graph":
        return GraphEngine(objective, model, guide, compile)
    if name == "auto":
        return AutoEngine(objective, model, guide)
    raise ValueError(f"engine must be {', '.join(map(repr, ENGINES[:-1]))} or {ENGINES[-1]!r}, got {name!r}")


def _vector(
    objective: ELBO, model: Program, guide: Program, args: tuple[Tensor, ...], beta: Tensor
) -> tuple[tuple[str, ...], Tensor]:
    """Evaluate the objective; return the names of loss and parts, and their values as one vector."""
    terms = objective.terms(model, guide, *args, beta=beta)
    return ("loss", *terms.parts), torch.stack([terms.loss, *terms.parts.values()])
