"""Whether a function of tensors is free of host synchronisation and can be traced into a graph."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["assert_traceable", "host_syncs"]

_SYNCS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "aten.equal", "item")


class _SyncCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in _SYNCS):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def host_syncs(function: Callable[[], object]) -> list[str]:
    """Names of the operators that read a tensor on the host, with Pyro's validation off."""
    with pyro.validation_enabled(False), _SyncCounter() as counter:
        function()
    return counter.found


def assert_traceable(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], others: tuple[Tensor, ...]
) -> None:
    """Trace value and gradients at ``inputs``; the graph must agree with the function at ``others``.

    Gradients are taken with respect to the floating-point tensors of ``inputs`` that require them.
    """

    def joint(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [
            t.detach().requires_grad_(like.requires_grad) for t, like in zip(tensors, inputs, strict=True)
        ]
        value = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return value.detach(), *torch.autograd.grad(value.sum(), wanted)

    assert host_syncs(lambda: joint(*inputs)) == []
    with pyro.validation_enabled(False):
        graph = make_fx(joint)(*(t.detach() for t in inputs))
        expected = joint(*others)
        for ours, eager in zip(graph(*(t.detach() for t in others)), expected, strict=True):
            torch.testing.assert_close(ours, eager)
        assert expected[0].isfinite().all()
