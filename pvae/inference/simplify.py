"""Exact rewrites of a recorded step: fewer operations with less between them, the same values to the bit."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["simplify"]

_ATEN = torch.ops.aten

# What these return depends on shapes and types alone: the same tensor at every step.
_CONSTANT = {
    _ATEN.arange.default,
    _ATEN.arange.start,
    _ATEN.arange.start_step,
    _ATEN.eye.default,
    _ATEN.eye.m,
    _ATEN.full.default,
    _ATEN.full_like.default,
    _ATEN.new_full.default,
    _ATEN.new_ones.default,
    _ATEN.new_zeros.default,
    _ATEN.ones.default,
    _ATEN.ones_like.default,
    _ATEN.scalar_tensor.default,
    _ATEN.zeros.default,
    _ATEN.zeros_like.default,
}
# A copy of a number that is written in a program.
_LITERAL = _ATEN.lift_fresh_copy.default
# The same operation on a number, in the form that torch's own functions know.
_ON_NUMBERS = {
    _ATEN.add.Scalar: _ATEN.add.Tensor,
    _ATEN.div.Scalar: _ATEN.div.Tensor,
    _ATEN.mul.Scalar: _ATEN.mul.Tensor,
    _ATEN.sub.Scalar: _ATEN.sub.Tensor,
}
# Constants that are kept are at most so large: beyond, computing one anew costs less than holding it.
_MOST_ENTRIES = 2**16

# Operations that return their first argument where the second is this number. In floating point x * 1, x / 1,
# x ** 1 and x - 0 are x, minus zero and not-a-number included; x + 0 is not.
_NEUTRAL = {
    _ATEN.mul.Tensor: 1.0,
    _ATEN.div.Tensor: 1.0,
    _ATEN.sub.Tensor: 0.0,
    _ATEN.pow.Tensor_Scalar: 1.0,
}


def simplify(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Rewrite a graph of tensor operations in place, for this shape of inputs.

    Views that change nothing and results that nobody reads are left out, what was computed twice is computed
    once, what is the same at every step is computed now, and operations are called through torch's own
    functions in place of the dispatcher's. Each value stays what it was, bit for bit, and so do random draws
    and their order. What is written to in place is left alone. No two results share memory with each other,
    with an input or with a constant.

    Args:
        module: The graph: tensors in, a list of tensors (or ``None``) out.
        inputs: Tensors to run it on once. Those it writes to are changed, and draws are taken.

    Returns:
        ``module``.
    """
    graph = module.graph
    for node in graph.nodes:
        node.target = _ON_NUMBERS.get(node.target, node.target)
    run = _Observed(module)
    with torch.no_grad():
        run.run(*inputs)
    rewriter = _Rewriter(module, run.seen)
    rewriter.rewrite()
    rewriter.part_results()
    graph.eliminate_dead_code(_acts)
    rewriter.drop_constants()
    for node in graph.nodes:
        if node in run.native:
            _call_natively(node, run.native[node])
    graph.lint()
    module.recompile()
    return module


@dataclass(frozen=True)
class _Seen:
    """What a node returned, without the values.

    Attributes:
        geometry: All that tells two views of one memory apart; empty for several tensors.
        base: The node, most often an argument, whose memory the result lies in; ``None`` if it has memory
            of its own.
        constant: The result itself, if it is the same at every step and small.
    """

    geometry: tuple[Any, ...]
    base: fx.Node | None
    constant: Tensor | None


