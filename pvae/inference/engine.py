"""How one step's loss and gradients are computed: by running the programs, or from a graph of them."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .isolation import isolated_rng
from .objective import ELBO
from .program import Program

__all__ = ["EagerEngine", "Engine", "EngineName", "GraphEngine", "make_engine"]

EngineName = Literal["eager", "graph"]

_QUESTIONS = (torch.ops.aten.is_same_size.default, torch.ops.aten._has_same_storage_numel.default)


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
    """Traces forward and backward pass once per shape into one graph without Pyro in it, and compiles that.

    ``torch.compile`` of a Pyro program breaks into pieces at every site; the graph of the joint forward and
    backward pass, recorded by ``make_fx`` while Pyro runs, is tensor operations alone. Random draws stay in
    it. Python branches and numbers are frozen at the first batch: whatever changes from step to step enters
    as a tensor.

    Args:
        objective: The objective.
        model: The model program.
        guide: The guide program.
        compile: Whether to hand the graph to ``torch.compile`` (needs a C++ compiler on a CPU); otherwise
            it is run operation by operation.
    """

    def __init__(self, objective: ELBO, model: nn.Module, guide: nn.Module, compile: bool = True) -> None:
        self.names: tuple[str, ...] = ()
        self._pair = _Pair(objective, model, guide)
        self._compile = compile
        self._graphs: dict[Any, Any] = {}
        self._trained = {n: p for n, p in self._pair.named_parameters() if p.requires_grad}
        held = {n: p for n, p in self._pair.named_parameters() if not p.requires_grad}
        self._held = held | dict(self._pair.named_buffers())

    def __call__(self, args: tuple[Tensor, ...], beta: Tensor) -> Tensor:
        inputs = (list(self._trained.values()), list(self._held.values()), args, beta)
        key = tuple((t.shape, t.dtype, t.device) for t in args)
        if key not in self._graphs:
            self._graphs[key] = self._trace(inputs)
        # The graph holds its own backward pass: autograd need not look at it.
        with torch.no_grad():
            vector, gradients = self._graphs[key](*inputs)
        for parameter, gradient in zip(self._trained.values(), gradients, strict=True):
            parameter.grad = _laid_out(gradient, parameter)
        return vector

    def _trace(self, inputs: tuple[Any, ...]) -> Any:
        from torch.fx.experimental.proxy_tensor import make_fx

        def traced(trained: Any, held: Any, args: Any, beta: Any) -> Any:
            return self._loss_and_gradients(trained, held, args, beta)

        trained, held, args, beta = inputs
        # Tracing runs the programs once: its draws must not be missing from the training run, nor what it
        # does to buffers (running statistics) be in it. The graph does the same to those it is given.
        with isolated_rng(beta.device):
            graph = make_fx(traced)(trained, [t.detach().clone() for t in held], args, beta)
        _drop_questions(graph)
        self.names = self._pair.names
        if not self._compile:
            return graph
        # Inductor's search for a channels-last layout takes a graph that holds its own backward pass for
        # inference, and slows convolutions down by a fifth.
        return torch.compile(graph, dynamic=False, fullgraph=True, options={"layout_optimization": False})

    def _loss_and_gradients(
        self, trained: list[Tensor], held: list[Tensor], args: tuple[Tensor, ...], beta: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        leaves = [p.detach().requires_grad_() for p in trained]
        state = dict(zip(self._trained, leaves, strict=True)) | dict(zip(self._held, held, strict=True))
        vector = functional_call(self._pair, state, (args, beta))
        gradients = torch.autograd.grad(vector[0], leaves, allow_unused=True)
        return vector.detach(), list(gradients)


class _Pair(nn.Module):
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


def _drop_questions(graph: Any) -> None:
    """Take out what autograd asked about shapes while it was recorded: its answers are no tensors, which a
    compiler refuses, and nobody reads them. Forward-mode derivatives leave many."""
    for node in list(graph.graph.nodes):
        if node.target in _QUESTIONS and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()


def make_engine(name: str, objective: ELBO, model: nn.Module, guide: nn.Module, compile: bool) -> Engine:
    """Build an engine by name.

    Raises:
        ValueError: For an unknown name.
    """
    if name == "eager":
        return EagerEngine(objective, model, guide)
    if name == "graph":
        return GraphEngine(objective, model, guide, compile)
    raise ValueError(f"engine must be 'eager' or 'graph', got {name!r}")


def _vector(
    objective: ELBO, model: Program, guide: Program, args: tuple[Tensor, ...], beta: Tensor
) -> tuple[tuple[str, ...], Tensor]:
    """Evaluate the objective; return the names of loss and parts, and their values as one vector."""
    terms = objective.terms(model, guide, *args, beta=beta)
    return ("loss", *terms.parts), torch.stack([terms.loss, *terms.parts.values()])
