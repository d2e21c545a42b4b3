"""Second copies of a distribution: in another precision, or standing on fresh leaves for gradients."""

import copy
import types
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform
from torch.distributions.constraints import Constraint

__all__ = ["Recipe", "recipe_of"]

Factory = Callable[..., dist.TorchDistribution]
Change = Callable[[str, Tensor], Tensor]


class Recipe:
    """How to build a distribution again, each of its floating tensors changed on the way.

    Args:
        build: Called with a function of a tensor's name and the tensor; returns the new distribution.
        explicit: Whether those tensors are its parameters alone, not what it has computed from them too.
    """

    def __init__(self, build: Callable[[Change], dist.TorchDistribution], explicit: bool) -> None:
        self._build = build
        self.explicit = explicit

    def in_dtype(self, dtype: torch.dtype) -> dist.TorchDistribution:
        """Return a copy on the CPU whose floating tensors have ``dtype``."""
        return self._build(lambda name, tensor: tensor.detach().to("cpu", dtype))

    def on_leaves(self) -> tuple[dist.TorchDistribution, dict[str, Tensor]]:
        """Return a copy in double precision on fresh leaves that require gradients, and the leaves."""
        leaves: dict[str, Tensor] = {}

        def leaf(name: str, tensor: Tensor) -> Tensor:
            leaves[name] = tensor.detach().cpu().double().clone().requires_grad_()
            return leaves[name]

        return self._build(leaf), leaves

    def shifted(self, name: str, shift: Tensor) -> dist.TorchDistribution:
        """Return a copy in double precision with ``shift`` added to the tensor called ``name``."""
        return self._build(lambda n, t: t.detach().cpu().double() + (shift if n == name else 0))


def recipe_of(distribution: Any, parameters: Mapping[str, Any] | None) -> Recipe:
    """Find out how to rebuild ``distribution``: by its factory, its constructor, or tensor by tensor."""
    found = _arguments(distribution) if parameters is None else (distribution, parameters)
    if found is None:
        return Recipe(lambda change: _Walk(change)(distribution, ""), explicit=False)
    factory, arguments = found

    def build(change: Change) -> dist.TorchDistribution:
        return factory(
            **{k: _changed(change, k, v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        )

    return Recipe(build, explicit=True)


def _changed(change: Change, name: str, tensor: Tensor) -> Tensor:
    return change(name, tensor) if tensor.is_floating_point() else tensor.cpu()


def _arguments(distribution: Any) -> tuple[Factory, Mapping[str, Any]] | None:
    """Read a constructor and its arguments back from a distribution, if they give it again."""
    if isinstance(distribution, Independent):
        inner = _arguments(distribution.base_dist)
        if inner is None:
            return None
        factory, arguments = inner
        ndims = distribution.reinterpreted_batch_ndims
        return (lambda **keywords: dist.Independent(factory(**keywords), ndims)), arguments
    names = getattr(distribution, "arg_constraints", {})
    if not isinstance(names, Mapping):
        return None
    # A normal's matrix is stored as it was given and computed in other forms when asked for; a Beta
    # stores neither of its arguments.
    stored = [name for name in names if name in vars(distribution)]
    kind: Any = type(distribution)
    for chosen in (stored, list(names)):
        arguments = {name: getattr(distribution, name) for name in chosen if hasattr(distribution, name)}
        if arguments and _gives_again(kind, arguments, distribution):
            return kind, arguments
    return None


def _gives_again(factory: Factory, arguments: Mapping[str, Any], distribution: Any) -> bool:
    try:
        again = factory(**arguments)
        value = distribution.sample()
        return (
            again.batch_shape == distribution.batch_shape
            and again.event_shape == distribution.event_shape
            and torch.allclose(again.log_prob(value), distribution.log_prob(value))
        )
    except (TypeError, ValueError, RuntimeError):
        return False


class _Walk:
    """Copy a tree of distributions, transforms, modules and closures, changing the floating tensors."""

    def __init__(self, change: Change) -> None:
        self._change = change
        # The original is kept beside its copy: the id of a freed object would be handed out again.
        self._seen: dict[int, tuple[Any, Any]] = {}

    def __call__(self, item: Any, path: str) -> Any:
        if id(item) not in self._seen:
            new = self._new(item, path)
            self._seen[id(item)] = (item, new)
        return self._seen[id(item)][1]

    def _new(self, item: Any, path: str) -> Any:
        if isinstance(item, Tensor):
            return _changed(self._change, path, item)
        if isinstance(item, nn.Module | Distribution | Transform | Constraint):
            return self._object(item, path)
        if isinstance(item, types.MethodType):
            return types.MethodType(item.__func__, self(item.__self__, path))
        if isinstance(item, types.FunctionType) and item.__closure__:
            cells = tuple(
                types.CellType(self(cell.cell_contents, _join(path, name)))
                for name, cell in zip(item.__code__.co_freevars, item.__closure__, strict=True)
            )
            new = types.FunctionType(item.__code__, item.__globals__, item.__name__, item.__defaults__, cells)
            new.__kwdefaults__ = item.__kwdefaults__
            return new
        if isinstance(item, partial):
            keywords = {k: self(v, _join(path, k)) for k, v in item.keywords.items()}
            return partial(item.func, *(self(v, _join(path, i)) for i, v in enumerate(item.args)), **keywords)
        if type(item) in (list, tuple):
            return type(item)(self(v, _join(path, i)) for i, v in enumerate(item))
        if isinstance(item, dict):
            return {k: self(v, _join(path, k)) for k, v in item.items()}
        return item

    def _object(self, item: Any, path: str) -> Any:
        new = copy.copy(item)
        self._seen[id(item)] = (item, new)
        for name, value in vars(item).items():
            if isinstance(value, weakref.ref) or (name == "_inv" and not _is_inverse(item)):
                new.__dict__[name] = None
            elif name == "_cached_x_y":
                new.__dict__[name] = (None, None)
            elif not name.endswith("_hooks"):
                inner = "" if name in ("_parameters", "_buffers", "_modules") else name
                new.__dict__[name] = self(value, _join(path, inner))
        return new


def _is_inverse(transform: Any) -> bool:
    """An inverse transform owns the transform it inverts; any other holds its inverse as a cache."""
    return type(transform).__name__ == "_InverseTransform"


def _join(path: str, name: object) -> str:
    return ".".join(part for part in (path, str(name)) if part)