class _Observed(fx.Interpreter):
    """Runs a graph once, and notes what each node returns and how else it could be called."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, _Seen] = {}
        self.native: dict[fx.Node, Callable[..., Any]] = {}
        self._given: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value, near = self._called(n, args, kwargs), {a: self.env[a] for a in n.all_input_nodes}
        else:
            # Two parameters may be views of one memory.
            value, near = super().run_node(n), dict(self._given)
            self._given[n] = value
        if n.op != "output":
            base = next((other for other, its in near.items() if _share_memory(its, value)), None)
            if n.target is operator.getitem and base is not None and self.seen[base].base is None:
                base = None  # one of several fresh results
            geometry = _geometry(value) if isinstance(value, Tensor) else ()
            self.seen[n] = _Seen(geometry, base, value if self._is_constant(n, value) else None)
        return value

    def _called(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Call a node, by torch's own function if one is the same operation."""
        if isinstance(node.target, torch._ops.OpOverload):
            for function in _functions(node.target):
                calls = _Calls()
                try:
                    with calls:
                        value = function(*args, **kwargs)
                except Exception:  # takes its arguments in another way
                    continue
                if calls.are(node.target, args, kwargs):
                    self.native[node] = function
                    return value
        target: Any = node.target
        return target(*args, **kwargs)

    def _is_constant(self, node: fx.Node, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.numel() > _MOST_ENTRIES or not _is_pure(node):
            return False
        if node.target in _CONSTANT:
            return True
        inputs = node.all_input_nodes
        if node.target is _LITERAL:
            return inputs[0].op == "get_attr"
        return bool(inputs) and all(self.seen[i].constant is not None for i in inputs)


class _Rewriter:
    """Replaces nodes by earlier ones that have the same value."""

    def __init__(self, module: fx.GraphModule, seen: dict[fx.Node, _Seen]) -> None:
        self._module = module
        self._seen = seen
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._written = {self._memory(node) for node in _written(module.graph)}
        self._constants: dict[str, fx.Node] = {}

    def rewrite(self) -> None:
        """Go through the graph once, in its order."""
        known: dict[Any, fx.Node] = {}
        for node in list(self._module.graph.nodes):
            if node.op == "output" or not self._is_settled(node):
                continue
            same = self._folded(node) or self._neutral(node)
            if same is None and _is_pure(node):
                same = known.setdefault(self._key(node), node)
            if same is not None and same is not node:
                node.replace_all_uses_with(same)
                self._replaced[node] = same
            elif self._memory(node) is node:
                known.setdefault((node, self._seen[node].geometry), node)

    def part_results(self) -> None:
        """Copy a result that lies in the memory of another one, of an input or of a constant."""
        graph, parted = self._module.graph, set()
        result = graph.output_node()
        values = list(result.args[0])  # type: ignore[arg-type]
        for i, value in enumerate(values):
            if not isinstance(value, fx.Node):
                continue
            memory = self._memory(value)
            if memory in parted or memory.op in ("placeholder", "get_attr"):
                with graph.inserting_before(result):
                    values[i] = graph.call_function(_ATEN.clone.default, (value,))
            parted.add(memory)
        result.args = (values,)

    def drop_constants(self) -> None:
        """Let go of constants that nobody reads."""
        used = {node.target for node in self._module.graph.nodes if node.op == "get_attr"}
        for name in self._constants.keys() - used:
            delattr(self._module, name)

    def _now(self, node: fx.Node) -> fx.Node:
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def _memory(self, node: fx.Node) -> fx.Node:
        """The node that made the memory in which a node's result lies."""
        node = self._now(node)
        base = self._seen[node].base
        return node if base is None or _fills(node) is base else self._memory(base)

    def _is_settled(self, node: fx.Node) -> bool:
        """Whether nothing writes to what a node reads and returns."""
        return all(self._memory(n) not in self._written for n in (node, *node.all_input_nodes))

    def _key(self, node: fx.Node) -> Any:
        """What two nodes of the same value have in common."""
        seen = self._seen[node]
        if seen.base is not None and seen.geometry and node.target is not operator.getitem:
            return self._memory(node), seen.geometry
        return node.target, _hashable(node.args), _hashable(node.kwargs)

    def _folded(self, node: fx.Node) -> fx.Node | None:
        """The value of a constant, held by the module."""
        seen = self._seen[node]
        if seen.constant is None:
            return None
        name = f"constant_{node.name}"
        setattr(self._module, name, seen.constant)
        with self._module.graph.inserting_before(node):
            self._constants[name] = held = self._module.graph.create_node("get_attr", name)
        self._seen[held] = _Seen(seen.geometry, None, seen.constant)
        return held

    def _neutral(self, node: fx.Node) -> fx.Node | None:
        """The argument that a node returns as it is."""
        if node.target is _ATEN.neg.default:
            (inner,) = node.args
            assert isinstance(inner, fx.Node)
            outer = inner.args[0] if inner.target is _ATEN.neg.default else None
            return outer if isinstance(outer, fx.Node) and self._alike(outer, node) else None
        if node.target not in _NEUTRAL or node.kwargs or len(node.args) != 2:
            return None
        pairs = [node.args, node.args[::-1]] if node.target is _ATEN.mul.Tensor else [node.args]
        for value, number in pairs:
            if isinstance(value, fx.Node) and self._is_number(number, _NEUTRAL[node.target]):  # noqa: SIM102
                if self._alike(value, node):
                    return value
        return None

    def _alike(self, one: fx.Node, other: fx.Node) -> bool:
        return self._seen[one].geometry == self._seen[other].geometry

    def _is_number(self, argument: Any, number: float) -> bool:
        """Whether an argument is this number everywhere; no zero with a minus is zero."""
        if isinstance(argument, fx.Node):
            constant = self._seen[argument].constant
            if constant is None or not constant.is_floating_point():
                return False
            return bool(((constant == number) & ~constant.signbit()).all())
        return isinstance(argument, int | float) and str(float(argument)) == str(number)


class _Calls(TorchDispatchMode):
    """Notes the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def are(self, target: Any, args: Any, kwargs: Any) -> bool:
        """Whether there was one call, of this operation with these arguments."""
        if len(self._calls) != 1 or self._calls[0][0] is not target:
            return False
        _, theirs, theirs_by_name = self._calls[0]
        return _equal(_by_name(target, theirs, theirs_by_name), _by_name(target, args, kwargs))


def _functions(target: Any) -> Iterator[Callable[..., Any]]:
    """Functions of torch that may be an operation: those in C, which parse their arguments there."""
    name = target.overloadpacket.__name__
    for place in (torch, Tensor, F):
        function = getattr(place, name, None)
        if isinstance(function, BuiltinFunctionType | MethodDescriptorType):
            yield function


def _call_natively(node: fx.Node, function: Callable[..., Any]) -> None:
    if isinstance(function, MethodDescriptorType):
        node.op, node.target = "call_method", function.__name__
    else:
        node.target = function


def _by_name(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    arguments = target._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return given | dict(zip((a.name for a in arguments), args, strict=False)) | kwargs


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments are the same tensors and equal numbers."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _geometry(value: Tensor) -> tuple[Any, ...]:
    return (
        value.dtype,
        value.device,
        value.shape,
        value.stride(),
        value.storage_offset(),
        value.is_conj(),
        value.is_neg(),
    )


def _share_memory(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return any(_share_memory(each, other) for each in one)
    if isinstance(other, list | tuple):
        return _share_memory(other, one)
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    # Their identity, as what stands for zeros in forward-mode derivatives has no address.
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _is_pure(node: fx.Node) -> bool:
    """Whether a node does nothing but return a value that its arguments alone decide."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return not _acts(node) and "empty" not in node.target.overloadpacket.__name__


def _acts(node: fx.Node) -> bool:
    """Whether a node does something beside returning a value: draws, writes, checks, or what is unknown."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op in ("placeholder", "output")
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    # A message to other processes is waited for by what looks like a view of it.
    sent = node.target.namespace == "_c10d_functional"
    return random or sent or node.target._schema.is_mutable or not node.target._schema.returns


def _written(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the arguments that are written to; of an operation that is not known, all."""
    for node in graph.nodes:
        if node.op != "call_function" or not _acts(node):
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            yield from node.all_input_nodes
            continue
        given = _by_name(node.target, node.args, node.kwargs)
        for argument in node.target._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _nodes(given[argument.name])


def _fills(node: fx.Node) -> fx.Node | None:
    """The fresh memory that a node alone sees, writes to and returns, as ``normal_`` does."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and node.args):
        return None
    (first, *_) = node.args
    if not isinstance(first, fx.Node) or len(first.users) != 1 or first.op != "call_function":
        return None
    return first if "empty" in getattr(first.target, "__name__", "") else None


def _nodes(argument: Any) -> Iterator[fx.Node]:
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, Iterable):
        for each in argument:
            yield from _nodes(each)


def _hashable(argument: Any) -> Any:
    """A key of an argument under which 1, 1.0 and True are three."""
    if isinstance(argument, fx.Node):
        return argument
    if isinstance(argument, dict):
        return tuple((name, _hashable(value)) for name, value in argument.items())
    if isinstance(argument, list | tuple):
        return tuple(map(_hashable, argument))
    return type(argument), repr(argument)
