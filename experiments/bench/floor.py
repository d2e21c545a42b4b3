"""The networks of a program alone, called as a step or an evaluation calls them: the floor of
:mod:`.recipes`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_of_torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from pvae.inference.trainer import Trainer
from pvae.nn import PseudoinputPosterior

__all__ = ["Floor", "Recorder"]

# Where the classes of networks are written; one of them returns a distribution, and is looked into.
_NETWORKS, _PROGRAMS = ("torch.nn.", "pvae.nn."), (PseudoinputPosterior,)


@dataclass(frozen=True)
class _Like:
    """What a tensor of numbers is like, without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    channels_last: bool


class Call(NamedTuple):
    """One call of a network.

    Attributes:
        module: The network.
        args: Its arguments: tensors of floats as :class:`_Like`, anything else as it was.
        kwargs: Those that were named.
        gradient: Whether gradients were recorded.
    """

    module: nn.Module
    args: Any
    kwargs: Any
    gradient: bool


class Recorder:
    """Notes every call of a network that no other network makes, while it is active.

    Networks are the modules whose classes are written in ``torch.nn`` or ``pvae.nn``: programs, priors and
    likelihoods are looked into, a network's own layers are part of its call.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._depth = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
            # Torch 2.13 forgets this entry, and would go on to take every module for one with hooks.
            module_of_torch._global_forward_hooks_with_kwargs.pop(hook.id, None)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._depth += _is_network(module)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _is_network(module):
            self._depth -= 1
            if self._depth == 0:
                args, kwargs = tree_map_only(Tensor, _like, (args, kwargs))
                self.calls.append(Call(module, args, kwargs, torch.is_grad_enabled()))


class Floor:
    r"""The bare forward and backward passes of recorded calls.

    In it are, for each call of a network: the forward pass on an input of the same shape and layout in
    memory, and the backward pass from a gradient of one at every output, to the parameters and, where the
    recorded input had a gradient, to the input; then one step of the same optimiser. Not in it: Pyro, the
    drawing of the batch and of the latents, every density (of x, too), the KL, weights used outside of a
    layer's own call, derivatives of networks (a call under ``torch.func`` counts once, as the plain call it
    is of), the optimiser of a flow that an alignment trains beside the model, clipping, averaging, checks of
    gradients, schedules, and the reading of losses. So a ratio of 1 is out of reach.

    Args:
        calls: What a :class:`Recorder` noted.
        trainer: Its optimiser steps after the backward pass, at a learning rate of zero; ``None`` for forward
            passes alone.
    """

    def __init__(self, calls: Iterable[Call], trainer: Trainer | None = None) -> None:
        self._calls = list(calls)
        self._optimizer = None if trainer is None else trainer.optimizer
        modules = [*(call.module for call in self._calls)]
        trained = [] if trainer is None else trainer.parameters
        self.parameters = list({id(p): p for p in (*trained, *_parameters(modules))}.values())
        self._inputs: dict[_Like, Tensor] = {}
        self._ones: dict[_Like, Tensor] = {}
        for group in () if self._optimizer is None else self._optimizer.param_groups:
            group["lr"] = 0.0

    def step(self) -> None:
        """Take one step: forward, backward, optimiser."""
        for parameter in self.parameters:
            parameter.grad = None
        outputs: list[Tensor] = []
        for call in self._calls:
            with torch.set_grad_enabled(call.gradient):
                output = self._run(call)
            outputs += [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(outputs, [self._cached(self._ones, _like(t), torch.ones) for t in outputs])
        if self._optimizer is not None:
            self._optimizer.step()

    @torch.inference_mode()
    def passes(self) -> None:
        """Run the forward passes alone."""
        for call in self._calls:
            self._run(call)

    def flops(self) -> int:
        """Take a step, and count its multiplications and additions in matrix products and convolutions."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return int(counter.get_total_flops())

    def _run(self, call: Call) -> Any:
        args, kwargs = tree_map_only(_Like, self._input, (call.args, call.kwargs))
        return call.module(*args, **kwargs)

    def _input(self, like: _Like) -> Tensor:
        value = self._cached(self._inputs, like, torch.rand)
        return value.detach().requires_grad_() if like.requires_grad and torch.is_grad_enabled() else value

    @staticmethod
    def _cached(known: dict[_Like, Tensor], like: _Like, make: Callable[..., Tensor]) -> Tensor:
        if like not in known:
            value = make(like.shape, dtype=like.dtype, device=like.device)
            known[like] = value.to(memory_format=torch.channels_last) if like.channels_last else value
        return known[like]


def _is_network(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_NETWORKS) and not isinstance(module, _PROGRAMS)


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


def _like(value: Tensor) -> Any:
    """Describe a tensor of floats; keep any other (labels), whose values are addresses."""
    if not value.is_floating_point():
        return value.detach().clone()
    return _Like(tuple(value.shape), value.dtype, value.device, value.requires_grad, _channels_last(value))


def _channels_last(value: Tensor) -> bool:
    try:
        return (
            value.ndim == 4
            and value.is_contiguous(memory_format=torch.channels_last)
            and not value.is_contiguous()
        )
    except RuntimeError:  # under vmap a tensor does not tell
        return False
