"""Both ends of an annealing path with their gradients, as a function of states that is recorded once."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from pvae.inference.program import Program, Site, SiteRecorder, particle_plate
from pvae.inference.recording import NotTraceable, record
from pvae.inference.simplify import simplify

from .compiled import compiled, first_line, warn_uncompiled
from .hmc import Point
from .latents import _call, _run
from .layout import Layout
from .memory import Measured
from .weights import _log_prob, _precision, exact

__all__ = ["Path", "Paths", "bytes_of_state"]

# From so many evaluations on it pays to record them: a recording costs some tens of them.
_WORTHWHILE = 256


class Path:
    """Both ends of the path for some data, with gradients: one run of the model, one of the guide.

    A guide of one latent runs once for all: its distribution is that of x alone. One of several runs again
    for every state, as its lower latents may hang on the upper ones.

    Args:
        model: The model program.
        guide: The guide, or ``None`` for a path that starts from the prior.
        x: Data, shape ``(B, *x_shape)``.
        y: Contexts.
        layout: The latents.
        paths: What paths of other data share with this one; ``None`` for nothing.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        x: Tensor,
        y: Tensor | None,
        layout: Layout,
        paths: "Paths | None" = None,
    ) -> None:
        self.model, self.guide, self.x, self.y, self.layout = model, guide, x, y, layout
        self._fixed: Site | None = None
        if guide is not None and len(layout.names) == 1:
            self._fixed = _run(guide, x, y, replace=exact)[layout.names[0]]
        self._paths = paths
        self._recorded: dict[int, Callable[[Tensor], list[Tensor]] | None] = {}

    def __call__(self, z: Tensor) -> Point:
        """Evaluate states ``(K, B, D)``, as many chains at a time as fit."""
        z = z.detach().contiguous()  # as what is recorded expects it
        size = len(z) if self._paths is None else self._paths.chains_at_once(len(self.x))
        parts = [self._evaluated(part, len(z)) for part in z.split(size)]
        columns = parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
        return Point(z, *columns)

    def _evaluated(self, z: Tensor, num_chains: int) -> list[Tensor]:
        if self._paths is not None and len(z) not in self._recorded:
            self._recorded[len(z)] = self._paths.recorded(self.evaluate, z, num_chains)
        recorded = self._recorded.get(len(z))
        return self.evaluate(z) if recorded is None else recorded(z)

    def evaluate(self, z: Tensor) -> list[Tensor]:
        """Both log-densities at ``z`` ``(K, B, D)`` and their gradients, as those of :class:`Point`."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            values = self.layout.sites(z)
            shape = (z.shape[0], z.shape[1])
            # The guide goes first: the model takes over what they compute alike on the same latents, as the
            # way down of a ladder is.
            log_q = None if self.guide is None else self._log_q(values, shape, z)
            with SiteRecorder(values) as p, particle_plate(shape[0]):
                _call(self.model, self.x, self.y)
            log_z = _sum([p.sites[name] for name in values], shape, z, "model")
            log_x = _sum([s for s in p.sites.values() if s.observed and not s.is_factor], shape, z, "model")
            if log_q is None:
                log_start, grad_start = log_z, _gradient(log_z, z, keep=True)
                log_end, grad_end = log_z + log_x, grad_start + _gradient(log_x, z)
            else:
                log_start, log_end = log_q, log_z + log_x
                grad_start = _gradient(log_start, z, keep=self._fixed is None)
                grad_end = _gradient(log_end, z)
        return [log_start.detach(), log_end.detach(), grad_start, grad_end]

    def _log_q(self, values: Mapping[str, Tensor], shape: tuple[int, int], z: Tensor) -> Tensor:
        assert self.guide is not None
        if self._fixed is not None:
            sites = [replace(self._fixed, value=values[self._fixed.name])]
        else:
            with SiteRecorder(values, replace=exact) as q, particle_plate(shape[0]):
                _call(self.guide, self.x, self.y)
            sites = [q.sites[name] for name in values]
        return _sum(sites, shape, z, "guide")


class Paths:
    """Makes the paths of data that are annealed pass by pass, and the graphs that they run.

    Where densities of some data are asked for often enough, they and their gradients are recorded as a graph
    of tensor operations, without Pyro and autograd in it; what depends on x alone, such as an encoder's
    features, is in it as a constant. Values are those of the programs, to the bit.

    Args:
        model: The model program.
        guide: The guide, or ``None`` for paths that start from the prior.
        layout: The latents.
        states: Chains times data that fit into one pass.
        evaluations: How often densities are asked for, by the number of chains.
        compile: Whether graphs are compiled.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        layout: Layout,
        states: int,
        evaluations: Mapping[int, int],
        compile: bool = False,
    ) -> None:
        self._model, self._guide, self._layout = model, guide, layout
        self._states, self._evaluations = states, evaluations
        self._compile, self._records = compile, True
        # By code and shapes: data of the next pass differ in constants alone.
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, x: Tensor, y: Tensor | None) -> Path:
        """Make the path of some data."""
        return Path(self._model, self._guide, x, y, self._layout, self)

    def chains_at_once(self, num_data: int) -> int:
        """How many chains of so many data go through the programs in one pass."""
        return max(1, self._states // num_data)

    def recorded(
        self, evaluate: Callable[[Tensor], list[Tensor]], z: Tensor, num_chains: int
    ) -> Callable[[Tensor], list[Tensor]] | None:
        """Record a function of states of this shape; ``None`` where that does not pay, or cannot be done."""
        wanted = self._evaluations.get(num_chains, 0) * -(-num_chains // len(z))
        if not self._records or (wanted < _WORTHWHILE and not self._compile):
            return None

        def step(z: Tensor) -> list[Tensor | None]:
            return [*evaluate(z)]

        try:
            graph = record(step, lambda: [z], z.device, simplified=False)
        except NotTraceable as error:
            self._records = False
            if self._compile:
                warn_uncompiled(error.reason)
            return None
        _settle(graph)
        if self._compile:
            return self._compiled_from(graph, z)
        simplify(graph, [z])
        return graph.forward

    def _compiled_from(self, graph: fx.GraphModule, z: Tensor) -> Callable[[Tensor], list[Tensor]] | None:
        constants = _lifted(graph)
        key = (graph.code, tuple((t.shape, t.dtype) for t in (z, *constants)))
        try:
            if key not in self._compiled:
                self._compiled[key] = compiled(graph)
            function = self._compiled[key]
            function(z, *constants)
        except Exception as error:  # compilers fail in many ways, and nothing hangs on one
            self._records = False
            warn_uncompiled(f"compiling failed ({first_line(error)})")
            return None
        return lambda z: function(z, *constants)


def bytes_of_state(model: Program, guide: Program | None, x: Tensor, y: Tensor | None, layout: Layout) -> int:
    """Bytes that densities and gradients of one chain of one datum take on their way."""
    one = slice(0, 1)
    path = Path(model, guide, x[one], None if y is None else y[one], layout)
    z = torch.zeros(1, 1, layout.size, dtype=layout.dtype, device=x.device)
    measured = Measured()
    measured.mark([z])
    with measured:
        path.evaluate(z)
    return measured.peak


def _settle(graph: fx.GraphModule) -> None:
    """Compute now, once, what does not depend on the arguments of a graph."""
    known: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        settled = bool(inputs) and all(i in known for i in inputs)
        if _changes(node) and any(i in known for i in inputs):
            return  # it may write to what would be a constant
        if node.op == "get_attr":
            known[node] = _attribute(graph, node)
        elif node.op == "call_function" and settled:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    for number, (node, value) in enumerate(known.items()):
        if node.op == "get_attr" or not isinstance(value, Tensor) or all(u in known for u in node.users):
            continue
        name = f"settled_{number}"
        graph.register_buffer(name, value)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(name))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _lifted(graph: fx.GraphModule) -> list[Tensor]:
    """Make arguments of what a graph holds, and return it."""
    held = [node for node in graph.graph.nodes if node.op == "get_attr"]
    tensors = [_attribute(graph, node).detach() for node in held]
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for number, node in reversed(list(enumerate(held))):
        with graph.graph.inserting_after(last):
            argument = graph.graph.placeholder(f"held_{number}")
        node.replace_all_uses_with(argument)
        graph.graph.erase_node(node)
    graph.recompile()
    return tensors


def _attribute(graph: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _changes(node: fx.Node) -> bool:
    """Whether a node writes to something."""
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def _sum(sites: list[Site], shape: tuple[int, int], z: Tensor, program: str) -> Tensor:
    """Add up log-densities in double precision, shape ``(K, B)``."""
    total = torch.zeros(shape, dtype=_precision(z.device), device=z.device)
    for site in sites:
        total = total + _log_prob(site, shape, program)
    return total


def _gradient(log_prob: Tensor, z: Tensor, keep: bool = False) -> Tensor:
    if not log_prob.requires_grad:
        return torch.zeros_like(z)
    (gradient,) = torch.autograd.grad(
        log_prob.sum(), z, retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    return gradient
